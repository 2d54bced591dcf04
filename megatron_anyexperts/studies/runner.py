"""Runs a study: each run a folder, its steps one after the other, its result a line of the ledger."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_anyexperts.studies import ledger
from megatron_anyexperts.studies.declaration import Run, Study, StudyError
from megatron_anyexperts.survival.signals import die_with_parent


@dataclass(frozen=True)
class Place:
    """Where a study runs.

    Attributes:
        ledger: its ledger.
        work: folder of the runs.
        inputs: paths by the names of `Study.inputs`.
    """

    ledger: Path
    work: Path
    inputs: dict[str, Path]


def run_missing(study: Study, place: Place, settings: list[str]) -> Iterator[tuple[Run, float]]:
    """Run what the ledger lacks of some settings; yield each run as it ends, with its seconds.

    A run that was killed starts anew. Several processes may do this at once: each takes a run that no other has.

    Raises:
        StudyError: an input is missing, a setting is unknown, or a step failed.
    """
    unknown = [name for name in settings if name not in study.settings]
    if unknown:
        raise StudyError(f"no setting {', '.join(unknown)}; there are {', '.join(study.settings)}")
    missing = [f"{name}=PATH ({what})" for name, what in study.inputs.items() if name not in place.inputs]
    if missing:
        raise StudyError(f"give {', '.join(missing)}")
    for run in study.runs:
        if run.setting not in settings:
            continue
        with _taken(place.work / f"{run.folder}.lock") as free:
            # Read again each time: another process may have ended it since.
            if not free or run in ledger.of_study(study, ledger.read(place.ledger)[0])[0]:
                continue
            started = time.time()
            results = _run(study, run, place)
            seconds = round(time.time() - started, 1)
            about = {"commit": _commit(), "finished": int(time.time()), "seconds": seconds}
            ledger.append(place.ledger, {**study.identity(run), **about, "results": results})
        yield run, seconds


@contextmanager
def _taken(path: Path) -> Iterator[bool]:
    # The kernel gives a lock back when its holder dies, however it dies.
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _run(study: Study, run: Run, place: Place) -> dict[str, Any]:
    folder = place.work / run.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = {name: str(path.resolve()) for name, path in place.inputs.items()}
    values |= {"python": sys.executable, "config": f"{folder}/study.yaml", "run": f"{folder}/run", "seed": run.seed}
    filled = {
        key: value.format(**values) if isinstance(value, str) else value
        for key, value in study.configuration(run).items()
    }
    Path(values["config"]).write_text(yaml.safe_dump(filled, sort_keys=False), encoding="utf-8")
    results = {}
    for name, step in study.steps.items():
        log = folder / f"{name}.log"
        with log.open("w") as errors:
            command = [word.format(**values) for word in shlex.split(step.command)]
            # A training that outlives a killed runner would write into the folder of the next attempt.
            ended = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                env={"OMP_NUM_THREADS": "1", **os.environ},
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
            errors.write(ended.stdout)
        if ended.returncode:
            raise StudyError(f"{run.setting}, seed {run.seed}: {name} ended with {ended.returncode}; log: {log}")
        found = _last_json(ended.stdout)
        if found is not None:
            results[name] = {key: content for key, content in found.items() if key in (step.keep or found)}
    return results


def _last_json(printed: str) -> Any:
    """The last line that is a JSON object, or None."""
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return None


def _commit() -> str:
    """The commit that is checked out, marked when files differ from it; "" outside a checkout."""
    here = ["git", "-C", str(Path(__file__).parent)]
    described = [*here, "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip()
