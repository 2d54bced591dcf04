"""Files that are complete or absent, whenever the machine stops. Needs nothing but Python."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, scratch: Path | None = None, first_wins: bool = False) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when it is complete and on disk.

    Args:
        path: final name; its folder is created.
        scratch: folder on the same file system for the unfinished file; that of `path` by default, where its name
            then begins with that of `path`.
        first_wins: keep a file that already has the name, for results that processes may race for.
    """
    scratch = path.parent if scratch is None else scratch
    scratch.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=scratch, prefix=f"{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        if first_wins:
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
            os.unlink(name)
        else:
            os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves either the old or the new content."""
    with atomic_file(path) as file:
        file.write(text.encode())
