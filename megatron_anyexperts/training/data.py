"""Gives Megatron the training and validation microbatches of this rank."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.energon import WorkerConfig
from megatron.training import get_args

from megatron_anyexperts.data.blend import open_blend
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.loader import MicrobatchLoader
from megatron_anyexperts.data.mixture_schedule import MixtureSchedule
from megatron_anyexperts.data.scheduled_blend import mixture_of
from megatron_anyexperts.data.validation import ValidationLoader
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.checkpoints import Checkpoints
from megatron_anyexperts.training.comparison import starting_point
from megatron_anyexperts.training.step_stats import SampleLog, StepStats, forget_after


class DataProvider:
    """Callable with the signature of Megatron's dataset provider, for ``--dataloader-type external``.

    Every pipeline stage reads the same microbatches, because routers on all of them need to know which tokens are
    padding and of which modality; tensor-parallel rank 0 reads for its group. So does every context-parallel
    rank, which keeps its part of each.

    Args:
        checkpoints: restores and saves the position in the training data.
        stats: gets the sample log.
        begin: called on every rank once all is there.
    """

    is_distributed = True  # the loaders below know their data-parallel rank

    def __init__(self, checkpoints: Checkpoints, stats: StepStats, begin: Callable[[], None]):
        self.checkpoints = checkpoints
        self.stats = stats
        self.begin = begin

    def __call__(self, _num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """Return the training and validation iterators of this rank; None where another rank reads."""
        args = get_args()
        reads = mpu.get_tensor_model_parallel_rank() == 0
        train, valid = self._loaders(args) if reads else (None, None)
        # The last tensor-parallel rank reports the held-out losses, and it does not read.
        known = [valid.modalities if valid else self.stats.held_out_modalities]
        torch.distributed.broadcast_object_list(
            known, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group()
        )
        self.stats.held_out_modalities = known[0]
        if vp_stage in (None, 0):
            self.begin()
        return train, valid, None

    def _loaders(self, args: argparse.Namespace) -> tuple[MicrobatchLoader | None, ValidationLoader | None]:
        common = data_settings(args)
        train = None
        if not args.skip_train:
            batch = {"micro_batch_size": args.micro_batch_size, "rows_per_step": rows_per_step(args)}
            train = MicrobatchLoader(**common, **batch, seed=args.seed, announces=args.rank == 0)
            self.checkpoints.restore_data(train)
            if reads_for_the_record():
                self.stats.ledger = train.ledger
            if args.data_mixture_schedule is not None:
                check_length(train.schedule, args, args.iteration, args.consumed_train_samples)
            self._open_sample_log(args)
        valid = None
        if args.eval_iters:
            rows = args.eval_micro_batch_size * common["dp_size"]
            steps = args.eval_iters * (args.eval_global_batch_size // rows)
            valid = ValidationLoader(**common, micro_batch_size=args.eval_micro_batch_size, microbatches=steps)
        return train, valid

    def _open_sample_log(self, args: argparse.Namespace) -> None:
        if not (args.log_sample_keys and args.run_dir and reads_for_the_record()):
            return
        folder = Run(Path(args.run_dir)).samples
        group, rank = mpu.get_data_parallel_group(), mpu.get_data_parallel_rank()
        if rank == 0:
            forget_after(folder, args.iteration)
        torch.distributed.barrier(group=group)
        self.stats.sample_log = SampleLog(folder, rank)


def reads_for_the_record() -> bool:
    """Whether this is the one rank of those that read the same microbatches that says what it read."""
    return mpu.is_pipeline_first_stage(ignore_virtual=True) and mpu.get_context_parallel_rank() == 0


def data_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that the training and the validation loader of this rank share."""
    return {
        "blend": blend_file(args.data_path),
        "config": data_config(args),
        "shape": MediaShape.from_args(args),
        "tokenizer": args.tokenizer_model,
        "seq_length": args.seq_length,
        "dp_rank": mpu.get_data_parallel_rank(),
        "dp_size": mpu.get_data_parallel_world_size(),
        "quarantine": Run(Path(args.run_dir)).quarantine if args.run_dir else None,
    }


def check_mixture(args: argparse.Namespace) -> None:
    """Refuse a mixture schedule that does not fit blend, batch and length, before any rank waits.

    Raises:
        MixtureScheduleError: see `load_schedule`.
    """
    if args.data_mixture_schedule is None:
        return
    config = data_config(args)
    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    blend = open_blend(blend_file(args.data_path), "train", config, alone)
    schedule = mixture_of(blend, config, args.micro_batch_size, rows_per_step(args))
    start = starting_point(args)
    if start is None or not start.resumed:  # of a resumed run, the checkpoint says how many rows were trained
        check_length(schedule, args, 0, 0)


def check_length(schedule: MixtureSchedule, args: argparse.Namespace, iteration: int, rows: int) -> None:
    """Refuse a mixture schedule with stages behind the end of a run that has trained `rows` rows in `iteration` steps.

    Raises:
        MixtureScheduleError: see `MixtureSchedule.check_ends`.
    """
    whole = args.train_samples or rows + (args.train_iters - iteration) * args.global_batch_size
    schedule.check_ends(whole, args.micro_batch_size * args.data_streams)


def rows_per_step(args: argparse.Namespace) -> int | None:
    """The global batch size; None when it changes during the run."""
    return None if args.step_batch_size_schedule else args.global_batch_size


def data_config(args: argparse.Namespace) -> DataConfig:
    """The settings of the data feed."""
    return DataConfig(**{field.name: getattr(args, field.name) for field in fields(DataConfig)})


def blend_file(data_path: list[str] | None) -> str:
    """The one blend file, local or ``msc://``, that ``--data-path`` names.

    Raises:
        ValueError: none or several are given.
    """
    if not data_path or len(data_path) != 1:
        raise ValueError(f"--data-path={data_path}: name one Energon blend, such as SHARDS/blend.yaml")
    return data_path[0]
