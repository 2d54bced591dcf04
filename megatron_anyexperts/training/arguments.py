"""Command line of the entry points: a YAML file of Megatron flags, overridden by the flags that follow it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_anyexperts.console import say
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training import run_config
from megatron_anyexperts.training.config import RunConfig, TraceConfig, apply_run_dir
from megatron_anyexperts.training.config_files import read_config
from megatron_anyexperts.training.help import ParserHook, help_text, training_parser
from megatron_anyexperts.training.usage import UsageError

HELP = {"-h", "--help", "--help-all"}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every flag of this project, each generated from the dataclass that declares it."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.argument_utils import ArgumentGroupFactory

    from megatron_anyexperts.data.config import DataConfig
    from megatron_anyexperts.models.build import add_model_arguments
    from megatron_anyexperts.moe.config import AnyExpertsConfig
    from megatron_anyexperts.training.learning_rates import LearningRateConfig

    inherited = [field.name for field in dataclasses.fields(TransformerConfig)]
    ArgumentGroupFactory(AnyExpertsConfig, exclude=inherited).build_group(parser, title="anyexperts")
    add_model_arguments(parser)
    groups = (
        (DataConfig, "multimodal data"),
        (RunConfig, "run"),
        (TraceConfig, "routing trace"),
        (LearningRateConfig, "learning rates of parts"),
    )
    for config, title in groups:
        ArgumentGroupFactory(config).build_group(parser, title=title)
    return parser


def config_to_argv(config: Mapping[str, Any], overridden: set[str], flags: Mapping[str, argparse.Action]) -> list[str]:
    """Turn a configuration into command-line words, leaving out what the command line sets itself.

    Args:
        config: flag names without the leading dashes, to values; true means a flag without value, false and null
            mean that the flag is absent.
        overridden: destinations (argparse `dest`) that the command line sets.
        flags: option string to argparse action, for all known flags.

    Raises:
        UsageError: a key is no flag; names the nearest ones.
    """
    argv: list[str] = []
    for key, value in config.items():
        action = flags.get(f"--{key}")
        if action is None:
            raise UsageError(f"unknown configuration key '{key}'{_nearest(f'--{key}', flags)}")
        if action.dest in overridden or value is None or value is False:
            continue
        if action.nargs == 0 and value is not True:
            raise UsageError(f"configuration key '{key}' is a switch; its value is true or false, not {value!r}")
        values = [] if value is True and action.nargs == 0 else value if isinstance(value, list) else [value]
        argv += [f"--{key}", *map(str, values)]
    return argv


def _nearest(option: str, flags: Mapping[str, argparse.Action]) -> str:
    near = [name.removeprefix("--") for name in difflib.get_close_matches(option, flags, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def merge(cli: list[str], add: ParserHook = add_arguments, drop: tuple[str, ...] = ()) -> list[str]:
    """Return the full command line: the words of ``--config FILE``, then those of `cli` without it.

    ``--unset KEY`` (repeatable) drops a key of the file, which is how a switch of the file is turned off. Without
    ``--config`` and ``--num-experts``, the file of the run that ``--run-dir`` names counts, if there is one.

    Args:
        cli: command-line words without the program's name.
        add: adds the project's own flags to Megatron's.
        drop: flags that are not taken over from the file of a run.

    Raises:
        UsageError: an unknown key or flag, or an unreadable file.
        SystemExit: help was asked for, and printed.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config")
    own.add_argument("--unset", action="append", default=[])
    chosen, rest = own.parse_known_args(cli)
    if chosen.config is None and (words := _words_of_run(rest, drop)):
        chosen = own.parse_args(words, chosen)
    parser = training_parser(add)
    if wanted := HELP & set(rest):
        if os.environ.get("RANK", "0") == "0":
            say(help_text(parser, Path(sys.argv[0]).name, everything="--help-all" in wanted))
        raise SystemExit(0)
    flags = {option: action for action in parser._actions for option in action.option_strings}

    given = [word.split("=", 1)[0] for word in rest if word.startswith("--")]
    for option in given:
        if option not in flags:
            raise UsageError(f"unknown flag {option}{_nearest(option, flags)}")
    config = read_config(chosen.config) if chosen.config else {}
    for key in (key.replace("_", "-") for key in chosen.unset):
        if key not in config:
            raise UsageError(f"--unset {key}: {chosen.config} has no such key")
        del config[key]
    overridden = {flags[option].dest for option in given if option in flags}
    words = config_to_argv(config, overridden, flags) + rest
    # Megatron's own parsing would answer a wrong value with the names of its 880 flags.
    parser.error = _refuse_words
    parser.parse_args(words)
    return words


