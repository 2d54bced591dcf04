"""Configurations: YAML files of flags, found by path or by the name of a shipped one, each an edit of its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_anyexperts.training.usage import UsageError

BASE = "base"
_CHECKOUT = Path(__file__).parents[2] / "pretrain/configs"


def shipped_folder() -> Path:
    """Where this project's configurations are, in a checkout or in an installation."""
    return _CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).parents[1] / "configs"


def find_config(name: str, beside: Path | None = None) -> Path:
    """The file of a configuration.

    Args:
        name: a path, or the name of a shipped configuration, such as `demo`.
        beside: folder where relative paths start; None: the current one.

    Raises:
        UsageError: there is none.
    """
    path = Path(beside or "", name)
    if path.is_file():
        return path
    shipped = shipped_folder() / f"{name}.yaml"
    if "/" not in name and shipped.is_file():
        return shipped
    names = ", ".join(sorted(each.stem for each in shipped_folder().glob("*.yaml")))
    raise UsageError(f"no configuration {name}: neither a file nor one of the shipped {names}")


def read_config(name: str) -> dict[str, Any]:
    """Read a YAML mapping of flag names to values; ``-`` and ``_`` are the same in a name.

    The key `base` names another configuration, relative to the file or shipped, whose keys count where this one has
    none; null or false here takes a key of the base away.

    Raises:
        UsageError: a file is missing, is not YAML, is not a flat mapping, or is its own base.
    """
    return _read(find_config(name), ())


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in readers:
        raise UsageError(f"--config {readers[0]}: {path} is its own base")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(config, Mapping) or any(isinstance(value, Mapping) for value in config.values()):
        raise UsageError(f"--config {path} must be a flat mapping of Megatron flags to values")
    own = {str(key).replace("_", "-"): value for key, value in config.items()}
    base = own.pop(BASE, None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise UsageError(f"--config {path}: base is {base!r}, not the path or name of a configuration")
    inherited = _read(find_config(base, path.parent), (*readers, path.resolve()))
    return inherited | own
