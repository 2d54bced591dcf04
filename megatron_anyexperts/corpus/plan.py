"""Which sample goes into which shard: a pure function of the scans, so that every process finds the same answer."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_anyexperts.corpus import near
from megatron_anyexperts.corpus.corpus import Corpus, Shards
from megatron_anyexperts.corpus.sample import KINDS
from megatron_anyexperts.corpus.scan import ACCEPTED, Scan

SPLITS = ("train", "val")


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


@dataclass(frozen=True)
class Duplicate:
    """An item that is left out because it repeats another."""

    chunk: int
    position: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """All shards of a corpus and what was left out as repeated."""

    shards: list[ShardPlan]
    duplicates: list[Duplicate]


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


def occurrences(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """How often each content hash occurred at an earlier index, int64 [N]."""
    count = len(high)
    order = np.lexsort((np.arange(count), low, high))
    first = np.ones(count, dtype=bool)
    first[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    start = np.maximum.accumulate(np.where(first, np.arange(count), 0))
    result = np.empty(count, dtype=np.int64)
    result[order] = np.arange(count) - start
    return result


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


def make_plan(corpus: Corpus, scans: Sequence[Scan]) -> Plan:
    """Assign every accepted sample to a shard, or name it a duplicate.

    Args:
        corpus: seed, deduplication, split and shard sizes.
        scans: one per chunk, in the order of the list of chunks.
    """
    order = chunk_order(len(scans), corpus.seed)
    rows = np.concatenate([scans[number].accepted for number in order] or [np.empty(0, ACCEPTED)])
    chunks = np.repeat(order, [len(scans[number].accepted) for number in order])
    repeats = occurrences(rows["hash_high"], rows["hash_low"])
    keep = np.ones(len(rows), dtype=bool)
    duplicates: list[Duplicate] = []

    def drop(marked: np.ndarray, reason: str) -> None:
        for index in np.flatnonzero(keep & marked):
            duplicates.append(Duplicate(int(chunks[index]), int(rows["position"][index]), reason))
        keep[marked] = False

    if corpus.dedup.exact:
        drop(repeats > 0, "exact duplicate")
    if corpus.dedup.near_text is not None:
        signatures = np.concatenate([scans[number].text_signatures for number in order])
        drop(_among(keep, near.repeated_texts, signatures, rows["kind"], corpus.dedup.near_text), "near-duplicate text")
    if corpus.dedup.near_image is not None:
        signatures = np.concatenate([scans[number].image_signatures for number in order])
        drop(
            _among(keep, near.repeated_images, signatures, rows["group"], corpus.dedup.near_image),
            "near-duplicate image",
        )
    held_out = is_validation(rows["group"], corpus.validation_fraction)
    shards = []
    for kind_number, kind in enumerate(KINDS):
        for split, side in zip(SPLITS, (~held_out, held_out), strict=True):
            [chosen] = np.nonzero(keep & side & (rows["kind"] == kind_number))
            for number, part in enumerate(cut(rows["bytes"][chosen], corpus.shards)):
                index = chosen[part]
                name = f"{kind}/{split}/shard-{number:06d}.tar"
                shards.append(ShardPlan(name, chunks[index], rows[index], repeats[index]))
    return Plan(shards, duplicates)


def split_warnings(plan: Plan, fraction: float) -> list[str]:
    """What is wrong with the split of each kind of sample: a small corpus may fall to one side as a whole.

    Args:
        plan: of the corpus.
        fraction: its `validation_fraction`; with 0 nothing is to be held out.
    """
    warnings = []
    held_out = {shard.name.split("/")[0] for shard in plan.shards if "/val/" in shard.name}
    for kind in KINDS:
        shards = [shard for shard in plan.shards if shard.name.startswith(f"{kind}/")]
        if not shards or fraction == 0:
            continue
        groups = np.unique(np.concatenate([shard.samples["group"] for shard in shards]))
        count = sum(len(shard.samples) for shard in shards)
        sides = is_validation(groups, fraction)
        if sides.all():
            few = int(groups[-1]) * 1000 // 2**64 / 1000
            way_out = f"lower it to {few:.3f} or less, or add data" if few else "add data"
            warnings.append(
                f"{kind}: all {count} samples are held out by validation_fraction={fraction:g}, so none is left to "
                f"train on; {way_out}"
            )
        elif not sides.any():
            enough = -(-int(groups[0]) * 1000 // 2**64) / 1000 + 0.001
            larger = f"raise it to {enough:.3f}" if len(groups) > 1 and enough < 1 else "add data"
            without = "its loss is not measured" if held_out else "training needs --eval-iters 0"
            warnings.append(
                f"{kind}: none of {count} samples is held out by validation_fraction={fraction:g}, so {without}; "
                f"{larger} to hold some out"
            )
    return warnings


def _among(keep: np.ndarray, find, signatures: np.ndarray, labels: np.ndarray, limit) -> np.ndarray:
    marked = np.zeros(len(keep), dtype=bool)
    marked[keep] = find(signatures[keep], labels[keep], limit)
    return marked
