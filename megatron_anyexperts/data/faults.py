"""Counts what the feed loses, and turns too much loss into a clear stop."""

import logging
import multiprocessing
from typing import Any

logger = logging.getLogger(__name__)


class DataFeedError(RuntimeError):
    """The feed cannot go on; the message says why and what to do."""


class ErrorBudgetExceeded(DataFeedError):
    """More samples were lost than the run tolerates."""


def over_budget(lost: int, seen: int, budget: int, rate: float, rate_from: int = 1000) -> str | None:
    """The reason to stop, or None.

    Args:
        lost: samples lost to errors and rejections.
        seen: samples read, lost ones included.
        budget: lost samples that are tolerated.
        rate: share of lost samples that is tolerated once `rate_from` samples were read.
    """
    if lost > budget:
        return f"{lost} samples lost, more than data_error_budget={budget}"
    if seen >= rate_from and lost > rate * seen:
        return f"{lost} of {seen} samples lost ({lost / seen:.1%}), more than data_error_rate={rate:.1%}"
    return None


class FaultLedger:
    """Counters that all worker processes of a rank share, and the handler that Energon calls on a bad sample.

    Create it before the workers are forked.
    """

    def __init__(self, budget: int, rate: float) -> None:
        self._budget, self._rate = budget, rate
        context = multiprocessing.get_context("fork")
        self._lock = context.Lock()
        self._seen = context.Value("q", 0, lock=False)
        self._lost = context.Value("q", 0, lock=False)

    @property
    def seen(self) -> int:
        """Samples read since the start, lost ones included."""
        return self._seen.value

    @property
    def lost(self) -> int:
        """Samples lost since the start."""
        return self._lost.value

    def count_sample(self) -> None:
        """Count one sample that was cooked."""
        with self._lock:
            self._seen.value += 1

    def handle(self, error: Exception, sample: Any, sources: list | None = None) -> None:
        """Log one lost sample with its key and place, and count it.

        Raises:
            ErrorBudgetExceeded: the budget is spent; this ends the run.
        """
        key = sample.get("__key__") if isinstance(sample, dict) else getattr(sample, "__key__", None)
        place = ", ".join(f"{source.dataset_path}/{source.shard_name}" for source in sources or ())
        logger.warning("lost sample %s (%s): %s: %s", key, place, type(error).__name__, error)
        with self._lock:
            self._lost.value += 1
            lost, seen = self._lost.value, max(self._seen.value, self._lost.value)
        if reason := over_budget(lost, seen, self._budget, self._rate):
            raise ErrorBudgetExceeded(
                f"{reason}; the last one was {key} ({place}): {error}. Check the shards with "
                "data_tools/verify_shards.py, or raise the limit if the loss is acceptable"
            )
