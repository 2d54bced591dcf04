"""A mixture that changes during a run: which weight each dataset of a blend has at which point of its stream.

    stages:                     # FILE.yaml of --data-mixture-schedule; before the first stage the blend's weights count
      - {at_step: 60000, weights: {web: 0.5, books/text: 0.5}}
      - {at_step: 70000, over: 2000, weights: {books/text: 1.0}}     # moves there linearly during 2000 steps

A stage begins at a step, or at a row of the run (`at_row`) where the batch size changes. Weights are probabilities of
samples, by corpus, corpus/kind or kind; what a stage does not name has weight 0 and keeps its place until it is named
again. What counts is when a sample is *drawn*: it reaches training behind the stream's shuffle and packing buffers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from megatron_anyexperts import described
from megatron_anyexperts.data.faults import DataFeedError

LEAST_WEIGHT = 2.0**-24
"""Energon (7.4.1) draws in float32, whose random numbers have this step: a smaller weight may never be drawn."""


class MixtureScheduleError(DataFeedError):
    """A schedule cannot be used; the message says what to change."""


class _Stage(described.Section):
    at_step: int | None = Field(None, ge=0)
    at_row: int | None = Field(None, ge=0)
    over: int = Field(0, ge=0)
    weights: dict[str, float] = Field(min_length=1)


class _File(described.Section):
    stages: list[_Stage] = Field(min_length=1)


@dataclass(frozen=True)
class MixtureSchedule:
    """Weights by position in a stream, in microbatches (rounds) that it has emitted.

    Attributes:
        names: of the datasets of the blend.
        starts: round at which each stage begins; the first is 0, then rising.
        ramps: rounds during which the weights move to those of the stage; they end before the next one begins.
        weights: of each stage, one for each dataset, adding up to 1.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]
    ramps: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    def stage_at(self, rounds: int) -> int:
        """Index of the stage in which a stream that has emitted `rounds` microbatches draws."""
        return sum(start <= rounds for start in self.starts) - 1

    def weights_at(self, rounds: int) -> tuple[float, ...]:
        """Weights, adding up to 1, with which a stream draws that has emitted `rounds` microbatches."""
        stage = self.stage_at(rounds)
        passed = rounds - self.starts[stage]
        if passed >= self.ramps[stage]:
            return self.weights[stage]
        share = passed / self.ramps[stage]
        pairs = zip(self.weights[stage - 1], self.weights[stage], strict=True)
        return tuple(before + share * (after - before) for before, after in pairs)

    def stages(self) -> list[list[Any]]:
        """Round, rounds to reach it, and weights of each stage, as plain values for a checkpoint."""
        return [list(stage) for stage in zip(self.starts, self.ramps, map(list, self.weights), strict=True)]

    def check_continues(self, saved: list[list[Any]], rounds: int) -> bool:
        """Whether stages to come are others than when a run was saved whose streams had emitted `rounds` microbatches.

        Args:
            saved: `stages` of the schedule then.

        Raises:
            ValueError: stages that had begun are others.
        """
        now = self.stages()
        then, past = ([stage for stage in each if stage[0] < max(rounds, 1)] for each in (saved, now))
        if then != past:
            raise ValueError(
                f"stages of the mixture schedule that have begun are others than in the checkpoint: {then} then, "
                f"{past} now (each: round, rounds to reach it, weights); restore them, stages to come may change"
            )
        return saved != now

    def check_ends(self, rows: int, round_rows: int) -> None:
        """Refuse stages that a run does not reach.

        Args:
            rows: that the whole run trains.
            round_rows: rows of one microbatch of each stream.

        Raises:
            MixtureScheduleError: names the stage.
        """
        for stage, (start, ramp) in enumerate(zip(self.starts, self.ramps, strict=True), 1):
            reached = (start + ramp) * round_rows
            if start * round_rows >= rows or reached > rows:
                raise MixtureScheduleError(
                    f"mixture stage {stage} of {len(self.starts)} begins at row {start * round_rows} and is reached at "
                    f"row {reached}, but training ends with row {rows}: train longer, or leave it out"
                )

    def describe(self, stage: int) -> str:
        """The weights of a stage as text."""
        pairs = zip(self.names, self.weights[stage], strict=True)
        return ", ".join(f"{name} {weight:.4g}" for name, weight in pairs if weight)


def constant(names: Sequence[str], weights: Sequence[float]) -> MixtureSchedule:
    """The schedule of a blend that stays as it is.

    Raises:
        MixtureScheduleError: a weight is negative or no number, or none can be drawn.
    """
    try:
        return MixtureSchedule(tuple(names), (0,), (0,), (_normalised(names, weights),))
    except ValueError as error:
        raise MixtureScheduleError(f"the blend: {error}") from None


