"""Makes a helper process of a rank live exactly as long as the rank.

Slurm signals every process of a step, not only the ranks: a helper that dies of SIGTERM takes with it the save that the
signal asks for. And a helper that outlives a killed rank keeps the step's output open, so that srun never returns.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a rank to save and end; schedulers, terminals and torchrun send them to its helpers as well."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(parent: int) -> None:
    """Call it first thing in a forked process: SIGKILL ends it as soon as its parent is dead.

    Args:
        parent: id of the process that forked this one, from a thread that lives as long: Linux sends the signal when
            that thread ends.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def live_with_parent() -> None:
    """Call it first thing in a helper that multiprocessing forked: it dies with its parent, and of no stop signal."""
    die_with_parent(multiprocessing.parent_process().pid)
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def end_on_interrupt() -> None:
    """Make Ctrl-C end this process without a traceback; for a program's start, while there is nothing to save."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
