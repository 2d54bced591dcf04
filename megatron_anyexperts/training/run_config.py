"""`RUN/config.yaml`: flags of the newest start of a run, in a form that `--config` reads, and what carried them out."""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_anyexperts.files import write_text
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.config_files import read_config

_PACKAGES = ("megatron-anyexperts", "megatron-core", "torch", "megatron-energon", "transformer-engine")
_PATHS = ("data-path", "tokenizer-model", "load", "save", "pretrained-checkpoint", "data-mixture-schedule")
"""Flags whose values are made absolute, so that the file serves from any folder."""

ONE_START = ("run-dir", "verbose", "change-schedule", "accept-change", "exit-interval", "exit-duration-in-mins")
"""Flags of one start, which the file leaves out."""
TRAINING_ONLY = (
    *("load", "save", "finetune", "pretrained-checkpoint", "no-load-optim", "no-load-rng", "ckpt-step"),
    *("expert-model-parallel-size", "tensor-model-parallel-size", "pipeline-model-parallel-size"),
    *("context-parallel-size", "expert-tensor-parallel-size", "sequence-parallel", "async-save"),
)
"""Flags that a tool, which reads the run's newest checkpoint in ranks of its own, does not take over."""


def as_mapping(words: list[str], switches: Mapping[str, bool]) -> dict[str, Any]:
    """The flags of a command line as a configuration.

    Args:
        words: a full command line, each flag once or the last one counting.
        switches: option string to whether it is a switch, for all known flags.
    """
    found: dict[str, Any] = {}
    position = 0
    while position < len(words):
        option, equals, value = words[position].partition("=")
        position += 1
        values = [value] if equals else []
        while not equals and position < len(words) and words[position].split("=", 1)[0] not in switches:
            values.append(words[position])
            position += 1
        plain = [yaml.safe_load(each) if _is_number(each) else each for each in values]
        found[option.removeprefix("--")] = True if switches[option] else plain[0] if len(plain) == 1 else plain
    return found


def _is_number(text: str) -> bool:
    value = yaml.safe_load(text) if text and text[0] in "-.0123456789" else None
    return isinstance(value, int | float) and not isinstance(value, bool) and str(value) == text


def write(run: Run, words: list[str], switches: Mapping[str, bool]) -> None:
    """Write the flags of this start into the run's directory.

    Args:
        run: whose directory exists.
        words, switches: see `text`.

    Raises:
        OSError: the disk refused.
    """
    write_text(run.config, text(words, switches))


def text(words: list[str], switches: Mapping[str, bool]) -> str:
    """The flags of this start as YAML, with the versions that carry them out as comments.

    Args:
        words: the full command line, as `arguments.merge` returns it.
        switches: see `as_mapping`.
    """
    flags = {name: value for name, value in as_mapping(words, switches).items() if name not in ONE_START}
    for name in _PATHS:
        if isinstance(flags.get(name), str) and "://" not in flags[name]:
            flags[name] = str(Path(flags[name]).resolve())
    versions = [f"python {sys.version.split()[0]}", *filter(None, map(_version, _PACKAGES)), f"commit {commit()}"]
    heading = [f"started as: {shlex.join(sys.argv[:1] + words)}", *versions]
    comments = "".join(f"# {line}\n" for line in " ".join(heading[:1]).splitlines() + heading[1:])
    return comments + yaml.safe_dump(flags, sort_keys=False, width=1000)


def _version(package: str) -> str | None:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the checkout that this code lies in, with a mark when it was changed since."""
    root = str(Path(__file__).parents[2])
    git = ["git", "-C", root, "-c", f"safe.directory={root}"]
    try:
        if not Path(root, ".git").exists():
            return "unknown (no checkout)"
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return head.stdout.strip() + (" with changes" if changed.strip() else "")


def words_of_run(run: Run, drop: tuple[str, ...] = ()) -> list[str]:
    """Words that take the flags of a run over: `--config`, and `--unset` for those to drop; none without a file.

    Args:
        run: to take them from.
        drop: flags that are not taken over.

    Raises:
        UsageError: the file cannot be read.
    """
    if not run.config.is_file():
        return []
    given = read_config(str(run.config))
    return ["--config", str(run.config), *(word for name in drop if name in given for word in ("--unset", name))]
