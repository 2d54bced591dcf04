"""Traces the routing of what is evaluated."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.core import mpu

from megatron_anyexperts import trace_file
from megatron_anyexperts.data.microbatch import Microbatch
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.training.pretrain import transformer_config
from megatron_anyexperts.training.trace import Tracer
from megatron_anyexperts.training.trace_writer import TraceWriter

_TOKENS_OF_A_PART = 1 << 14


@contextlib.contextmanager
def evaluation_tracer(args: argparse.Namespace, folder: Path | None, positions: int | None) -> Iterator[Tracer | None]:
    """The tracer of one evaluation, which is written when the block ends; None without a folder.

    Args:
        args: from `trained_model.start`, with a model loaded.
        folder: of the trace; new or empty.
        positions: of each row; None: all.

    Raises:
        UsageError: there is a trace in the folder.
    """
    if folder is None:
        yield None
        return
    if trace_file.is_trace(folder):
        raise UsageError(f"there is a routing trace in {folder}; name another folder, or remove it")
    if args.anyexperts_stock_moe:
        raise UsageError("a routing trace sees nothing of --anyexperts-stock-moe; leave it out")
    writer = TraceWriter(folder, args.rank, args.anyexperts_trace_megabytes << 20)
    most_slots = transformer_config(args).anyexperts_k_max
    first = mpu.get_tensor_model_parallel_rank() == 0
    try:
        tracer = Tracer(writer, 1, positions, most_slots, mpu.get_data_parallel_rank(), first, args.iteration)
        yield tracer
        tracer.end_part()
    finally:
        writer.close()


@contextlib.contextmanager
def traced(
    tracer: Tracer | None, batch: Microbatch, rows: int, tasks: Sequence[Sequence[str]] | None = None
) -> Iterator[None]:
    """Trace the forward pass inside, if there is a tracer.

    Args:
        tracer: of the evaluation.
        batch: what the pass reads.
        rows: its first rows that count.
        tasks: see `Tracer.microbatch`.
    """
    if tracer is None or not rows:
        yield
        return
    with tracer.microbatch(batch, tasks=tasks, rows=rows):
        yield
    if tracer.waiting_tokens >= _TOKENS_OF_A_PART:
        tracer.end_part()
