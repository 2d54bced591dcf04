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

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def live_with_parent() -> None:
    """Call it first thing in a helper that multiprocessing forked: it ignores SIGTERM and dies with its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the call above
        os._exit(1)
