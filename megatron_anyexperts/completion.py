"""`anyexperts completion SHELL`: a completion script of all verbs and flags, for the shell's start-up file.

    anyexperts completion bash > ~/.local/share/bash-completion/completions/anyexperts

The script is static: completing starts no Python.
"""

from __future__ import annotations

import argparse
import importlib

import shtab

from megatron_anyexperts.cli import VERBS
from megatron_anyexperts.training.arguments import add_arguments
from megatron_anyexperts.training.help import training_parser


def all_flags() -> argparse.ArgumentParser:
    """A parser that has every verb with its flags, to be completed and not to parse."""
    training = training_parser(add_arguments)
    training.add_argument("--config", metavar="FILE").complete = shtab.FILE
    training.add_argument("--unset", metavar="KEY")
    root = argparse.ArgumentParser("anyexperts")
    verbs = root.add_subparsers()
    nested: dict[str, argparse._SubParsersAction] = {}
    for name, verb in VERBS.items():
        group, _, word = name.rpartition(" ")
        if group and group not in nested:
            nested[group] = verbs.add_parser(group, help=f"commands on a {group}").add_subparsers()
        module = importlib.import_module(verb.main.partition(":")[0])
        parser = module.parser() if hasattr(module, "parser") else training
        adder = nested[group] if group else verbs
        adder.add_parser(word, help=verb.summary, parents=[parser], add_help=False, conflict_handler="resolve")
    return root


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return own


def main(cli: list[str] | None = None) -> int:
    """Print the script; returns the exit code."""
    print(shtab.complete(all_flags(), parser().parse_args(cli).shell))
    return 0
