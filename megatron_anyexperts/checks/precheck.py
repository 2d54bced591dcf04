"""Checks a training command where nothing is trained, for the job that `slurm/submit` is about to queue.

    WORLD_SIZE=16 python -m megatron_anyexperts.checks.precheck pretrain|instruct_tune FLAG ...

Runs the checks with which training itself begins, as for a machine with a GPU, and opens blend and tokenizer. Exit code
2, with the message of training, when it would be refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings

from megatron_anyexperts.checks.doctor import as_if_complete


def open_data(args: argparse.Namespace) -> None:
    """Open tokenizer and blend as the loader does, without reading a sample.

    Raises:
        Exception: whatever the loader would raise.
    """
    from megatron.energon import WorkerConfig

    from megatron_anyexperts.data.blend import open_blend
    from megatron_anyexperts.data.vocabulary import Vocabulary
    from megatron_anyexperts.training.data import data_config

    Vocabulary(args.tokenizer_model)
    config = data_config(args)
    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    for split in ("train", "val") if args.eval_iters else ("train",):
        open_blend(args.data_path[0], split, config, alone)


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    kind, *flags = sys.argv[1:] if cli is None else cli
    # Profiles set the first for the ranks, and Megatron asserts it; the second keeps it from guessing.
    for name, value in (("CUDA_DEVICE_MAX_CONNECTIONS", "1"), ("RANK", "0")):
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron_anyexperts.training import instruct, pretrain
    from megatron_anyexperts.training.arguments import UsageError

    check = {"pretrain": pretrain.check, "instruct_tune": instruct.check}[kind]
    try:
        with contextlib.redirect_stdout(io.StringIO()), as_if_complete():
            args, _ = pretrain.prepare(flags, check=check)
            open_data(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # what the libraries raise for broken files is as various as the files
        print(f"error: data or tokenizer cannot be opened: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
