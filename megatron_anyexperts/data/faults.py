"""Counts what the feed loses, and turns too much loss into a clear stop."""

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

from megatron_anyexperts.data.samples import SampleError

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


class Quarantine:
    """Samples that killed a decoder, by key and stage; they are skipped at that stage, so that nothing else changes.

    Args:
        path: file of JSON lines, which the ranks of a run and its restarts share; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._listed = self._read()

    def _read(self) -> set[tuple[str, str]]:
        if self._path is None or not self._path.is_file():
            return set()
        lines = [json.loads(line) for line in self._path.read_text().splitlines()]
        return {(line["key"], line["stage"]) for line in lines}

    def check(self, key: str, stage: str) -> None:
        """Refuse a sample that is listed.

        Raises:
            SampleError: it is.
        """
        if (key, stage) in self._listed:
            raise SampleError(f"in quarantine: it killed a decoder before (listed in {self._path})")

    def add(self, key: str, stage: str, reason: str) -> None:
        """List a sample."""
        self._listed.add((key, stage))
        # Ranks that read the same samples find the same ones.
        if self._path is None or (key, stage) in self._read():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab", buffering=0) as file:
            file.write(json.dumps({"key": key, "stage": stage, "reason": reason}).encode() + b"\n")