def switches() -> dict[str, bool]:
    """Option string to whether it is a switch, for all flags of training."""
    parser = training_parser(add_arguments)
    return {option: action.nargs == 0 for action in parser._actions for option in action.option_strings}


def _words_of_run(words: list[str], drop: tuple[str, ...]) -> list[str]:
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--run-dir")
    peek.add_argument("--num-experts")
    found = peek.parse_known_args(words)[0]
    if found.run_dir is None or found.num_experts is not None:  # the command describes a model itself
        return []
    run = Run(Path(found.run_dir))
    if (taken := run_config.words_of_run(run, drop)) and os.environ.get("RANK", "0") == "0":
        print(f"flags that the command line does not give are those of {run.config}", file=sys.stderr)
    return taken


def _refuse_words(message: str) -> NoReturn:
    raise UsageError(message)


def has_cuda() -> bool:
    """Whether this machine can train on GPUs; `doctor` and `precheck` answer for another one."""
    return torch.cuda.is_available()


def refuse_size(args: argparse.Namespace) -> None:
    """Refuse a number of ranks that cannot share the work: Megatron would speak of `eval_global_batch_size`.

    Raises:
        ValueError: names the sizes that can.
    """
    from megatron_anyexperts.data.elastic import check_streams

    whole = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size % whole == 0:  # else Megatron names the sizes
        check_streams(args.data_streams, args.world_size // whole, whole)


def _refuse(args: argparse.Namespace) -> None:
    """Refuse what Megatron's own validation lets pass, corrects in silence, or refuses without saying the values."""
    if args.num_experts is None:
        raise UsageError(
            "--num-experts is not set; this is a mixture-of-experts trainer: experts of a dense model are made by "
            "`anyexperts upcycle`"
        )
    if args.num_experts % args.expert_model_parallel_size:
        raise UsageError(
            f"--expert-model-parallel-size={args.expert_model_parallel_size} does not divide "
            f"--num-experts={args.num_experts}; use a divisor of the number of experts"
        )
    if args.step_batch_size_schedule is not None and args.global_batch_size is not None:
        raise UsageError(
            f"--global-batch-size={args.global_batch_size} contradicts --step-batch-size-schedule "
            f'"{args.step_batch_size_schedule}"; leave one out, such as by --unset global-batch-size'
        )
    if args.async_save and not has_cuda():
        raise UsageError("--async-save: Megatron's writer process dies without CUDA; save synchronously on CPU")
    if args.async_save and not args.use_persistent_ckpt_worker:
        raise UsageError("--async-save: Megatron ignores it without --use-persistent-ckpt-worker; add that flag")
    if args.async_save and args.optimizer_cpu_offload:
        raise UsageError(
            "--async-save with --optimizer-cpu-offload: optimizer states in host memory are written as they lie there, "
            "while training changes them; leave one out"
        )
    refuse_size(args)
    for path in (*(args.data_path or ()), args.tokenizer_model):
        if path and "://" not in path and not Path(path).exists():
            raise UsageError(f"{path} does not exist; build shards and tokenizer with data_tools/build_shards.py")


_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def be_a_rank() -> None:
    """Make a process that no launcher started a group of one."""
    if "RANK" not in os.environ:
        os.environ.update(_ALONE)


def parse(
    cli: list[str], defaults: Mapping[str, Any] | None = None, drop: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Parse and validate the command line the way Megatron's own entry points do, and set its globals.

    Args:
        cli: command-line words without the program's name; may contain ``--config``.
        defaults: flag defaults of the entry point, by destination.
        drop: see `merge`.

    Returns:
        Megatron's arguments, with this project's among them.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    sys.argv = [sys.argv[0], *merge(cli, drop=drop)]
    args = parse_args(extra_args_provider=add_arguments)
    apply_run_dir(args)
    _refuse(args)
    validate_args(args, dict(defaults or {}))
    # Megatron would open TensorBoard's own writer here, for tools as well; see `curves`.
    folder, args.tensorboard_dir = args.tensorboard_dir, None
    set_global_variables(args)
    args.tensorboard_dir = folder
    return args
