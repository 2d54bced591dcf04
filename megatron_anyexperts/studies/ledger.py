"""The ledger of a study: one line of JSON for each run that ended, never changed afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_anyexperts.studies.declaration import Run, Study, StudyError


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, sort_keys=True) + "\n"
    with path.open("a+b") as file:
        # A line that a killed writer left unfinished must not swallow this one.
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return all runs, and what there is to say about lines that are none."""
    records, notes = [], []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            notes.append(f"{path}, line {number}: not JSON, left out")
    return records, notes


def of_study(study: Study, records: list[dict[str, Any]]) -> tuple[dict[Run, dict[str, Any]], int]:
    """Return the study's runs that are in the ledger, and how many lines are none of its runs as now declared.

    Raises:
        StudyError: a run is there twice.
    """
    found: dict[Run, dict[str, Any]] = {}
    others = 0
    declared = {run: study.identity(run) for run in study.runs}
    for record in records:
        run = Run(record["setting"], record["seed"])
        identity = declared.get(run)
        if identity is None or any(record.get(key) != value for key, value in identity.items()):
            others += 1
        elif run in found:
            raise StudyError(f"{run.setting}, seed {run.seed} is in the ledger twice; keep the first line")
        else:
            found[run] = record
    return found, others
