"""What can be similar shares a key in a table: bands of MinHash signatures, agreeing parts of perceptual hashes."""

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from megatron_anyexperts.corpus.near import PERMUTATIONS, text_bands
from megatron_anyexperts.corpus.planning.layout import Layout
from megatron_anyexperts.corpus.planning.parts import save_parts
from megatron_anyexperts.corpus.planning.repeats import count_earlier
from megatron_anyexperts.corpus.planning.spill import image_signatures, mix, text_keys, text_signatures
from megatron_anyexperts.corpus.planning.survivors import image_survivors

KEYED = np.dtype([("key", "<u8"), ("row", "<u4")])
"""A key in one table, and the row of a group that has it."""

MOST_TABLES = 500


class Search(Protocol):
    """How one kind of signature is compared."""

    name: ClassVar[str]
    tables: int
    """T: two similar signatures have the same key in one of the tables at least, or are not candidates."""

    def signatures(self, layout: Layout, group: int) -> np.ndarray:
        """Signatures of the rows of a group, [n, ...]."""

    def leaders(self, layout: Layout, group: int) -> np.ndarray:
        """Rows of a group that are compared: the first with each signature, ascending, int64."""

    def key(self, table: int, signatures: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """Keys in one table, uint64 [n]."""

    def similar(self, table: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which pairs of signatures are similar, and have this as the first table in which they agree, bool [n]."""


@dataclass(frozen=True)
class TextSearch:
    """Texts of one kind whose signatures agree in a band of MinHash LSH and in a share of all values."""

    name: ClassVar[str] = "text"
    threshold: float

    @property
    def tables(self) -> int:
        return text_bands(self.threshold)[0]

    def signatures(self, layout: Layout, group: int) -> np.ndarray:
        return text_signatures(layout, group)

    def leaders(self, layout: Layout, group: int) -> np.ndarray:
        return np.flatnonzero(count_earlier(layout, "text", group, *text_keys(layout, group)) == 0)

    def key(self, table: int, signatures: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        _, width = text_bands(self.threshold)
        key = mix(kinds.astype(np.uint64) + np.uint64(1))
        for column in range(table * width, (table + 1) * width):
            key = mix(key ^ signatures[:, column])
        return key

    def similar(self, table: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        bands, width = text_bands(self.threshold)
        same = first == second
        found = same.sum(axis=1) / PERMUTATIONS >= self.threshold
        agree = same[found, : bands * width].reshape(-1, bands, width).all(axis=2)
        found[found] = agree[:, table] & (agree.argmax(axis=1) == table)
        return found


@dataclass(frozen=True)
class ImageSearch:
    """Images whose perceptual hashes differ in few bits.

    Two hashes with at most d differing bits agree in m - d of m parts at least; a table looks at m - d of them.
    """

    name: ClassVar[str] = "image"
    max_bits: int
    masks: tuple[int, ...]
    """Bits that each table looks at."""

    @classmethod
    def for_rows(cls, max_bits: int, rows: int) -> "ImageSearch":
        """With as many parts as make the search cheapest: many tables, or many members of one key."""

        def cost(parts: int) -> float:
            bits = 64 * (parts - max_bits) / parts
            return math.comb(parts, max_bits) * (1 + rows / 2 / 2**bits)

        choices = range(max_bits + 1, 65)
        parts = min((m for m in choices if math.comb(m, max_bits) <= MOST_TABLES), key=cost)
        edges = np.linspace(0, 64, parts + 1).astype(int).tolist()
        pieces = [(1 << high) - (1 << low) for low, high in zip(edges, edges[1:], strict=False)]
        return cls(max_bits, tuple(sum(chosen) for chosen in combinations(pieces, parts - max_bits)))

    @property
    def tables(self) -> int:
        return len(self.masks)

    def signatures(self, layout: Layout, group: int) -> np.ndarray:
        return image_signatures(layout, group)

    def leaders(self, layout: Layout, group: int) -> np.ndarray:
        images = image_survivors(layout, group)
        return images.rows[images.leaders == layout.row_starts[group] + images.rows]

    def key(self, table: int, signatures: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        return mix(signatures & np.uint64(self.masks[table]))

    def similar(self, table: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        different = first ^ second
        found = np.bitwise_count(different) <= self.max_bits
        agree = found & (different & np.uint64(self.masks[table]) == 0)
        for mask in self.masks[:table]:
            left = np.flatnonzero(agree)
            if not len(left):
                break
            agree[left] = different[left] & np.uint64(mask) != 0
        return agree


def bands(search: Search, layout: Layout, group: int, folder: Path) -> None:
    """Store the keys of the leaders of a group in every table, by bucket."""
    rows = search.leaders(layout, group)
    signatures = search.signatures(layout, group)[rows]
    kinds = layout.rows_of(group)["sample"]["kind"][rows]

    def tables():
        for table in range(search.tables):
            records = np.empty(len(rows), KEYED)
            records["key"], records["row"] = search.key(table, signatures, kinds), rows
            yield records, layout.bucket_of(records["key"])

    save_parts(folder / "bands", tables(), layout.buckets)
