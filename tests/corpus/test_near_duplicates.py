"""Similar texts and images are left out when that is asked for."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.corpus import parse_corpus
from megatron_anyexperts.corpus.scan import ACCEPTED, Scan
from megatron_anyexperts.corpus.workers import Share
from tests.corpus.planned import plan_in_parts
from tests.corpus.raw import corpus_of, write

TEXT = (
    "The quick brown fox jumps over a lazy dog and then runs home through wet grass to its warm den, where four cubs "
    "wait for the supper that it has not caught today, because the dog was not quite as lazy as it had seemed to be "
    "in the morning, when the sun was low and the farmer still asleep behind his closed green shutters."
)


def drawing(shift: int, quality: int, size: int = 128) -> bytes:
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((10 + shift, 20, 70 + shift, 90), fill="red")
    draw.rectangle((80, 60 + shift, 120, 110), fill="blue")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_a_text_with_few_changes_is_left_out_and_a_different_one_stays(tmp_path):
    write(tmp_path / "text/a.txt", TEXT)
    write(tmp_path / "text/b.txt", TEXT + " At last.")
    write(tmp_path / "text/c.txt", " ".join(reversed(TEXT.split())))
    corpus = corpus_of(
        tmp_path, {"type": "text_folder", "path": "text"}, dedup={"near_text": 0.8}, validation_fraction=0
    )
    manifest = build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["samples"] == 2 and manifest["rejected"] == {"near-duplicate text": 1}


def test_a_recompressed_image_is_left_out_but_captions_in_other_languages_stay(tmp_path):
    for name, data in {"a": drawing(0, 95), "b": drawing(0, 40), "c": drawing(30, 95)}.items():
        write(tmp_path / f"images/{name}.jpg", data)
        write(tmp_path / f"images/{name}.json", f'{{"en": "Shapes {name}", "fr": "Formes {name}"}}')
    corpus = corpus_of(
        tmp_path, {"type": "image_folder", "path": "images"}, dedup={"near_image": 6}, validation_fraction=0
    )
    manifest = build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["samples"] == 4 and manifest["rejected"] == {"near-duplicate image": 2}


@given(
    bases=st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=6),
    flips=st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=6)), max_size=12),
    bits=st.integers(0, 8),
)
def test_image_search_by_bands_finds_what_comparing_all_pairs_finds(bases, flips, bits):
    hashes = list(bases)
    for base, positions in flips:
        value = bases[base % len(bases)]
        for position in positions:
            value ^= 1 << position
        hashes.append(value or 1)
    expected, kept = [], []
    for value in hashes:
        near = any((value ^ other).bit_count() <= bits for other in kept)
        expected.append(near)
        if not near:
            kept.append(value)
    rows = [(number, 0, number, number, 1, 1) for number in range(len(hashes))]
    facts: list[list] = [[]] * len(rows)
    scan = Scan(np.array(rows, ACCEPTED), facts, [], np.empty((0, 64), np.uint64), np.array(hashes, np.uint64))
    sources = [{"type": "text_folder", "path": "."}]
    corpus = parse_corpus({"name": "x", "sources": sources, "dedup": {"near_image": bits}})
    _, left_out, _ = plan_in_parts(corpus, [scan])
    assert left_out == [(0, number, "near-duplicate image") for number in np.flatnonzero(expected)]
