"""What a plan is, in memory and in one pass: the definition that the plan in parts is held against."""

from collections.abc import Sequence

import numpy as np

from megatron_anyexperts.corpus.corpus import Corpus
from megatron_anyexperts.corpus.near import PERMUTATIONS, SCHEME, text_bands
from megatron_anyexperts.corpus.plan import SPLITS, ShardPlan, chunk_order, cut, is_validation
from megatron_anyexperts.corpus.sample import KINDS
from megatron_anyexperts.corpus.scan import ACCEPTED, Scan

Duplicates = list[tuple[int, int, str]]
"""Chunk, position and reason."""


def define_plan(corpus: Corpus, scans: Sequence[Scan]) -> tuple[list[ShardPlan], Duplicates]:
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
    duplicates: Duplicates = []

    def drop(marked: np.ndarray, reason: str) -> None:
        for index in np.flatnonzero(keep & marked):
            duplicates.append((int(chunks[index]), int(rows["position"][index]), reason))
        keep[marked] = False

    if corpus.dedup.exact:
        drop(repeats > 0, "exact duplicate")
    if corpus.dedup.near_text is not None:
        signatures = np.concatenate([scans[number].text_signatures for number in order])
        drop(_among(keep, repeated_texts, signatures, rows["kind"], corpus.dedup.near_text), "near-duplicate text")
    if corpus.dedup.near_image is not None:
        signatures = np.concatenate([scans[number].image_signatures for number in order])
        drop(
            _among(keep, repeated_images, signatures, rows["group"], corpus.dedup.near_image),
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
    return shards, duplicates


def _among(keep: np.ndarray, find, signatures: np.ndarray, labels: np.ndarray, limit) -> np.ndarray:
    marked = np.zeros(len(keep), dtype=bool)
    marked[keep] = find(signatures[keep], labels[keep], limit)
    return marked


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


def repeated_texts(signatures: np.ndarray, kinds: np.ndarray, threshold: float) -> np.ndarray:
    """Which texts resemble an earlier one of the same kind.

    Args:
        signatures: uint64 [N, PERMUTATIONS].
        kinds: [N]; texts of different kinds are not compared.
        threshold: estimated Jaccard similarity from which a text is a repetition.

    Returns:
        bool [N].
    """
    from datasketch import MinHash, MinHashLSH

    repeated = np.zeros(len(signatures), dtype=bool)
    index = {int(kind): MinHashLSH(params=text_bands(threshold), num_perm=PERMUTATIONS) for kind in np.unique(kinds)}
    for number, (values, kind) in enumerate(zip(signatures, kinds, strict=True)):
        minhash = MinHash(num_perm=PERMUTATIONS, seed=1, hashvalues=values, scheme=SCHEME)
        candidates = index[int(kind)].query(minhash)
        # The index answers with false candidates as well, so the similarity itself decides.
        repeated[number] = any(np.mean(signatures[other] == values) >= threshold for other in candidates)
        if not repeated[number]:
            index[int(kind)].insert(number, minhash)
    return repeated


def repeated_images(signatures: np.ndarray, groups: np.ndarray, max_bits: int) -> np.ndarray:
    """Which images resemble an earlier, different one.

    Args:
        signatures: uint64 [N]; 0 means no image.
        groups: [N]; samples of one group have the very same image and do not repeat each other.
        max_bits: differing bits up to which an image is a repetition.

    Returns:
        bool [N].
    """
    repeated = np.zeros(len(signatures), dtype=bool)
    # Cut into max_bits + 1 bands, two hashes with at most max_bits differing bits agree in one band at least.
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    tables: list[dict[int, list[int]]] = [{} for _ in edges[1:]]
    kept: dict[int, bool] = {}
    for number, (signature, group) in enumerate(zip(signatures.tolist(), groups.tolist(), strict=True)):
        if signature == 0:
            continue
        if group not in kept:
            bands = [
                (signature >> int(low)) & ((1 << int(high - low)) - 1)
                for low, high in zip(edges, edges[1:], strict=False)
            ]
            near = (table.get(band, ()) for table, band in zip(tables, bands, strict=True))
            kept[group] = not any((other ^ signature).bit_count() <= max_bits for others in near for other in others)
            if kept[group]:
                for table, band in zip(tables, bands, strict=True):
                    table.setdefault(band, []).append(signature)
        repeated[number] = not kept[group]
    return repeated
