"""The plan: every accepted sample in exactly one shard, or named as a duplicate, the same for everybody."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.corpus import Dedup, Shards, parse_corpus
from megatron_anyexperts.corpus.plan import Plan, Span, cut, is_validation, split_warnings
from megatron_anyexperts.corpus.scan import ACCEPTED, Scan
from megatron_anyexperts.corpus.summary import summary
from megatron_anyexperts.corpus.workers import Share
from megatron_anyexperts.data.blend import check_splits
from megatron_anyexperts.data.faults import DataFeedError
from tests.corpus.planned import plan_in_parts
from tests.corpus.raw import corpus_of, png, write

CORPUS = parse_corpus({"name": "x", "sources": [{"type": "text_folder", "path": "."}]})

GROUP = st.sampled_from([0, 2**62, 2**64 - 1])
ROW = st.tuples(st.integers(0, 5), st.integers(0, 3), GROUP, st.integers(1, 900), st.integers(0, 5))


def scan_of(rows) -> Scan:
    table = np.array(
        [(high, low, group, position, size, kind) for position, (high, low, group, size, kind) in enumerate(rows)],
        ACCEPTED,
    )
    return Scan(table, [[]] * len(rows), [], np.empty((0, 64), np.uint64), np.empty(0, np.uint64))


CHUNKS = st.lists(st.lists(ROW, max_size=12), min_size=1, max_size=6).filter(any)
SCANS = CHUNKS.map(lambda chunks: [scan_of(rows) for rows in chunks])


@given(scans=SCANS, seed=st.integers(-9, 9), exact=st.booleans(), most=st.integers(1, 7), size=st.integers(1, 2000))
def test_every_sample_is_in_one_shard_or_a_duplicate(scans, seed, exact, most, size):
    corpus = CORPUS.model_copy(
        update={
            "seed": seed,
            "dedup": Dedup(exact=exact),
            "shards": Shards(max_samples=most, max_bytes=size),
            "validation_fraction": 0.3,
        }
    )
    shards, duplicates, _ = plan_in_parts(corpus, scans)
    placed = [(int(c), int(p)) for s in shards for c, p in zip(s.chunks, s.samples["position"], strict=True)]
    left_out = [(chunk, position) for chunk, position, _ in duplicates]
    everything = [(number, row) for number, scan in enumerate(scans) for row in range(len(scan.accepted))]
    assert sorted(placed + left_out) == everything
    for shard in shards:
        assert 1 <= len(shard.samples) <= most
        assert len(shard.samples) == 1 or shard.samples["bytes"].sum() <= size
        kind, split, _ = shard.name.split("/")
        assert set(shard.samples["group"] < np.uint64(int(0.3 * 2**64))) == {split == "val"}
    for folder in {shard.name.rpartition("/")[0].split("/")[0] for shard in shards}:
        keys = [key for shard in shards if shard.name.startswith(f"{folder}/") for key in shard.sample_keys()]
        assert len(keys) == len(set(keys))
    contents = [(int(r["hash_high"]), int(r["hash_low"])) for shard in shards for r in shard.samples]
    if exact:
        assert len(contents) == len(set(contents))
    else:
        assert not left_out


@given(sizes=st.lists(st.integers(0, 50), max_size=60), most=st.integers(1, 9), size=st.integers(1, 120))
def test_cutting_covers_everything_and_closes_a_shard_only_when_the_next_sample_does_not_fit(sizes, most, size):
    slices = cut(np.array(sizes, dtype=np.int64), Shards(max_samples=most, max_bytes=size))
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(len(sizes)))
    for part, following in zip(slices, slices[1:], strict=False):
        held = sizes[part]
        assert len(held) == most or sum(held) + sizes[following.start] > size


def test_the_validation_share_is_what_was_asked_for():
    groups = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    assert abs(is_validation(groups, 0.03).mean() - 0.03) < 0.002
    assert not is_validation(groups, 0.0).any()


def test_another_seed_gives_another_order_of_the_same_samples():
    scans = [scan_of([(number * 10 + row, 0, 2**64 - 1, 10, 0) for row in range(10)]) for number in range(20)]

    def order(seed):
        shards, *_ = plan_in_parts(CORPUS.model_copy(update={"seed": seed}), scans)
        return [key for shard in shards for key in shard.sample_keys()]

    assert order(0) != order(1) and sorted(order(0)) == sorted(order(1))


@settings(max_examples=200)
@given(
    groups=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12), fraction=st.sampled_from([0, 0.01, 0.5, 0.9])
)
def test_a_kind_that_falls_to_one_side_is_warned_about_with_a_fraction_that_helps(groups, fraction):
    warnings = split_warnings(Plan([], {"image": Span.of(np.array(groups, np.uint64))}, {}), fraction)
    splits = set(is_validation(np.array(groups, np.uint64), fraction).tolist())
    assert len(warnings) == (len(splits) == 1 and fraction > 0)
    for warning in warnings:
        advice = re.search(r"(?:raise it to|lower it to) ([\d.e-]+)", warning)
        if advice:
            helped = is_validation(np.array(groups, np.uint64), float(advice[1]))
            assert not helped.all() if "lower" in advice[0] else helped.any()


def test_the_summary_prints_the_warning_and_the_manifest_keeps_it(tmp_path):
    for number in range(12):
        write(tmp_path / f"images/{number}.png", png(number))
        write(tmp_path / f"images/{number}.txt", f"Picture {number}.")
    corpus = corpus_of(tmp_path, {"type": "image_folder", "path": "images"})
    manifest = build(corpus, tmp_path / "out", Share(), 0, True)
    [warning] = manifest["warnings"]
    assert "image: none of 12 samples is held out by validation_fraction=0.01" in warning
    assert "--eval-iters 0" in warning and f"warning: {warning}" in summary(manifest, tmp_path / "out")
    with pytest.raises(DataFeedError, match="has no val split.*--eval-iters 0.*validation_fraction"):
        check_splits(tmp_path / "out/blend.yaml", ["train", "val"])
    check_splits(tmp_path / "out/blend.yaml", ["train"])
    enough = float(re.search(r"raise it to ([\d.]+)", warning)[1])
    corpus = corpus_of(tmp_path, {"type": "image_folder", "path": "images"}, validation_fraction=enough)
    manifest = build(corpus, tmp_path / "more", Share(), 0, True)
    assert not manifest["warnings"] and manifest["kinds"]["image"].keys() == {"train", "val"}
