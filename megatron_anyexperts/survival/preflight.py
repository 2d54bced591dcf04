"""Looks at every node before training starts, and says which one is not fit and why."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("megatron-core", "torch", "megatron-energon", "webdataset", "transformers", "numpy")
MARK = "PREFLIGHT "


@dataclass(frozen=True)
class Needs:
    """What a node must offer."""

    gpus: int = 0
    free_gib: float = 1.0
    """In the run directory and in the node's temporary directory."""
    clock_tolerance_s: float = 5.0


@dataclass(frozen=True)
class Report:
    """What one node found about itself."""

    node: str
    time: float
    versions: dict[str, str]
    free_gib: dict[str, float]
    faults: list[str] = field(default_factory=list)
    gpus: int = 0


def probe(run_dir: Path, gpus_expected: int) -> Report:
    """Examine this node. Everything that goes wrong becomes a fault of the report, never an exception.

    Args:
        run_dir: on the shared file system; must be writable from here.
        gpus_expected: GPUs to exercise; 0 skips the check, and torch is not imported.
    """
    faults: list[str] = []
    temporary = Path(os.environ.get("TMPDIR", tempfile.gettempdir()))
    free = {}
    for name, folder in (("run directory", run_dir), ("temporary directory", temporary)):
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            faults.append(f"cannot write to the {name} {folder}: {error.strerror}")
        with contextlib.suppress(OSError):  # the failed write above has already said so
            free[f"{name} {folder}"] = shutil.disk_usage(folder).free / 2**30
    gpus = 0
    if gpus_expected:
        gpus, gpu_faults = probe_gpus(gpus_expected)
        faults += gpu_faults
    return Report(os.environ.get("SLURMD_NODENAME", socket.gethostname()), time.time(), versions(), free, faults, gpus)


def versions() -> dict[str, str]:
    """Versions that must agree between nodes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def probe_gpus(expected: int) -> tuple[int, list[str]]:
    """Count the GPUs and have each multiply two matrices with a known product."""
    faults = []
    try:
        import torch

        count = torch.cuda.device_count()
        for index in range(count):
            ones = torch.ones(1024, 1024, device=f"cuda:{index}")
            if not bool(((ones @ ones) == 1024).all()):
                faults.append(f"GPU {index} multiplies wrongly")
    except Exception as error:  # whatever a broken driver raises is this node's fault to report
        return 0, [f"GPUs unusable: {(str(error).strip() or type(error).__name__).splitlines()[0]}"]
    if count < expected:
        faults.append(f"{count} GPUs, not {expected}")
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=index,ecc.errors.uncorrected.volatile.total",
            "--format=csv,noheader,nounits",
        ]
        try:
            lines = subprocess.run(query, text=True, capture_output=True, timeout=60, check=False).stdout.splitlines()
        except subprocess.TimeoutExpired:
            return count, [*faults, "nvidia-smi does not answer within 60 s"]
        for line in lines:
            index, _, errors = line.partition(",")
            if errors.strip().isdigit() and int(errors):
                faults.append(f"GPU {index.strip()} has {errors.strip()} uncorrected memory errors")
    return count, faults


def judge(
    reports: Sequence[Report], nodes: Sequence[str], needs: Needs, asked_at: float, heard_at: float, reference_node: str
) -> dict[str, str]:
    """Unfit nodes and the first reason of each.

    Args:
        reports: what the nodes said, in any order.
        nodes: all nodes that were asked.
        needs: what each must offer.
        asked_at: time of day here when the probe was started, in seconds since the epoch.
        heard_at: time of day here when all had answered. A right clock reads something in between.
        reference_node: its versions decide when there is no majority: the node the batch script runs on.
    """
    by_node = {report.node: report for report in reports}
    wanted = _common_versions(by_node, reference_node)
    bad = {}
    for node in nodes:
        report = by_node.get(node)
        faults = _faults(report, wanted, needs, asked_at, heard_at) if report else ["did not answer"]
        if faults:
            bad[node] = faults[0]
    return bad


def choose(nodes: Sequence[str], bad: Mapping[str, str], least: int) -> list[str]:
    """The fit nodes, in order.

    Raises:
        ValueError: fewer than `least` are fit; names each unfit node with its reason, in one line.
    """
    good = [node for node in nodes if node not in bad]
    if len(good) < least:
        reasons = "; ".join(f"{node}: {why}" for node, why in bad.items())
        raise ValueError(f"{len(good)} of {len(nodes)} nodes are fit, {least} are needed ({reasons})")
    return good


def emit(record: Mapping[str, Any]) -> None:
    """Print one record so that the batch script finds it among whatever else a node prints."""
    print(MARK + json.dumps(record), flush=True)


def collect(text: str) -> list[dict[str, Any]]:
    """Records that nodes printed with `emit`."""
    found = []
    for piece in text.split(MARK)[1:]:
        # Lines of several tasks may run into each other; each record is read up to its own end.
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.JSONDecoder().raw_decode(piece)[0])
    return found


def as_record(report: Report) -> dict[str, Any]:
    """The report as `emit` prints it; `Report(**record)` makes it again."""
    return asdict(report)


def _common_versions(by_node: Mapping[str, Report], reference_node: str) -> dict[str, str]:
    if not by_node:
        return {}
    counts = Counter(tuple(sorted(report.versions.items())) for report in by_node.values())
    (best, most), *rest = counts.most_common(2)
    if rest and rest[0][1] == most and reference_node in by_node:
        return by_node[reference_node].versions
    return dict(best)


def _faults(report: Report, wanted: Mapping[str, str], needs: Needs, asked_at: float, heard_at: float) -> list[str]:
    faults = list(report.faults)
    faults += [
        f"{name} is {report.versions.get(name)}, not {version}"
        for name, version in wanted.items()
        if report.versions.get(name) != version
    ]
    faults += [
        f"{free:.1f} GiB free in the {place}, not {needs.free_gib:g}"
        for place, free in report.free_gib.items()
        if free < needs.free_gib
    ]
    early, late = asked_at - report.time, report.time - heard_at
    if max(early, late) > needs.clock_tolerance_s:
        faults.append(f"its clock is off by {-early if early > late else late:+.0f} s or more")
    return faults
