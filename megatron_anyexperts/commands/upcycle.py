"""Start a new mixture from a trained checkpoint; its first forward pass is the old model's.

    anyexperts upcycle --run-dir OLD_RUN --save NEW_CHECKPOINT --anyexperts-k-max 12 [other flags of the new model]
    anyexperts upcycle --config NEW_MODEL.yaml --tokenizer-model DIR --load OLD_CHECKPOINT --save NEW_CHECKPOINT

NEW_MODEL.yaml is the configuration that training will go on with; without one the flags are those of the old run. A
fixed top-k checkpoint becomes a dynamic one; dense layers at places where the new pattern has `E` become mixtures of
copies. One process without a GPU, whatever layout and implementation the configuration names: they do not change the
tensors. Exit code 2: refused, with a list of what does not fit.
"""

import argparse
import sys
from pathlib import Path

from megatron_anyexperts.console import own_lines_only, say
from megatron_anyexperts.evaluation.trained_model import start
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.training.config_files import read_config
from megatron_anyexperts.training.run_config import TRAINING_ONLY

GPU_ONLY = ("moe-grouped-gemm", "recompute-", "fp8", "sequence-parallel")
"""Beginnings of configuration keys without which the model has the same tensors."""

ALONE = [
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--use-cpu-initialization"),
    *("--no-rope-fusion", "--expert-model-parallel-size", "1"),
    *("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
]
"""Flags for one process without a GPU."""


def alone(cli: list[str]) -> list[str]:
    """The command line with what only a larger job on GPUs can carry out replaced, and with the old run's folder."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "run-dir", "load"):
        parser.add_argument(f"--{name}")
    given = parser.parse_known_args(cli)[0]
    run = Run(Path(given.run_dir)) if given.run_dir else None
    path = given.config or (run.config if run and run.config.is_file() else None)
    keys = [key for key in read_config(str(path)) if key.startswith(GPU_ONLY)] if path else []
    if given.config is None:
        keys = [key for key in keys if key not in TRAINING_ONLY]  # which `start` drops itself
    load = ["--load", str(run.checkpoints)] if run and not given.load else []
    return [*cli, *load, *ALONE, *(word for key in keys for word in ("--unset", key))]


@own_lines_only
def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        args = start(alone(sys.argv[1:] if cli is None else cli))
        if not args.load or not args.save or args.load == args.save:
            raise UsageError("name the old run with --run-dir, or its checkpoints with --load, and a new --save")
        if args.world_size > 1:
            raise UsageError(f"{args.world_size} processes; run it as one, the result loads in any parallel layout")
        from megatron_anyexperts.training import comparison, identity
        from megatron_anyexperts.training.pretrain import model_provider, transformer_config
        from megatron_anyexperts.weights.upcycling import upcycle

        settings = identity.settings(args, transformer_config(args))
        if old := comparison.starting_point(args, own=False):
            say(str(comparison.compare(args, settings, old, new_shapes=True)))
        upcycle(model_provider(), Path(args.load), Path(args.save), settings)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"checkpoint: {args.save} (train with --pretrained-checkpoint {args.save} and a new --run-dir)")
    return 0
