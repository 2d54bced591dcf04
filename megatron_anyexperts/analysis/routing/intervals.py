"""How certain a figure is, and what it would be by chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS, NULL_DRAWS = 200, 40
"""Bootstrap samples; draws of a baseline, which cost more."""


@dataclass(frozen=True)
class Measured:
    """A figure beside its interval and what it is without the effect that it measures.

    Attributes:
        value: the figure.
        low, high: 95 % interval by bootstrap over samples, whose tokens are not independent; NaN where there is none.
        null, null_low, null_high: mean and 95 % range of the baseline.
        baseline: which one.
    """

    value: float
    low: float
    high: float
    null: float
    null_low: float
    null_high: float
    baseline: str

    @property
    def stands_out(self) -> bool:
        """Whether the figure lies outside the baseline's range."""
        return not self.null_low <= self.value <= self.null_high


def bounds(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of values; NaN of none."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)


def measured(
    figure: Callable[[np.ndarray], float],
    samples: int,
    nulls: Iterable[float],
    baseline: str,
    seed: int = 0,
) -> Measured:
    """Measure a figure and resample it over samples.

    Args:
        figure: of samples given by number [P], repeated ones counting as often as they stand there.
        samples: how many there are; with one there is no interval.
        nulls: the figure in draws of the baseline.
        baseline: its name.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    resampled = [figure(generator.integers(0, samples, samples)) for _ in range(DRAWS)] if samples > 1 else []
    return summed_up(float(figure(np.arange(samples))), resampled, nulls, baseline)


def summed_up(value: float, resampled: Iterable[float], nulls: Iterable[float], baseline: str) -> Measured:
    """The figure with the range of its resampled values and of its baseline's draws."""
    drawn = np.array([*nulls], float)
    known = drawn[np.isfinite(drawn)]
    null = float(known.mean()) if len(known) else float("nan")
    return Measured(value, *bounds(np.array([*resampled])), null, *bounds(drawn), baseline)
