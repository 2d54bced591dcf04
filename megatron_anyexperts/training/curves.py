"""TensorBoard curves: grouped, with the configuration as the one text, and no reason to end a run on a full disk."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from typing import Any

from megatron.training import global_vars

from megatron_anyexperts.platform.seams import replace
from megatron_anyexperts.survival.lost_writes import LostWrites
from megatron_anyexperts.training import run_config
from megatron_anyexperts.training.arguments import switches
from megatron_anyexperts.training.curve_names import grouped

_RETRY_S = 30.0


class Curves:
    """A SummaryWriter that counts the values it loses, and opens a new event file once the disk takes writes again.

    TensorBoard's own writer fails for good at the first error: its thread ends, and every later call raises.

    Args:
        folder: of the event files.
        max_queue: values that may wait for the writer's thread.
    """

    def __init__(self, folder: str, max_queue: int):
        self._folder, self._max_queue = folder, max_queue
        self._losses = LostWrites(f"TensorBoard in {folder}")
        self._writer: Any = None
        self._error, self._open_at = OSError(), 0.0

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name)

    def add_scalar(self, tag: str, *arguments: Any, **keywords: Any) -> None:
        """As SummaryWriter's, under the name that `grouped` gives."""
        self._call("add_scalar", grouped(tag), *arguments, **keywords)

    def add_text(self, *_arguments: Any, **_keywords: Any) -> None:
        """Nothing: Megatron writes one text for each of its 900 arguments here."""

    def add_configuration(self, text: str) -> None:
        """Show a YAML text under TEXT."""
        self._call("add_text", "configuration", f"```yaml\n{text}```")

    def _call(self, name: str, *arguments: Any, **keywords: Any) -> None:
        try:
            if self._writer is None:
                self._open()
            getattr(self._writer, name)(*arguments, **keywords)
        except OSError as error:
            self._writer, self._error = None, error
            self._losses.lost(error)

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if time.monotonic() < self._open_at:
            raise self._error
        self._open_at = time.monotonic() + _RETRY_S
        os.makedirs(self._folder, exist_ok=True)
        # TensorBoard's thread would print a traceback when its first record cannot be written.
        with tempfile.TemporaryFile(dir=self._folder) as probe:
            probe.write(bytes(1 << 16))
        self._writer = SummaryWriter(log_dir=self._folder, max_queue=self._max_queue)
        self._losses.wrote()


def install(args: argparse.Namespace) -> None:
    """Give Megatron's loop these curves on the last rank, where it writes them."""
    if args.tensorboard_dir and args.rank == args.world_size - 1:
        curves = Curves(args.tensorboard_dir, args.tensorboard_queue_size)
        curves.add_configuration(run_config.text(sys.argv[1:], switches()))
        replace(global_vars.__name__, "_GLOBAL_TENSORBOARD_WRITER", curves)
