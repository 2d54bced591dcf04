"""Runs the steps of `gpu.sh` one after the other and writes what came of them; nothing stops the next step.

A step may take its own limit, and no more than leaves some time to each that follows; all end inside the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine import ROOT, Machine, commit, environment
from benchmarks.gpu_steps import STEPS, Step

RESERVE = 15.0
"""Seconds kept for each later step, as far as there are any."""
LEAST = 5.0
"""Seconds under which no step begins."""
GRACE = 3.0
"""Seconds between asking the processes of a step to end and ending them."""
LAST_LINES = 15
MINUTES = 8.0
"""Of all steps together."""
MARGIN = 10.0
"""Seconds for what comes before and after the steps."""


def allowed(limit: float, left: float, later: int) -> float:
    """Seconds that a step may take: its limit, less if steps behind it would be left without time.

    Args:
        limit: the step's own.
        left: seconds of the budget that are left.
        later: steps behind it that can run.
    """
    return min(limit, max(left - RESERVE * later, min(left, left / (later + 1))))


def run(words: list[str], seconds: float, log: Path, variables: dict[str, str]) -> tuple[int | None, float]:
    """Run a command and end whatever it leaves behind; exit code (None: it ran out of time) and seconds taken."""
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(0.0, seconds - GRACE))
        except subprocess.TimeoutExpired:
            code = None
            _signal(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _signal(process.pid, signal.SIGKILL)
            process.wait()
    return code, time.monotonic() - started


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def measure(step: Step, machine: Machine, work: Path, seconds: float, variables: dict[str, str]) -> dict[str, Any]:
    """Run one step; its record."""
    command, log = step.command(machine, work), work / f"{step.name}.log"
    code, taken = run(command, seconds, log, variables)
    output = log.read_text(errors="replace")
    state = "ran" if code == 0 else "timed out" if code is None else "failed"
    record = {"command": _plain(" ".join(command), work), "exit_code": code, "seconds": round(taken, 1)}
    try:
        record["figures"] = step.figures(work, output)
    except Exception as error:  # whatever a command printed must not end the others
        if state == "ran":
            state, output = "failed", f"{output}\nno figures: {type(error).__name__}: {error}"
    record["state"] = state
    if state != "ran":
        record["last_lines"] = [_plain(line, work) for line in output.splitlines() if line.strip()][-LAST_LINES:]
    return record


def _plain(text: str, work: Path) -> str:
    places = {str(work): "WORK", sys.executable: "python", f"{ROOT}/": "", str(Path.home()): "~"}
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def measure_all(steps: list[Step], work: Path, output: Path, seconds: float, on_cpu: bool) -> dict[str, Any]:
    """Run all steps inside `seconds`, and write their records after each one.

    A larger budget than the usual one makes the limits larger, in proportion: a machine may be slow.
    """
    factor = max(1.0, seconds / (60 * MINUTES - MARGIN))
    started = time.monotonic()
    variables = environment(on_cpu)
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(work / "engine"), variables.get("PYTHONPATH", "")])
    machine = Machine.look(variables)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "budget_s": seconds, "steps": [],
    }  # fmt: skip
    print(f"{machine.gpu or 'no GPU: small sizes'}; torch {machine.torch}", flush=True)
    for number, step in enumerate(steps):
        limit = round(factor * step.limit, 1)
        record = {"name": step.name, "title": step.title, "limit_s": limit}
        left = seconds - (time.monotonic() - started)
        later = sum(each.lacks(machine) is None for each in steps[number + 1 :])
        if lack := step.lacks(machine):
            record["state"] = lack
        elif (time_of_step := allowed(limit, left, later)) < LEAST:
            record["state"] = "no time left"
        else:
            record |= measure(step, machine, work, time_of_step, variables)
            shutil.rmtree(work / "async_save", ignore_errors=True)
            if step.name == "transformer_engine" and not machine.transformer_engine:
                machine = Machine.look(variables)
                record["compiled"] = machine.transformer_engine is not None
        result["steps"].append(record)
        result |= {"machine": asdict(machine), "seconds": round(time.monotonic() - started, 1)}
        output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{record.get('seconds', 0):6.1f} s  {step.name:20} {record['state']}", flush=True)
    return result


def main(cli: list[str] | None = None) -> int:
    """Run the command; exit code 1 when a step that could run did not succeed."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description="Measure on one GPU what docs/gpu.md shows.")
    parser.add_argument("--output", type=Path, default=Path("build/gpu.json"), help="default: build/gpu.json")
    parser.add_argument("--cpu", action="store_true", help="small sizes without a GPU, as where there is none")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="budget of all steps (default: 8)")
    options = parser.parse_args(cli)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step that runs is ended too
    options.output.parent.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if step.name in options.only]
    with tempfile.TemporaryDirectory(prefix="anyexperts-gpu-", ignore_cleanup_errors=True) as folder:
        seconds = 60 * options.minutes - MARGIN
        result = measure_all(steps, Path(folder), options.output, seconds, options.cpu)
    print(f"{options.output} written after {result['seconds']:.0f} s")
    return int(any(step["state"] in ("failed", "timed out", "no time left") for step in result["steps"]))


if __name__ == "__main__":
    raise SystemExit(main())
