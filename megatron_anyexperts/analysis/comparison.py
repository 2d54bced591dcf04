"""Several runs side by side: figures at the same steps, and where their configurations differ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_anyexperts.analysis.run_record import Rows, RunRecord, number

ONE_RUN = ("run-dir",)
"""Flags in which runs differ by nature."""


def names(folders: list[Path]) -> list[str]:
    """Names that tell runs apart: their paths below the folder that all share.

    Args:
        folders: different ones.
    """
    resolved = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath(resolved))
    if shared in resolved:
        shared = shared.parent
    return [str(path.relative_to(shared)) for path in resolved]


def differences(configs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Flag to run to value, for flags in which any two runs differ; a run that does not give a flag is left out of it.

    Args:
        configs: flags by run.
    """
    flags = dict.fromkeys(flag for config in configs.values() for flag in config if flag not in ONE_RUN)
    found = {}
    for flag in flags:
        values = {run: config[flag] for run, config in configs.items() if flag in config}
        first = next(iter(values.values()))
        if len(values) < len(configs) or any(value != first for value in values.values()):
            found[flag] = values
    return found


def common_step(rows: list[Rows]) -> int | None:
    """The last iteration that all have a line of; None if there is none."""
    steps = [{row["iteration"] for row in each} for each in rows]
    return max(set.intersection(*steps), default=None) if steps else None


def at(rows: Rows, iteration: int | None, *path: str) -> float | None:
    """A figure of one iteration."""
    return next((number(row, *path) for row in rows if row["iteration"] == iteration), None)


def compare(records: Mapping[str, RunRecord]) -> dict[str, Any]:
    """Figures of each run, as JSON has them.

    Returns:
        ``common_step``, ``common_evaluation`` (iterations, or None), ``runs`` (name to `RunRecord.row`, with
        ``loss_at_common_step`` and ``held_out_loss_at_common_evaluation``), ``configuration`` (see `differences`).
    """
    step = common_step([record.metrics for record in records.values()])
    evaluation = common_step([record.held_out for record in records.values()])
    runs = {
        name: record.row()
        | {
            "loss_at_common_step": at(record.metrics, step, "loss"),
            "held_out_loss_at_common_evaluation": at(record.held_out, evaluation, "loss"),
        }
        for name, record in records.items()
    }
    return {
        "common_step": step,
        "common_evaluation": evaluation,
        "runs": runs,
        "configuration": differences({name: record.config for name, record in records.items()}),
    }
