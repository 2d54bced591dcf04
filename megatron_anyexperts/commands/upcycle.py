"""Start a new mixture from a trained checkpoint; its first forward pass is the old model's.

    anyexperts upcycle --config NEW_MODEL.yaml --tokenizer-model DIR --load OLD_CHECKPOINT --save NEW_CHECKPOINT

NEW_MODEL.yaml is the configuration that training will go on with. A fixed top-k checkpoint becomes a dynamic one; dense
layers at places where the new pattern has `E` become mixtures of copies. One process without a GPU, whatever layout and
implementation the configuration names: they do not change the tensors. Exit code 2: refused, with a list of what does
not fit.
"""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.evaluation.trained_model import start
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.training.config_files import read_config

GPU_ONLY = ("moe-grouped-gemm", "recompute-", "fp8", "sequence-parallel")
"""Beginnings of configuration keys without which the model has the same tensors."""

ALONE = [
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--use-cpu-initialization"),
    *("--no-rope-fusion", "--expert-model-parallel-size", "1"),
    *("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
]
"""Flags for one process without a GPU."""


def alone(cli: list[str]) -> list[str]:
    """The command line with what only a larger job on GPUs can carry out replaced."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(cli)[0].config
    keys = [key for key in read_config(path) if key.startswith(GPU_ONLY)] if path else []
    return [*cli, *ALONE, *(word for key in keys for word in ("--unset", key))]


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        args = start(alone(sys.argv[1:] if cli is None else cli))
        if not args.load or not args.save or args.load == args.save:
            raise UsageError("name the old checkpoint with --load and a new directory with --save")
        if args.world_size > 1:
            raise UsageError(f"{args.world_size} processes; run it as one, the result loads in any parallel layout")
        from megatron_anyexperts.training import comparison, identity
        from megatron_anyexperts.training.pretrain import model_provider, transformer_config
        from megatron_anyexperts.weights.upcycling import upcycle

        settings = identity.settings(args, transformer_config(args))
        if old := comparison.starting_point(args, own=False):
            print(comparison.compare(args, settings, old, new_shapes=True))
        upcycle(model_provider(), Path(args.load), Path(args.save), settings)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"checkpoint: {args.save} (train with --pretrained-checkpoint {args.save} and a new --run-dir)")
    return 0
