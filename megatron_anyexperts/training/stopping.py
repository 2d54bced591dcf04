"""Signals that end a training early: the run saves at the next step boundary, the same on all ranks, and ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from typing import Any

from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_anyexperts.platform.seams import replace
from megatron_anyexperts.survival.signals import STOP_SIGNALS


class StopSignals(DistributedSignalHandler):
    """Takes the place of Megatron's handler of the one signal `--exit-signal`, and is asked in the same way.

    Handles SIGTERM, SIGHUP, Ctrl-C and `--exit-signal`. After a Ctrl-C each of them kills at once: a second Ctrl-C
    comes as it is, or from torchrun as SIGTERM.

    Args:
        exit_signal: Megatron's `--exit-signal`.
        notice: what to print, once, when the first arrives; "" on ranks that keep silent.
    """

    def __init__(self, exit_signal: signal.Signals, notice: str):
        super().__init__(exit_signal)
        self._notice = notice
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._signal_received, self.released = False, False
        for each in {*STOP_SIGNALS, signal.SIGINT, self.sig}:
            if signal.getsignal(each) is not signal.SIG_IGN:  # nohup and the background of a shell stay as they are
                self._previous[each] = signal.signal(each, self._handle)
        return self

    def release(self) -> bool:
        """Give the signals back; False when that was done before."""
        if self.released:
            return False
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        self.released = True
        return True

    def _handle(self, number: int, _frame: Any) -> None:
        if not self._signal_received and self._notice:
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            with contextlib.suppress(OSError):  # not `print`, which the signal may have interrupted
                os.write(2, f"{name}: {self._notice}\n".encode())
        self._signal_received = True
        if number == signal.SIGINT:
            for each in self._previous:
                signal.signal(each, signal.SIG_DFL)


def install(args: argparse.Namespace) -> None:
    """Make Megatron's loop heed these signals, whatever `--exit-signal-handler` says."""
    notice = ""
    if args.rank == 0:
        saving = "saving at the next step boundary, then ending" if args.save else "ending, without a --save directory"
        patience = " (torchrun kills after its --shutdown-timeout, 30 s)" if "TORCHELASTIC_RUN_ID" in os.environ else ""
        notice = f"{saving}{patience}; Ctrl-C again kills at once, what is not saved is lost"
    before = global_vars._GLOBAL_SIGNAL_HANDLER
    handler = StopSignals(args.exit_signal, notice).__enter__()
    if before is not None and before._signal_received:
        handler._signal_received = True
    args.exit_signal_handler = True
    replace(global_vars.__name__, "_GLOBAL_SIGNAL_HANDLER", handler)
