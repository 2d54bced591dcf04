"""A trained model in one process, for evaluation, pictures and generation: no optimizer, no training data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_anyexperts import console
from megatron_anyexperts.platform import cpu, torch_checkpoint
from megatron_anyexperts.survival.manifest import tracked_checkpoint
from megatron_anyexperts.survival.signing import signing_key
from megatron_anyexperts.training.arguments import UsageError, be_a_rank, parse
from megatron_anyexperts.training.comparison import RunSettings
from megatron_anyexperts.training.pretrain import DEFAULTS, check, model_provider, transformer_config
from megatron_anyexperts.training.resume import CheckpointError, check_foreign
from megatron_anyexperts.training.run_config import TRAINING_ONLY
from megatron_anyexperts.training.usage import reason


def start(cli: list[str], defaults: Mapping[str, Any] = DEFAULTS) -> argparse.Namespace:
    """Initialise Megatron from an entry point's command line; started by hand, the process is a group of one,
    so the configuration must not ask for more ranks.

    Args:
        cli: command-line words, which may contain ``--config``.
        defaults: flag defaults of the entry point.

    Raises:
        UsageError: the command line cannot be carried out.
    """
    cpu.bridge(training=True)
    torch_checkpoint.install()
    be_a_rank()
    try:
        signing_key()
        args = parse(cli, defaults, drop=TRAINING_ONLY)
        check(args)
        if args.context_parallel_size > 1:
            raise UsageError(
                f"--context-parallel-size={args.context_parallel_size}: a trained model is asked with whole rows; pass "
                "--context-parallel-size 1, which reads the same checkpoints"
            )
    except (ValueError, AssertionError) as error:
        raise UsageError(reason(error)) from error
    console.begin(args.verbose)
    from megatron.training.initialize import initialize_megatron

    initialize_megatron(allow_no_cuda=True)
    return args


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    """Build this rank's model and load the newest weights of ``--load`` (or ``--run-dir``) into it.

    Args:
        args: from `start`; routing flags may differ from those of training.

    Returns:
        the model in evaluation mode, without data-parallel wrapper.

    Raises:
        UsageError: there is no checkpoint, or it is of another model.
    """
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import get_loaded_iteration
    from megatron.training.training import get_model, load_checkpoint

    model = get_model(
        model_provider,
        ModelType.encoder_or_decoder,
        wrap_with_ddp=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    args.no_load_optim = args.no_load_rng = True
    args.exit_on_missing_checkpoint = False
    settings = RunSettings(args, transformer_config(args), own=False)
    settings.compare(args)
    if args.rank == 0 and settings.compared is not None:
        print(settings.compared, file=sys.stderr)
    if signing_key() is not None:
        # Without one, reading every byte of a checkpoint first would take longer than most questions to it.
        try:
            check_foreign(tracked_checkpoint(Path(args.load)), f"--load {args.load}")
        except (OSError, CheckpointError) as error:
            raise UsageError(str(error)) from error
    load_checkpoint(model, None, None)
    # What it returns is 0 both without a checkpoint and for weights without a training state (converted, upcycled).
    args.iteration = get_loaded_iteration()
    if args.iteration < 0:
        raise UsageError(f"no checkpoint in {args.load}; train first, or name a directory with --load")
    return model[0].eval()
