"""The plan that is made in parts is the one that its definition makes in one pass, however small the parts are."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.corpus.corpus import CorpusError, Dedup, Shards, parse_corpus
from megatron_anyexperts.corpus.near import PERMUTATIONS
from megatron_anyexperts.corpus.planning.layout import Layout, Sizes
from megatron_anyexperts.corpus.planning.pipeline import ENDED_BY_ANOTHER, discard_parts, make_plan, take_census
from megatron_anyexperts.corpus.planning.repeats import first_and_earlier
from megatron_anyexperts.corpus.planning.similar import ImageSearch
from megatron_anyexperts.corpus.scan import ACCEPTED, Scan, scan_path
from tests.corpus.plan_definition import define_plan
from tests.corpus.planned import layout_of, plan_in_parts, plan_on_disk, run_here

CORPUS = parse_corpus({"name": "x", "sources": [{"type": "text_folder", "path": "."}]})


def spread(value: int) -> int:
    """An evenly spread 64-bit hash of a small number."""
    return (value + 1) * 0x9E3779B97F4A7C15 % 2**64


TEXTS = [np.random.default_rng(number).integers(0, 2**32, PERMUTATIONS, dtype=np.uint64) for number in range(3)]


def text_signature(base: int, changed: int) -> np.ndarray:
    """The signature of a text of which some values differ from those of its base."""
    signature = TEXTS[base].copy()
    signature[np.random.default_rng(changed).choice(PERMUTATIONS, changed, replace=False)] = changed
    return signature


# A sample: kind, base text, changed values, picture (0 for none), size.
SAMPLE = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 16), st.integers(0, 12), st.integers(1, 900))
CHUNKS = st.lists(st.lists(SAMPLE, max_size=8), min_size=1, max_size=6).filter(any)


def scan_of(samples) -> Scan:
    rows, texts, images = [], [], []
    for position, (kind, base, changed, picture, size) in enumerate(samples):
        content = spread(hash((kind, base, changed, picture)) % 2**40)
        # Pictures 1 and 7, 2 and 8 ... are recompressed copies; a picture alone says in which group a sample is.
        signature = spread(picture % 6) ^ (picture // 6 * 0b111) if picture else 0
        rows.append((content, content // 3, spread(100 + picture) if picture else content, position, size, kind))
        texts.append(text_signature(base, changed))
        images.append(signature)
    return Scan(
        np.array(rows, ACCEPTED),
        [[]] * len(rows),
        [],
        np.array(texts, np.uint64).reshape(-1, PERMUTATIONS),
        np.array(images, np.uint64),
    )


@settings(max_examples=60)
@given(
    chunks=CHUNKS,
    exact=st.booleans(),
    text=st.sampled_from([None, 0.5, 0.8, 0.97, 1.0]),
    image=st.sampled_from([None, 0, 3, 8]),
    rows=st.integers(1, 9),
    pivots=st.integers(1, 3),
)
def test_the_plan_in_parts_is_the_plan_of_one_pass(chunks, exact, text, image, rows, pivots):
    corpus = CORPUS.model_copy(
        update={
            "dedup": Dedup(exact=exact, near_text=text, near_image=image),
            "shards": Shards(max_samples=5, max_bytes=2000),
            "validation_fraction": 0.3,
        }
    )
    scans = [scan_of(samples) for samples in chunks]
    found, left_out, spans = plan_in_parts(corpus, scans, Sizes(rows, rows, pivots, rows))
    shards, duplicates = define_plan(corpus, scans)
    assert [shard.digest for shard in found] == [shard.digest for shard in shards]
    assert [shard.sample_keys() for shard in found] == [shard.sample_keys() for shard in shards]
    assert left_out == duplicates
    for kind, span in spans.items():
        groups = np.concatenate([s.samples["group"] for s in shards if s.name.startswith(f"{kind}/")])
        assert span == (len(groups), groups.min(), groups.max())


@pytest.mark.parametrize("similar", [True, False])
def test_many_members_of_one_key_are_decided_in_few_rounds(tmp_path, similar):
    signatures = np.tile(TEXTS[0], (300, 1))
    # All share the bands of the first values; the others make them similar or not.
    signatures[:, 22:] = np.random.default_rng(0).integers(0, 2**32, (300, 42))
    if similar:
        signatures[:, 30:] = TEXTS[0][30:]
    scan = scan_of([(0, 0, 0, 0, 10)] * 300)
    scan.accepted["hash_high"] = [spread(number) for number in range(300)]
    scan = Scan(scan.accepted, scan.facts, [], signatures, scan.image_signatures)
    corpus = CORPUS.model_copy(update={"dedup": Dedup(near_text=0.8)})
    plan = plan_on_disk(corpus, [scan], tmp_path, Sizes(50, 50, 4, 40))
    assert [shard.digest for shard in plan.shards] == [shard.digest for shard in define_plan(corpus, [scan])[0]]
    assert plan.spans["text"].samples == (1 if similar else 300)
    rounds = len(list((tmp_path / "plan").glob("*/text-round/*/*")))
    assert rounds == (1 if similar else 4)  # 4, 32, 256 pivots and the rest


def test_participants_in_any_order_and_interrupted_make_the_same_plan(tmp_path):
    scans = [scan_of([(0, n % 3, n % 5, n % 7, 10 + n)] * 2) for n in range(12)]
    corpus = CORPUS.model_copy(update={"dedup": Dedup(near_text=0.8, near_image=3)})
    expected = [shard.digest for shard in plan_on_disk(corpus, scans, tmp_path / "whole").shards]
    layout = layout_of(corpus, scans, tmp_path / "shared")
    for stop in itertools.count(1, 3):
        left = stop

        def run(steps, part=stop % 2):
            nonlocal left
            for step in steps[:: -1 if part else 1]:
                if not step.done():
                    if not left:
                        raise KeyboardInterrupt
                    left -= 1
                    step.run()

        try:
            take_census(layout, run)
            plan = make_plan(layout, run)
            break
        except KeyboardInterrupt:
            continue
    assert stop > 20 and [shard.digest for shard in plan.shards] == expected
    discard_parts(layout)
    assert {path.name for path in layout.folder.iterdir()} == {"census", "shards"}
    assert [shard.load().digest for shard in make_plan(layout, run).shards] == expected


def test_a_scan_that_was_made_again_makes_another_plan(tmp_path):
    first = plan_on_disk(CORPUS, [scan_of([(0, 0, 0, 0, 10)]), scan_of([(0, 1, 0, 0, 10)])], tmp_path)
    scan_path(tmp_path, 1).unlink()
    second = plan_on_disk(CORPUS, [scan_of([]), scan_of([(0, 1, 1, 0, 10), (0, 2, 1, 0, 10)])], tmp_path)
    assert first.spans["text"].samples == 2 and second.spans["text"].samples == 3
    layout = Layout(CORPUS, tmp_path, "0", 3)
    with pytest.raises(CorpusError, match=ENDED_BY_ANOTHER):
        take_census(layout, run_here)


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_first_and_earlier_rows_of_equal_keys(pairs):
    high, low = (np.array([pair[i] for pair in pairs], dtype=np.uint64) for i in (0, 1))
    first, earlier = first_and_earlier(high, low)
    assert earlier.tolist() == [pairs[:i].count(pair) for i, pair in enumerate(pairs)]
    assert first.tolist() == [pairs.index(pair) for pair in pairs]


@given(
    max_bits=st.integers(0, 15),
    rows=st.sampled_from([10, 10**6, 10**9]),
    value=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_close_hashes_meet_in_exactly_one_table(max_bits, rows, value, data):
    search = ImageSearch.for_rows(max_bits, rows)
    flips = data.draw(st.sets(st.integers(0, 63), max_size=max_bits + 2))
    first, second = np.array([value], np.uint64), np.array([value ^ sum(1 << bit for bit in flips)], np.uint64)
    found = [table for table in range(search.tables) if search.similar(table, first, second)[0]]
    assert len(found) == (len(flips) <= max_bits)
    for table in found:
        assert search.key(table, first, first) == search.key(table, second, second)