def _normalised(names: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that add up to 1.

    Raises:
        ValueError: one is negative, no number, or too small to be drawn; or all are zero.
    """
    for name, weight in zip(names, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights: {name}={weight:g} is negative or no number; use 0 or more")
    whole = sum(weights)
    if not 0 < whole < math.inf:
        raise ValueError(f"weights {dict(zip(names, weights, strict=True))} add up to {whole:g}; use some above 0")
    result = tuple(weight / whole for weight in weights)
    for name, given, weight in zip(names, weights, result, strict=True):
        if given and weight < LEAST_WEIGHT:
            raise ValueError(
                f"weights: {name} has {weight:.3g} of the whole, but draws resolve {LEAST_WEIGHT:.3g}; use more, or 0"
            )
    return result


def load_schedule(
    path: str | Path, names: Sequence[str], weights: Sequence[float], round_rows: int, rows_per_step: int | None
) -> MixtureSchedule:
    """Read a schedule for a blend.

    Args:
        path: YAML file.
        names: of the blend's datasets, each `kind` or `corpus/kind`.
        weights: of the blend's datasets.
        round_rows: rows of one microbatch of each stream.
        rows_per_step: global batch size; None when it changes during the run.

    Raises:
        MixtureScheduleError: the file cannot be read, or a stage cannot be carried out.
    """
    try:
        document = described.load(Path(path).read_text(encoding="utf-8"))
        stages = _File.model_validate(document).stages
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MixtureScheduleError(f"{path}: cannot read it: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise MixtureScheduleError(f"{path}: {place}={first['input']!r}: {first['msg']}") from None
    try:
        return _resolve(stages, constant(names, weights), round_rows, rows_per_step)
    except ValueError as error:
        raise MixtureScheduleError(f"{path}: {error}") from None


def _resolve(
    stages: list[_Stage], before: MixtureSchedule, round_rows: int, rows_per_step: int | None
) -> MixtureSchedule:
    starts, ramps, rows = [], [], []
    for stage in stages:
        unit = _unit(stage, rows_per_step)
        for name, value in (("at", stage.at_step if stage.at_row is None else stage.at_row), ("over", stage.over)):
            if value * unit % round_rows:
                raise ValueError(
                    f"{name}={value} is row {value * unit}, no multiple of the {round_rows} rows that one microbatch "
                    "of every stream has (micro batch size x data streams)"
                )
        starts.append((stage.at_step if stage.at_row is None else stage.at_row) * unit // round_rows)
        ramps.append(stage.over * unit // round_rows)
        rows.append(_by_dataset(stage.weights, before.names, before.weights[0]))
    if starts[0] > 0:
        starts, ramps, rows = [0, *starts], [0, *ramps], [before.weights[0], *rows]
    elif ramps[0]:
        raise ValueError("the first stage begins at 0 with `over`: there is nothing before from where to move")
    for index, (first, second) in enumerate(itertools.pairwise(starts)):
        if second <= first or second < first + ramps[index]:
            raise ValueError(
                f"a stage begins at row {second * round_rows}, and the one before, which begins at row "
                f"{first * round_rows}, is reached {ramps[index] * round_rows} rows later; let them follow each other"
            )
    return MixtureSchedule(before.names, tuple(starts), tuple(ramps), tuple(rows))


def _unit(stage: _Stage, rows_per_step: int | None) -> int:
    if (stage.at_step is None) == (stage.at_row is None):
        raise ValueError("each stage begins either `at_step` or `at_row`")
    if stage.at_row is not None:
        return 1
    if rows_per_step is None:
        raise ValueError("the batch size changes during the run, so a step is no place in the data: use `at_row`")
    return rows_per_step


def _by_dataset(given: dict[str, float], names: tuple[str, ...], shares: tuple[float, ...]) -> tuple[float, ...]:
    """Weights of the datasets, adding up to 1; those of one corpus divide its weight as the blend's weights do."""
    result = [0.0] * len(names)
    for key, weight in given.items():
        chosen = [index for index, name in enumerate(names) if name == key or name.partition("/")[0] == key]
        if not chosen:
            raise ValueError(f"weights: {key!r} is no dataset of the blend; it has {', '.join(sorted(set(names)))}")
        if weight < 0:  # before it is added to that of another key
            raise ValueError(f"weights: {key}={weight} is negative; use 0 or more")
        total = sum(shares[index] for index in chosen)
        for index in chosen:
            result[index] += weight * (shares[index] / total if total else 1 / len(chosen))
    return _normalised(names, result)


def dataset_name(subflavors: dict[str, Any]) -> str:
    """Name of a blend's dataset: its kind, behind its corpus if the blend says it."""
    kind, corpus = str(subflavors.get("kind")), subflavors.get("corpus")
    return f"{corpus}/{kind}" if corpus else kind
