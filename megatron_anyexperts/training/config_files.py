"""Reads configurations: YAML files of flags, each possibly an edit of a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_anyexperts import described
from megatron_anyexperts.config_search import BASE, find_config
from megatron_anyexperts.training.usage import UsageError


def read_config(name: str) -> dict[str, Any]:
    """Read a YAML mapping of flag names to values; ``-`` and ``_`` are the same in a name.

    The key `base` names another configuration, relative to the file or shipped, whose keys count where this one has
    none; null or false here takes a key of the base away.

    Args:
        name: see `find_config`.

    Raises:
        UsageError: a file is missing, is not YAML, is not a flat mapping, or is its own base.
    """
    try:
        return _read(find_config(name), ())
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--config {name}: {error}") from error


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    try:
        config = described.load(path.read_text(encoding="utf-8"))
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
    readers += (path,)
    return _read(find_config(base, path.parent, readers), readers) | own
