"""The lines that a person follows a training by, and a bar where standard error is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from megatron_anyexperts.console import Filtered, say


def losses(figures: Mapping[str, float]) -> str:
    """``loss 5.12 (text 4.98, image 5.40)`` from ``loss`` and ``loss_<modality>``; "" without any."""
    if "loss" not in figures:
        return ""
    parts = [f"{name.removeprefix('loss_')} {value:.3f}" for name, value in figures.items() if name[:5] == "loss_"]
    return f"loss {figures['loss']:.3f}" + (f" ({', '.join(parts)})" if parts else "")


def span(seconds: float) -> str:
    """A time to wait, in its largest two units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def step_line(
    iteration: int, total: int, figures: Mapping[str, float], routing: Mapping[str, Any], rate: float | None, left: str
) -> str:
    """One log interval in one line.

    Args:
        iteration: the interval's last step.
        total: steps of the whole run.
        figures: losses and throughput, under their names in ``metrics.jsonl``.
        routing: summary of the interval's routing.
        rate: learning rate of the last step.
        left: time to the end; "" if unknown.
    """
    parts = [f"step {iteration}/{total}", losses(figures)]
    if "all" in routing:
        parts.append(f"slots {routing['all']['slots']:.2f}, real {routing['all']['real']:.2f} per token")
    if "tokens_per_s" in figures:
        parts.append(f"{figures['tokens_per_s']:,.0f} tokens/s")
    if rate is not None:
        parts.append(f"lr {rate:.2e}")
    if figures.get("samples_lost"):
        parts.append(f"{figures['samples_lost']} samples lost")
    if left:
        parts.append(f"ETA {left}")
    return " | ".join(filter(None, parts))


class Progress:
    """Follows the steps of one process's training; only one rank has one.

    Args:
        iteration: last step of the checkpoint, 0 without one.
        total: steps of the whole run.
    """

    def __init__(self, iteration: int, total: int):
        self._total = total
        self._first: tuple[int, float] | None = None
        stream = sys.stderr.screen if isinstance(sys.stderr, Filtered) else sys.stderr
        hidden = not stream.isatty()
        self._bar = tqdm(total=total, initial=iteration, file=stream, disable=hidden, leave=False, unit="step")

    def step(self, iteration: int) -> None:
        """Note that a step is over. The first after a start is no measure of the others."""
        if self._first is None:
            self._first = iteration, time.monotonic()
        self._bar.update(iteration - self._bar.n)

    def left(self, iteration: int) -> str:
        """Time to the end at the pace since the first step, evaluations and saves included; "" while unknown."""
        if self._first is None or iteration <= self._first[0]:
            return ""
        pace = (time.monotonic() - self._first[1]) / (iteration - self._first[0])
        return span(pace * (self._total - iteration))

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.clear()
        say(line)
        self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
