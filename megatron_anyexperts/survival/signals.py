"""Keeps the helper processes of a rank alive while the rank answers SIGTERM by saving.

Slurm signals every process of a step, not only the ranks. A helper that dies of it takes the save with it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def helpers_ignore_sigterm() -> Iterator[None]:
    """Processes started inside this block ignore SIGTERM, forked and spawned ones alike. Main thread only."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
