"""Files of the plan: records partitioned by number, and packed bits. Plain numbers, nothing that could run."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_anyexperts.files import sync_folder

BITS_AT_ONCE = 2**23


@contextlib.contextmanager
def atomic_folder(path: Path, scratch: Path) -> Iterator[Path]:
    """A folder that appears under its name only when its files are complete and on disk; the first to make it wins.

    Args:
        path: final name.
        scratch: folder on the same file system for the unfinished one.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=scratch, prefix=f"{path.name}."))
    try:
        yield made
        for file in made.iterdir():
            if not file.stat().st_size:
                continue
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(made)
        made.chmod(0o755)
        try:
            made.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    sync_folder(path.parent)


def save_parts(stem: Path, batches: Iterable[tuple[np.ndarray, np.ndarray]], parts: int) -> None:
    """Store records so that those of one part can be read alone.

    Args:
        stem: path without suffix.
        batches: [n] records and int [n] the part of each, in 0 .. parts-1. Batch i fills the parts from i * parts on;
            within a part the order stays.
        parts: of one batch.
    """
    bounds, stored = [], 0
    with open(f"{stem}.bin", "wb") as file:
        for records, part in batches:
            order = np.argsort(part, kind="stable")
            records[order].tofile(file)
            bounds.append(stored + np.searchsorted(part[order], np.arange(parts)))
            stored += len(records)
    np.array([*np.concatenate(bounds), stored], dtype="<i8").tofile(f"{stem}.idx")


def load_part(stem: Path, part: int, dtype: np.dtype) -> np.ndarray:
    """The records of one part, in the order in which they were stored."""
    start, stop = np.fromfile(f"{stem}.idx", "<i8", 2, offset=8 * part).tolist()
    return np.fromfile(f"{stem}.bin", dtype, stop - start, offset=start * dtype.itemsize)


def save_bits(path: Path, values: np.ndarray, wanted: int) -> None:
    """Store which values equal `wanted`, a bit each, without a temporary array of their size."""
    with open(path, "wb") as file:
        for start in range(0, len(values), BITS_AT_ONCE):
            np.packbits(values[start : start + BITS_AT_ONCE] == wanted).tofile(file)


def load_bits(path: Path, places: np.ndarray) -> np.ndarray:
    """Bits of `save_bits`, bool [n] for int64 [n] places; only what is needed is read."""
    if not len(places):
        return np.empty(0, dtype=bool)
    first = int(places.min()) // 8
    packed = np.fromfile(path, np.uint8, int(places.max()) // 8 + 1 - first, offset=first)
    return (packed[places // 8 - first] >> (7 - places % 8).astype(np.uint8) & 1).astype(bool)
