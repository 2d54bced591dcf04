"""Which NVIDIA driver is there, whether torch's CUDA runs on it, and what to do if not."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

LEAST = {11: "450.80.02", 12: "525.60.13", 13: "580"}
"""Oldest driver on Linux for each CUDA major version (NVIDIA, CUDA Compatibility, minor version compatibility)."""

_SMI = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
_KERNEL = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Driver:
    """What was found.

    Args:
        version: such as "580.95.05"; None without one.
        said: why nvidia-smi named none, in its own words; None where it did or is not there.
    """

    version: str | None = None
    said: str | None = None


def from_smi(output: str) -> Driver:
    """Read what `nvidia-smi --query-gpu=driver_version --format=csv,noheader` printed on either stream."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    versions = [line for line in lines if re.fullmatch(r"\d+\.\d+(\.\d+)?", line)]
    return Driver(versions[0]) if versions else Driver(said=" ".join(lines) or None)


def from_kernel(text: str) -> str | None:
    """Version in /proc/driver/nvidia/version, which is there without nvidia-smi as well."""
    found = re.search(r"^NVRM version:.*?\s(\d{3,}\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return found and found[1]


def look() -> Driver:
    """Ask nvidia-smi, then the kernel module."""
    try:
        answer = subprocess.run(_SMI, capture_output=True, text=True, timeout=30)
        found = from_smi(f"{answer.stdout}\n{answer.stderr}")
    except OSError:
        found = Driver()
    except subprocess.TimeoutExpired:
        found = Driver(said="nvidia-smi did not answer within 30 s")
    if found.version is None and _KERNEL.exists():
        return Driver(from_kernel(_KERNEL.read_text()), found.said)
    return found


def least(cuda: str) -> str | None:
    """Oldest driver for a CUDA version, such as "13.2"; None for one that is not in the table."""
    return LEAST.get(int(cuda.split(".")[0]))


def is_older(version: str, needed: str) -> bool:
    """Whether a driver's version comes before another."""
    ours, theirs = ([int(part) for part in each.split(".")] for each in (version, needed))
    return ours < theirs


def problem(driver: Driver, cuda: str | None, works: bool) -> str | None:
    """Why torch sees no GPU, with the way out; None where the driver is not the reason.

    Args:
        driver: what `look` found.
        cuda: version that torch was built for; None for a build without.
        works: whether torch sees a GPU. It does on an older driver with NVIDIA's forward-compatibility package.
    """
    if works:
        return None
    if driver.version is None:
        return driver.said and f"the NVIDIA driver does not answer: {driver.said}"
    if cuda is None:
        return f"driver {driver.version} is there, but this torch is built without CUDA; install the locked one"
    needed = least(cuda)
    if needed is None or not is_older(driver.version, needed):
        if driver.said:  # the kernel module is there
            return f"driver {driver.version} is loaded, but nvidia-smi says: {driver.said}"
        return f"driver {driver.version} fits CUDA {cuda}, but torch sees no GPU; look at CUDA_VISIBLE_DEVICES"
    package = "cuda-compat-" + "-".join(cuda.split(".")[:2])
    return (
        f"driver {driver.version} is too old: torch's CUDA {cuda} needs {needed} or newer. Update it; or, on "
        f"data-center GPUs, use NVIDIA's {package} before it; or take a torch for CUDA 12 (docs/gpu.md, Drivers)"
    )


def describe(driver: Driver, cuda: str | None) -> str | None:
    """The driver beside what torch's CUDA needs; None without a driver."""
    if driver.version is None:
        return None
    needed = least(cuda) if cuda else None
    if needed is None:
        return driver.version
    older = is_older(driver.version, needed)
    return f"{driver.version}, {'older than' if older else 'at least'} the {needed} that CUDA {cuda} needs"
