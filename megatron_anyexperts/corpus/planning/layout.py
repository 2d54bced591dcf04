"""Where the parts of a plan are, and the task that makes one."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.corpus import Corpus
from megatron_anyexperts.corpus.planning.parts import atomic_folder
from megatron_anyexperts.corpus.scan import ACCEPTED, scan_path
from megatron_anyexperts.corpus.workers import Handled

ROW = np.dtype([("sample", ACCEPTED), ("chunk", "<i8")])
"""An accepted sample and the number of its chunk."""

SCANS_OF_CENSUS = 1000


@dataclass(frozen=True)
class Sizes:
    """How much one task holds in memory; the plan does not depend on it."""

    group_rows: int = 2**20
    """Rows of a group; a single chunk may hold more."""
    bucket_rows: int = 2**20
    """Records of a bucket on average."""
    pivots: int = 16
    """Members of a run with which all later ones are compared in the first round; each round eight times as many."""
    compared_rows: int = 2**17
    """Rows whose signatures are in memory at once."""


@dataclass(frozen=True)
class Layout:
    """The parts of the plan of one corpus."""

    corpus: Corpus = field(repr=False)
    work: Path
    """Working folder of the build."""
    key: str
    """Of the scans that are planned."""
    chunks: int
    sizes: Sizes = Sizes()

    @property
    def folder(self) -> Path:
        """Of all parts."""
        return self.work / "plan" / self.key

    def part(self, stage: str, number: int | None = None) -> Path:
        """Folder of a part, at most 1000 in a folder; of the only one without a number."""
        return self.folder / stage / (f"{number // 1000:06d}/{number:09d}" if number is not None else "")

    @cached_property
    def row_starts(self) -> np.ndarray:
        """First row of each of G groups, and the end, int64 [G + 1]."""
        return np.fromfile(self.part("groups") / "rows.bin", "<i8")

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.row_starts) - 1

    @property
    def buckets(self) -> int:
        """Number of buckets, a power of two."""
        filled = -(-int(self.row_starts[-1]) // self.sizes.bucket_rows)
        return 1 << max(0, filled - 1).bit_length()

    def decided(self, search: str) -> Path:
        """Folder of the last round of a search, after which everything is decided."""
        number = 0
        while self.part(f"{search}-round", number + 1).is_dir():
            number += 1
        return self.part(f"{search}-round", number)

    def chunks_of(self, group: int) -> np.ndarray:
        """Numbers of the chunks of a group in plan order, int64."""
        folder = self.part("groups")
        start, stop = np.fromfile(folder / "chunks.bin", "<i8", 2, offset=8 * group).tolist()
        return np.fromfile(folder / "order.bin", "<i8", stop - start, offset=8 * start)

    def rows_of(self, group: int) -> np.ndarray:
        """Rows of a group, [n] of ROW."""
        return np.fromfile(self.part("spill", group) / "rows.bin", ROW)

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """Group of each row of the corpus, int64."""
        return np.searchsorted(self.row_starts, rows, side="right") - 1

    def bucket_of(self, hashes: np.ndarray) -> np.ndarray:
        """Bucket of evenly spread uint64 hashes, by their highest bits."""
        return (hashes >> np.uint64(32)).astype(np.int64) * self.buckets >> 32


@dataclass(frozen=True, slots=True)
class Step:
    """Make one part of the plan."""

    layout: Layout = field(repr=False)
    stage: str
    number: int | None
    make: Callable[[Layout, int | None, Path], None] = field(repr=False)
    """Called with the layout, the number and a folder for the files of the part."""

    @property
    def path(self) -> Path:
        """Folder of the part."""
        return self.layout.part(self.stage, self.number)

    @property
    def claim(self) -> Path:
        return self.layout.work / "claims" / self.path.relative_to(self.layout.work)

    def done(self) -> bool:
        return self.path.is_dir()

    def run(self) -> Handled:
        with atomic_folder(self.path, self.layout.work / "tmp") as folder:
            self.make(self.layout, self.number, folder)
        return Handled()

    def after_crash(self, signal_number: int) -> None:
        raise RuntimeError(f"planning ({self.stage}) ends with signal {signal_number}; is there enough memory?")


def scans_key(work: Path, chunks: int) -> str:
    """Identifies the scans that are on disk: a scan that was made again gives another key, hence another plan.

    Raises:
        FileNotFoundError: one is missing.
    """
    digest = hashlib.blake2b(digest_size=12)
    for number in range(chunks):
        status = os.stat(scan_path(work, number))
        digest.update(b"%d %d\n" % (status.st_size, status.st_mtime_ns))
    return digest.hexdigest()
