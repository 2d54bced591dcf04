"""Checks every global batch size that a run will have, before it starts."""

from __future__ import annotations

import argparse

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_anyexperts.data.elastic import check_global_batch


def check(args: argparse.Namespace) -> None:
    """Refuse batch sizes by which a step would depend on the number of ranks, or at which training would end.

    With a schedule, evaluation takes the batch of its last stage unless told otherwise; Megatron's default would
    depend on the number of ranks, and the held-out set with it.

    Raises:
        ValueError: names the value, the limit and the way out.
    """
    if args.rampup_batch_size is not None:
        raise ValueError(
            f"--rampup-batch-size {' '.join(map(str, args.rampup_batch_size))}: Megatron-Core 0.19 ignores it; "
            'use --step-batch-size-schedule "TOKENS:BATCH TOKENS:BATCH ..." instead'
        )
    schedule = args.step_batch_size_schedule
    if schedule is None:
        check_global_batch(args.global_batch_size, args.micro_batch_size, args.data_streams)
        return
    if args.train_iters:
        raise ValueError(
            f'--step-batch-size-schedule "{schedule}" with --train-iters={args.train_iters}: Megatron would follow the '
            "learning rate as if every batch had the smallest size; give --train-samples, and warm-up and decay in "
            "samples, instead"
        )
    stages = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(schedule, args.seq_length)
    before = 0
    for _, size in stages:
        try:
            check_global_batch(size, args.micro_batch_size, args.data_streams)
        except ValueError as error:
            raise ValueError(f'--step-batch-size-schedule "{schedule}": {error}') from error
        if size < before:
            raise ValueError(
                f'--step-batch-size-schedule "{schedule}": a batch of {size} follows one of {before}, and Megatron '
                "ends training where batches become smaller; let them grow"
            )
        before = size
    if args.eval_global_batch_size == args.global_batch_size:
        args.eval_global_batch_size = before
