"""Rows of a group that each kind of deduplication leaves to the next."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.planning.layout import Layout
from megatron_anyexperts.corpus.planning.parts import load_bits
from megatron_anyexperts.corpus.planning.repeats import answers, count_earlier, first_and_earlier, save_firsts
from megatron_anyexperts.corpus.planning.spill import image_signatures, mix, text_keys

REASONS = ("exact duplicate", "near-duplicate text", "near-duplicate image")
"""Why a row is left out, numbered from 1; 0 stands for a row that stays."""
EXACT, TEXT, IMAGE = range(1, 4)


def kept(layout: Layout, group: int, folder: Path) -> None:
    """Store what exact and text deduplication say of each row, and the first row of every image that is left."""
    dedup, samples = layout.corpus.dedup, layout.rows_of(group)["sample"]
    repeats = count_earlier(layout, "content", group, samples["hash_high"].copy(), samples["hash_low"].copy())
    reasons = np.zeros(len(samples), np.uint8)
    if dedup.near_text is not None:
        repeated = count_earlier(layout, "text", group, *text_keys(layout, group)) > 0
        start, stop = layout.row_starts[group : group + 2].tolist()
        dropped = load_bits(layout.decided("text") / "dropped.bits", np.arange(start, stop))
        reasons[repeated | dropped] = TEXT
    if dedup.exact:
        reasons[repeats > 0] = EXACT
    reasons.tofile(folder / "reasons.bin")
    repeats.tofile(folder / "repeats.bin")
    if dedup.near_image is not None:
        signatures = image_signatures(layout, group)
        rows = np.flatnonzero((reasons == 0) & (signatures != 0))
        keys = signatures[rows]
        save_firsts(layout, folder / "image", mix(keys), keys, samples["group"][rows], rows)


def kept_reasons(layout: Layout, group: int) -> np.ndarray:
    """What `kept` stored, uint8 [n]."""
    return np.fromfile(layout.part("kept", group) / "reasons.bin", np.uint8)


@dataclass(frozen=True)
class ImageSurvivors:
    """The M rows of a group that exact and text deduplication leave and that have an image."""

    rows: np.ndarray
    """int64 [M], ascending."""
    leaders: np.ndarray
    """int64 [M], first surviving row of the corpus with the same signature."""
    foreign: np.ndarray
    """bool [M], whether that row has another image."""


def image_survivors(layout: Layout, group: int) -> ImageSurvivors:
    """Who is left of a group when images are compared."""
    signatures = image_signatures(layout, group)
    rows = np.flatnonzero((kept_reasons(layout, group) == 0) & (signatures != 0))
    keys, labels = signatures[rows], layout.rows_of(group)["sample"]["group"]
    first, _ = first_and_earlier(mix(keys), keys)
    leaders, leading = layout.row_starts[group] + np.arange(len(labels)), labels.copy()
    for answer in answers(layout, "image", group):
        leaders[answer["row"]], leading[answer["row"]] = answer["leader"], answer["label"]
    return ImageSurvivors(rows, leaders[rows[first]], leading[rows[first]] != labels[rows])


def verdict(layout: Layout, group: int, folder: Path) -> None:
    """Store why each row is left out, when similar images are looked for as well."""
    reasons, images = kept_reasons(layout, group), image_survivors(layout, group)
    dropped = load_bits(layout.decided("image") / "dropped.bits", images.leaders)
    reasons[images.rows[images.foreign | dropped]] = IMAGE
    reasons.tofile(folder / "reasons.bin")


def verdict_of(layout: Layout, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Why each row of a group is left out, uint8 [n], and how often its content occurs before, int64 [n]."""
    last = "kept" if layout.corpus.dedup.near_image is None else "verdict"
    reasons = np.fromfile(layout.part(last, group) / "reasons.bin", np.uint8)
    return reasons, np.fromfile(layout.part("kept", group) / "repeats.bin", "<i8")
