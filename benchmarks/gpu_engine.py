"""Compile Transformer Engine against the torch that is there, from the lock of the project.

    python -m benchmarks.gpu_engine FOLDER

Installs into FOLDER what requirements-fp8.lock pins and this environment lacks, each against its hash. Without a
network: `PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS`, a folder that holds the files of the lock.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile

from benchmarks.gpu_machine import ROOT

SOURCE = "transformer-engine-torch"
"""Exists as source only."""


def canonical(name: str) -> str:
    """A package's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parts(lock: str, installed: set[str]) -> tuple[str, str]:
    """What of a lock is not installed, in whatever version, so that torch stays: wheels, and what they compile."""
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)
    named = [(canonical(name[0]), entry) for entry in entries if (name := re.match(r"[\w.-]+", entry))]
    lacking = [(name, entry) for name, entry in named if name not in installed]
    wheels = "".join(entry for name, entry in lacking if name != SOURCE)
    return wheels, "".join(entry for name, entry in lacking if name == SOURCE)


def install(folder: str, wanted: str, *options: str) -> int:
    """Install entries of a lock into a folder; returns pip's exit code."""
    variables = {
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE", "NVTE_FRAMEWORK": "pytorch", "MAX_JOBS": str(os.cpu_count() or 1),
        "PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    if shutil.which("nvcc") is None:
        variables["NVTE_BUILD_USE_NVIDIA_WHEELS"] = "1"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(wanted)
        requirements.flush()
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--require-hashes"]
        pip += ["--retries", "0", "--upgrade", "--target", folder, *options, "--requirement", requirements.name]
        return subprocess.run(pip, env=os.environ | variables).returncode


def main() -> int:
    """Install; returns pip's exit code."""
    installed = {canonical(found.name) for found in importlib.metadata.distributions()}
    wheels, source = parts((ROOT / "requirements-fp8.lock").read_text(), installed)
    print("to install:", *re.findall(r"^[\w.-]+==\S+", wheels + source, re.MULTILINE), flush=True)
    failed = install(sys.argv[1], wheels, "--only-binary", ":all:") if wheels else 0
    return failed or (install(sys.argv[1], source, "--no-binary", SOURCE) if source else 0)


if __name__ == "__main__":
    raise SystemExit(main())
