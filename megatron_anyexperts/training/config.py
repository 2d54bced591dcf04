"""Flags of a training run that neither Megatron nor the other groups declare."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from megatron_anyexperts.survival.run_directory import Run


@dataclass
class RunConfig:
    """Where a run keeps its files, and how its checkpoints are kept."""

    run_dir: str | None = None
    """Directory of the run: checkpoints, TensorBoard curves, logs and sample keys go below it. Sets --save, --load
    and --tensorboard-dir where they are not given."""

    verbose: bool = False
    """Print all of Megatron's lines, which the files RUN_DIR/logs/output hold in any case."""

    log_sample_keys: bool = False
    """Write the keys of the samples of every training step to RUN_DIR/samples, one JSON line per step and
    data-parallel rank."""

    keep_last_checkpoints: int = 3
    """Number of newest checkpoints that are kept; older ones are deleted after a verified save. 0 keeps all."""

    keep_every_checkpoint: int = 0
    """Checkpoints whose iteration is a multiple of this are never deleted. 0: no such exception."""

    max_failed_saves: int = 3
    """Failed saves in a row after which the run stops (exit code 3) instead of training on without a checkpoint. 0
    trains on however many fail."""

    peak_tflops_per_gpu: float | None = None
    """Dense bf16 peak of a GPU in TFLOP/s, of which the logged `mfu` is a share. None: that of a known GPU; without one
    no `mfu` is logged."""

    change_schedule: bool = False
    """On resume: go on with the length, learning rates, weight decay and batch size of this command line where they
    differ from the checkpoint's. The rate at an iteration is then what these flags give at that iteration."""

    accept_change: list[str] = field(default_factory=list)
    """Names of flags that may differ from the checkpoint's although its weights were trained for another value, such
    as rotary-base."""

    def __post_init__(self):
        if self.peak_tflops_per_gpu is not None and not self.peak_tflops_per_gpu > 0:
            raise ValueError(f"--peak-tflops-per-gpu={self.peak_tflops_per_gpu} must be above 0, such as 989.4")
        for name in ("keep_last_checkpoints", "keep_every_checkpoint", "max_failed_saves"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)} is negative; use 0 or more")


@dataclass
class TraceConfig:
    """Which tokens leave a trace of their routing, and how much of it."""

    anyexperts_trace_every: int = 0
    """Trace the routing of the steps that this divides into RUN_DIR/traces/training. 0: no trace."""

    anyexperts_trace_positions: int = 64
    """Positions of each row that are traced, the same at every step, spread over the row."""

    anyexperts_trace_megabytes: int = 256
    """MiB that a rank may write; a rank that has reached it traces no further step."""

    def __post_init__(self):
        if self.anyexperts_trace_every < 0:
            raise ValueError(f"--anyexperts-trace-every={self.anyexperts_trace_every} is negative; use 0 or more")
        for name in ("anyexperts_trace_positions", "anyexperts_trace_megabytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)} is below 1")


def refuse_trace(args: argparse.Namespace) -> None:
    """Refuse a trace that could not be written.

    Raises:
        ValueError: the way out is in the message.
    """
    if not args.anyexperts_trace_every:
        return
    asked = f"--anyexperts-trace-every={args.anyexperts_trace_every}"
    if args.run_dir is None:
        raise ValueError(f"{asked} needs --run-dir, below which traces are written")
    if args.context_parallel_size > 1:
        raise ValueError(
            f"{asked} with --context-parallel-size={args.context_parallel_size}: positions of rows that are cut are "
            "not traced; leave one of them out"
        )
    if args.anyexperts_stock_moe:
        raise ValueError(
            f"{asked} sees nothing of --anyexperts-stock-moe; for Megatron's own top-k leave that out and set "
            "anyexperts-k-min and anyexperts-k-max to the top-k, anyexperts-rho-max and anyexperts-alpha to 0"
        )


def apply_run_dir(args: argparse.Namespace) -> None:
    """Derive Megatron's directories from ``--run-dir`` where the user did not give them.

    What is saved is also what a later start goes on from, with a run directory or without.
    """
    if args.run_dir is not None:
        run = Run(Path(args.run_dir))
        args.save = args.save or str(run.checkpoints)
        args.tensorboard_dir = args.tensorboard_dir or str(run.tensorboard)
    args.load = args.load or args.save
