"""First stages: count what the scans hold, form groups, and bring rows and signatures into files of their own."""

import json
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.corpus import Shards
from megatron_anyexperts.corpus.near import PERMUTATIONS
from megatron_anyexperts.corpus.plan import chunk_order, cut
from megatron_anyexperts.corpus.planning.layout import ROW, SCANS_OF_CENSUS, Layout
from megatron_anyexperts.corpus.planning.repeats import save_firsts
from megatron_anyexperts.corpus.scan import load_outcome, load_planned, scan_path
from megatron_anyexperts.corpus.unforeseen import UNFORESEEN


def census(layout: Layout, number: int, folder: Path) -> None:
    """Count the accepted items of each of a thousand scans, all items, and the unforeseen errors."""
    counts, items, errors, example = [], 0, 0, None
    first = number * SCANS_OF_CENSUS
    for chunk in range(first, min(first + SCANS_OF_CENSUS, layout.chunks)):
        accepted, rejected = load_outcome(scan_path(layout.work, chunk))
        counts.append(accepted)
        items += accepted + len(rejected)
        unforeseen = [line for line in rejected if line["reason"] == UNFORESEEN]
        errors += len(unforeseen)
        example = unforeseen[-1] if unforeseen else example
    np.array(counts, dtype="<i8").tofile(folder / "counts.bin")
    found = {"accepted": sum(counts), "items": items, "errors": errors, "example": example}
    (folder / "census.json").write_text(json.dumps(found))


def groups(layout: Layout, _: None, folder: Path) -> None:
    """Cut the chunks in plan order into groups."""
    censuses = range(-(-layout.chunks // SCANS_OF_CENSUS))
    counts = np.concatenate([np.fromfile(layout.part("census", number) / "counts.bin", "<i8") for number in censuses])
    order = chunk_order(layout.chunks, layout.corpus.seed)
    limits = Shards(max_samples=max(1, len(order)), max_bytes=layout.sizes.group_rows)
    stops = [part.stop for part in cut(counts[order], limits)]
    rows = np.concatenate([[0], np.cumsum(counts[order])])
    order.astype("<i8").tofile(folder / "order.bin")
    np.array([0, *stops], dtype="<i8").tofile(folder / "chunks.bin")
    rows[[0, *stops]].astype("<i8").tofile(folder / "rows.bin")


def spill(layout: Layout, group: int, folder: Path) -> None:
    """Store rows and signatures of a group, and the first occurrence of every content and text signature in it."""
    keys = []
    with (
        open(folder / "rows.bin", "wb") as rows,
        open(folder / "text-signatures.bin", "wb") as texts,
        open(folder / "image-signatures.bin", "wb") as images,
    ):
        for chunk in layout.chunks_of(group).tolist():
            accepted, text_signatures, image_signatures = load_planned(scan_path(layout.work, chunk))
            part = np.empty(len(accepted), ROW)
            part["sample"], part["chunk"] = accepted, chunk
            part.tofile(rows)
            # The hash functions of datasketch give 32 bits.
            text_signatures = text_signatures.astype("<u4")
            text_signatures.tofile(texts)
            image_signatures.astype("<u8").tofile(images)
            keys += [
                blake2b(signature, digest_size=16, person=b"%d" % kind).digest()
                for signature, kind in zip(text_signatures, accepted["kind"].tolist(), strict=False)
            ]
    contents = np.fromfile(folder / "rows.bin", ROW)["sample"]
    save_firsts(layout, folder / "content", contents["hash_high"].copy(), contents["hash_low"].copy())
    if layout.corpus.dedup.near_text is not None:
        high, low = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2).T.copy()
        np.concatenate([high, low]).tofile(folder / "text-keys.bin")
        save_firsts(layout, folder / "text", high, low)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values evenly (the finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def text_signatures(layout: Layout, group: int) -> np.ndarray:
    """MinHash signatures of a group, uint32 [n, PERMUTATIONS], mapped."""
    return _mapped(layout.part("spill", group) / "text-signatures.bin", "<u4").reshape(-1, PERMUTATIONS)


def image_signatures(layout: Layout, group: int) -> np.ndarray:
    """Perceptual hashes of a group, uint64 [n], mapped."""
    return _mapped(layout.part("spill", group) / "image-signatures.bin", "<u8")


def text_keys(layout: Layout, group: int) -> np.ndarray:
    """High and low half of a hash of kind and text signature, uint64 [2, n]."""
    return np.fromfile(layout.part("spill", group) / "text-keys.bin", "<u8").reshape(2, -1)


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
