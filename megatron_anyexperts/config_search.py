"""Where a configuration is: by path, or by the name of a shipped one. Standard library only: the launcher asks, too."""

from __future__ import annotations

from pathlib import Path

BASE = "base"
"""The key that names the configuration of which a file is an edit."""
_CHECKOUT = Path(__file__).parents[1] / "pretrain/configs"


def shipped_folder() -> Path:
    """The folder of this project's configurations, in a checkout or in an installation."""
    return _CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).parent / "configs"


def find_config(name: str, beside: Path | None = None, readers: tuple[Path, ...] = ()) -> Path:
    """The file of a configuration.

    Args:
        name: a path, or the name of a shipped configuration, such as `demo`.
        beside: folder where relative paths start; None: the current one.
        readers: files, each the base of the one before, whose last one asks.

    Raises:
        ValueError: there is none, or it is one of its readers.
    """
    path = Path(beside or "", name)
    if not path.is_file() and "/" not in name:
        path = shipped_folder() / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in shipped_folder().glob("*.yaml")))
        raise ValueError(f"cannot find the configuration {name}: neither a file nor one of the shipped {names}")
    path = path.resolve()
    if path in readers:
        raise ValueError(f"{path} is its own base")
    return path
