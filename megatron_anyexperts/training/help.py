"""The help of the training command: this project's flags and the Megatron flags that most runs set, or all of them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

ParserHook = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

OFTEN_USED = (
    *("hybrid-layer-pattern", "hidden-size", "num-attention-heads", "num-experts", "moe-router-topk", "seq-length"),
    *("data-path", "tokenizer-model", "micro-batch-size", "global-batch-size", "train-iters", "seed"),
    *("lr", "min-lr", "lr-warmup-iters", "lr-decay-style", "weight-decay", "clip-grad"),
    *("bf16", "fp8-format", "transformer-impl", "use-distributed-optimizer", "recompute-granularity"),
    *("expert-model-parallel-size", "tensor-model-parallel-size", "pipeline-model-parallel-size"),
    *("save-interval", "eval-interval", "eval-iters", "log-interval", "exit-duration-in-mins"),
    *("load", "finetune", "pretrained-checkpoint", "wandb-project"),
)
"""Megatron's flags that the short help shows, in this order."""

OUR_WORDS = {
    "data_path": "blend.yaml of built shards",
    "tokenizer_model": "folder of the tokenizer that the shards were built with",
    "train_iters": "Iterations of the whole run, from its very start",
}
"""Where Megatron's own words are about another loader or too little."""

OUR_GROUPS = ("anyexperts", "encoders", "media", "multimodal data", "run", "routing trace", "learning rates of parts")

CONFIG_HELP = (
    ("--config FILE", "YAML file of flags, or the name of a shipped one; the command line overrides it"),
    ("--unset KEY", "drop a key of the file; repeatable"),
    ("--help-all", "every flag, Megatron's 880 among them"),
)


def training_parser(add: ParserHook) -> argparse.ArgumentParser:
    """Megatron's parser with this project's flags, whose help can be printed.

    Args:
        add: adds the project's own flags.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = add(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            # Megatron 0.19 has a flag with a bare per cent sign, of which argparse dies.
            action.help = action.help.replace("%", "%%")
    return parser


DESCRIPTION = """A configuration names flags one to one. The same command again continues the run of --run-dir
from its newest intact checkpoint, on any number of ranks that divides --data-streams. Several ranks are started by
torchrun -m megatron_anyexperts, by srun or by slurm/submit."""


def help_text(parser: argparse.ArgumentParser, program: str, everything: bool) -> str:
    """The help of a command that takes the training flags.

    Args:
        parser: from `training_parser`.
        program: name of the command.
        everything: all of Megatron's flags instead of `OFTEN_USED`.
    """
    formatter = argparse.RawDescriptionHelpFormatter(program, max_help_position=32)
    formatter.add_text(f"usage: {program} [--config FILE] [flags]")
    formatter.add_text(DESCRIPTION)
    formatter.start_section("configuration")
    for flag, text in CONFIG_HELP:
        formatter.add_argument(argparse.Action([flag], flag, nargs=0, help=text))
    formatter.end_section()
    groups = [group for group in parser._action_groups if group._group_actions]
    if not everything:
        flags = parser._option_string_actions
        groups = [group for group in groups if group.title in OUR_GROUPS]
        _section(formatter, "often used Megatron flags", [_in_short(flags[f"--{name}"]) for name in OFTEN_USED])
    for group in groups:
        _section(formatter, group.title, group._group_actions)
    return formatter.format_help()


def _in_short(action: argparse.Action) -> argparse.Action:
    short = copy.copy(action)
    short.help = OUR_WORDS.get(action.dest) or " ".join((action.help or "").split()).split(". ")[0].rstrip(".")
    return short


def _section(formatter: argparse.HelpFormatter, title: str | None, actions: list[argparse.Action]) -> None:
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()
