"""What a plan is: which sample goes into which shard. `planning` makes it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_anyexperts.corpus.corpus import Shards
from megatron_anyexperts.corpus.sample import KINDS
from megatron_anyexperts.corpus.scan import ACCEPTED

SPLITS = ("train", "val")

PLANNED = np.dtype([("sample", ACCEPTED), ("chunk", "<i8"), ("repeat", "<i8")])
"""A row of a shard: the sample, the number of its chunk, how often the same content occurred before."""

DUPLICATE = np.dtype([("chunk", "<i8"), ("position", "<i8")])
"""An item that is left out because it repeats another."""

ROWS_AT_ONCE = 2**16


@dataclass(frozen=True)
class ShardPlan:
    """The N samples of one shard, in the order in which they are written."""

    name: str
    """Relative path, such as image/train/shard-000003.tar."""
    chunks: np.ndarray
    """int64 [N], number of the chunk of each sample."""
    samples: np.ndarray
    """[N] of scan.ACCEPTED."""
    repeats: np.ndarray
    """int64 [N], how often the same content occurred before; above 0 only without exact deduplication."""

    @classmethod
    def of(cls, name: str, rows: np.ndarray) -> "ShardPlan":
        """From [N] of PLANNED."""
        return cls(name, rows["chunk"].copy(), rows["sample"].copy(), rows["repeat"].copy())

    @property
    def digest(self) -> str:
        """Identifies content and order."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.samples).tobytes())
        digest.update(np.ascontiguousarray(self.chunks).tobytes())
        return digest.hexdigest()

    def sample_keys(self) -> list[str]:
        """Keys of the samples: the content hash, so that a sample keeps its key wherever it moves."""
        return [
            f"{high:016x}{low:016x}" + (f"-{repeat}" if repeat else "")
            for high, low, repeat in zip(
                self.samples["hash_high"].tolist(),
                self.samples["hash_low"].tolist(),
                self.repeats.tolist(),
                strict=True,
            )
        ]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A planned shard whose rows are in a file."""

    name: str
    digest: str
    """Of the `ShardPlan`."""
    path: Path
    """File of PLANNED."""
    start: int
    stop: int

    def load(self) -> ShardPlan:
        """Read the rows."""
        rows = np.fromfile(self.path, PLANNED, self.stop - self.start, offset=self.start * PLANNED.itemsize)
        return ShardPlan.of(self.name, rows)


class Span(NamedTuple):
    """The samples of a kind and the range of their group hashes."""

    samples: int
    lowest: int
    highest: int

    @classmethod
    def of(cls, groups: np.ndarray) -> "Span":
        """Of uint64 [N] group hashes, N > 0."""
        return cls(len(groups), int(groups.min()), int(groups.max()))

    def joined(self, other: "Span | None") -> "Span":
        """Both together."""
        if other is None:
            return self
        lowest, highest = min(self.lowest, other.lowest), max(self.highest, other.highest)
        return Span(self.samples + other.samples, lowest, highest)


@dataclass(frozen=True)
class Plan:
    """All shards of a corpus and what was left out as repeated; the rows of both stay on disk."""

    shards: list[ShardFile]
    spans: dict[str, Span]
    """By kind of sample."""
    duplicate_files: dict[str, Path]
    """File of DUPLICATE by reason."""

    def duplicates(self) -> Iterator[tuple[int, int, str]]:
        """Chunk, position and reason of each duplicate."""
        for reason, path in self.duplicate_files.items():
            with open(path, "rb") as file:
                while len(rows := np.fromfile(file, DUPLICATE, ROWS_AT_ONCE)):
                    yield from ((chunk, position, reason) for chunk, position in rows.tolist())


def chunk_order(count: int, seed: int) -> np.ndarray:
    """Numbers of the chunks in the order in which their samples fill shards, int64 [count]."""
    return np.random.Generator(np.random.PCG64(seed % 2**64)).permutation(count)


def is_validation(groups: np.ndarray, fraction: float) -> np.ndarray:
    """Which groups are held out; depends on the group alone, so it stays when data is added.

    Args:
        groups: uint64 [N] group hashes.
        fraction: share to hold out, in [0, 1).

    Returns:
        bool [N].
    """
    return groups < np.uint64(int(fraction * 2**64))


def cut(sizes: np.ndarray, limits: Shards) -> list[slice]:
    """Cut a sequence of samples into shards.

    Args:
        sizes: int64 [N], bytes of each sample.
        limits: samples and bytes of a shard; a sample above the byte limit gets a shard of its own.

    Returns:
        Consecutive slices that cover the sequence.
    """
    ends = np.cumsum(sizes)
    slices, start, used = [], 0, 0
    while start < len(sizes):
        by_bytes = int(np.searchsorted(ends, used + limits.max_bytes, side="right"))
        stop = min(max(by_bytes, start + 1), start + limits.max_samples, len(sizes))
        slices.append(slice(start, stop))
        start, used = stop, int(ends[stop - 1])
    return slices


def split_warnings(plan: Plan, fraction: float) -> list[str]:
    """What is wrong with the split of each kind of sample: a small corpus may fall to one side as a whole.

    Args:
        plan: of the corpus.
        fraction: its `validation_fraction`; with 0 nothing is to be held out.
    """
    warnings = []
    held_out = {shard.name.split("/")[0] for shard in plan.shards if "/val/" in shard.name}
    for kind in KINDS:
        if kind not in plan.spans or fraction == 0:
            continue
        count, lowest, highest = plan.spans[kind]
        any_held_out, all_held_out = is_validation(np.array([lowest, highest], np.uint64), fraction).tolist()
        if all_held_out:
            few = highest * 1000 // 2**64 / 1000
            way_out = f"lower it to {few:.3f} or less, or add data" if few else "add data"
            warnings.append(
                f"{kind}: all {count} samples are held out by validation_fraction={fraction:g}, so none is left to "
                f"train on; {way_out}"
            )
        elif not any_held_out:
            enough = -(-lowest * 1000 // 2**64) / 1000 + 0.001
            larger = f"raise it to {enough:.3f}" if lowest < highest and enough < 1 else "add data"
            without = "its loss is not measured" if held_out else "training needs --eval-iters 0"
            warnings.append(
                f"{kind}: none of {count} samples is held out by validation_fraction={fraction:g}, so {without}; "
                f"{larger} to hold some out"
            )
    return warnings
