"""What a run directory says about its run, read without torch and without trust."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_anyexperts import described
from megatron_anyexperts.survival import runlog, status
from megatron_anyexperts.survival.heartbeat import read_beats
from megatron_anyexperts.survival.run_directory import Run

Rows = list[dict[str, Any]]


class NoRun(ValueError):
    """A folder is not that of a run."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run has written about itself.

    Attributes:
        run: its directory.
        metrics, held_out: by iteration; see docs/metrics.md. Only the newest metrics have figures by layer.
        events: oldest first.
        config: flags of the newest start.
        versions: what carried them out, a line each.
        expert_load: layer number to each expert's load over the layer's mean, and the iteration it is of.
    """

    run: Run
    metrics: Rows
    held_out: Rows
    events: Rows
    config: dict[str, Any]
    versions: list[str]
    expert_load: tuple[int | None, dict[int, list[float]]]

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read a run directory.

        Raises:
            NoRun: it holds no log of a run.
        """
        run = Run(folder)
        if not is_run(folder):
            raise NoRun(f"{folder} is not a run: there is no {run.events.relative_to(folder)} in it")
        config, versions = _configuration(run.config)
        return cls(
            run,
            runlog.read_metrics(run, layers=False),
            runlog.read_held_out(run),
            runlog.read_events(run),
            config,
            versions,
            _expert_load(run.expert_load),
        )

    @property
    def targets(self) -> dict[str, float]:
        """Mean slots and mean real slots that the run was told to keep, where it was."""
        given = {name: self.config.get(f"anyexperts-target-{name}") for name in ("slots", "real")}
        return {name: float(value) for name, value in given.items() if _is_number(value)}

    @property
    def last(self) -> dict[str, Any]:
        """Figures of the newest log interval; empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def routing(self) -> dict[str, Any]:
        """Its part about routing; empty where there is none."""
        found = self.last.get("routing")
        return found if isinstance(found, dict) else {}

    def row(self, now: float | None = None) -> dict[str, Any]:
        """One line about the run; None for what is not known.

        Args:
            now: seconds since the epoch; the present by default.
        """
        now = time.time() if now is None else now
        starts = [event["time"] for event in self.events if _is_number(event.get("time"))]
        return {
            "state": status.state(self.events, read_beats(self.run), now),
            "step": number(self.last, "iteration"),
            "of": number(self.last, "train_iters"),
            "loss": number(self.last, "loss"),
            "held_out_loss": number(self.held_out[-1], "loss") if self.held_out else None,
            "slots": number(self.last, "routing", "all", "slots"),
            "real_slots": number(self.last, "routing", "all", "real"),
            "tokens_per_s": number(self.last, "tokens_per_s"),
            "load_max_over_mean": number(self.last, "load_max_over_mean"),
            "samples_lost": sum(series(self.metrics, "samples_lost")[1]),
            "started": starts[0] if starts else None,
            "restarts": status.restarts(self.events),
        }


def is_run(folder: Path) -> bool:
    """Whether a training has logged here."""
    return Run(folder).events.is_file() or Run(folder).metrics.is_file()


def find_runs(folder: Path) -> Iterator[Path]:
    """All run directories below a folder, itself included, by name; a run inside a run is not looked for.

    Raises:
        NoRun: there is no such folder.
    """
    if not folder.is_dir():
        raise NoRun(f"{folder} is not a folder")
    for root, names, _ in os.walk(folder):
        names.sort()
        if is_run(Path(root)):
            names.clear()
            yield Path(root)


def number(record: Any, *path: str) -> float | None:
    """A number inside a record, None where there is none."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record if _is_number(record) else None


def series(rows: Rows, *path: str) -> tuple[list[int], list[float]]:
    """Iterations that have a figure, and the figure."""
    points = [(row["iteration"], value) for row in rows if (value := number(row, *path)) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _configuration(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        read = described.load(text)
    except (OSError, yaml.YAMLError):  # of runs that logged before this file was written, or of a hand that edited it
        return {}, []
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    return read if isinstance(read, dict) else {}, comments[1:]  # the first one is the command line


def _expert_load(path: Path) -> tuple[int | None, dict[int, list[float]]]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        layers = {int(layer): [float(load) for load in experts] for layer, experts in read["layers"].items()}
        return int(read["iteration"]), {layer: experts for layer, experts in layers.items() if experts}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None, {}
