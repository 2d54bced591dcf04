import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.data.microbatch import FIELDS, Microbatch, collate, empty_microbatch, header_of, pack
from megatron_anyexperts.data.packing import assemble_row, pack_rows, row_order
from megatron_anyexperts.data.samples import Planned
from megatron_anyexperts.host_sizes import HostSizes
from megatron_anyexperts.media import MediaShape

SHAPE = MediaShape(patch_size=2, spatial_merge=1, n_mels=4, audio_stride=2)
LIMITS = (64, 40, 30)
SIZES = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 40), st.integers(0, 30)), max_size=60)


def sample(key: str, length: int, **fields) -> Planned:
    """A sample of `length` positions whose tokens tell where they come from."""
    start = 100 * (1 + ord(key))
    defaults = {
        "sample_modality": 0,
        "tokens": np.arange(start, start + length + 1),
        "target": np.ones(length + 1, bool),
        "modality": np.zeros(length + 1, np.int8),
        "frames": [],
        "grids": [],
        "clips": [],
    }
    return Planned(__key__=key, __restore_key__=(), **(defaults | fields))


@given(SIZES)
def test_every_sample_is_in_one_row_and_no_row_is_over_any_budget(sizes):
    rows = pack_rows(sizes, LIMITS)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    for row in rows:
        assert all(sum(sizes[i][axis] for i in row) <= limit for axis, limit in enumerate(LIMITS))


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_best_fit_leaves_at_most_one_row_half_empty(lengths):
    rows = pack_rows([(length,) for length in lengths], (64,))
    assert sum(sum(lengths[i] for i in row) <= 32 for row in rows) <= 1


def test_short_samples_fill_95_percent():
    lengths = np.random.default_rng(0).integers(8, 200, 512).tolist()
    rows = pack_rows([(length,) for length in lengths], (512,))
    assert sum(lengths) / (512 * len(rows)) > 0.95


def test_a_sample_beyond_a_limit_is_an_error():
    with pytest.raises(ValueError, match=r"sample 1 takes \(3, 50\) of a row that offers \(8, 40\)"):
        pack_rows([(1, 1), (3, 50)], (8, 40))


@given(st.lists(st.lists(st.text("ab", min_size=1), min_size=1), max_size=10))
def test_row_order_is_a_permutation_that_depends_on_keys_alone(keys):
    order = row_order(keys)
    assert sorted(order) == list(range(len(keys)))
    swapped = row_order(keys[::-1])
    assert [keys[::-1][i] for i in swapped] == [keys[i] for i in order]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_documents_stay_apart_in_a_row(lengths):
    samples = [sample(chr(97 + i), length) for i, length in enumerate(lengths)]
    row = assemble_row(samples, 128, SHAPE, pad_id=0)
    start = 0
    for segment, (length, part) in enumerate(zip(lengths, samples, strict=True), start=1):
        span = slice(start, start + length)
        assert (row["segment_ids"][span] == segment).all()
        assert row["position_ids"][span].tolist() == list(range(length))
        assert (row["tokens"][span] == part.tokens[:-1]).all()
        assert (row["labels"][span] == part.tokens[1:]).all()  # never the first token of the next document
        start += length
    assert not row["loss_mask"][start:].any() and (row["segment_ids"][start:] == 0).all()
    assert (row["token_modality"][start:] == -1).all() and (row["sample_modality"][start:] == -1).all()


def test_media_of_a_microbatch_follow_the_order_of_their_placeholders():
    first = sample("a", 2, frames=[np.full((2, 12), 1.0, np.float32)], grids=[(1, 1, 2)])
    second = sample("b", 3, clips=[np.full((4, 4), 2.0, np.float32)])
    third = sample("c", 1, frames=[np.full((1, 12), 3.0, np.float32)], grids=[(1, 1, 1)])
    rows = [assemble_row(row, 8, SHAPE, pad_id=0) for row in ([first, second], [third])]
    microbatch = collate(rows, [["a", "b"], ["c"]])
    assert microbatch["image_patches"][:, 0].tolist() == [1.0, 1.0, 3.0]
    assert microbatch["image_grids"].tolist() == [[1, 1, 2], [1, 1, 1]]
    assert microbatch["audio_features"].shape == (4, 4) and microbatch["audio_lengths"].tolist() == [4]
    assert microbatch.sample_keys == [["a", "b"], ["c"]]


def test_a_text_microbatch_has_empty_media_of_the_right_width():
    microbatch = collate([assemble_row([sample("a", 2)], 4, SHAPE, pad_id=0)], [["a"]])
    assert microbatch["image_patches"].shape == (0, 12) and microbatch["image_grids"].shape == (0, 3)
    assert microbatch["audio_features"].shape == (0, 4) and microbatch["audio_lengths"].shape == (0,)


def test_too_many_positions_for_a_row_are_an_error():
    with pytest.raises(ValueError, match="samples of 6 positions do not fit a row of 4"):
        assemble_row([sample("a", 6)], 4, SHAPE, pad_id=0)


def test_a_microbatch_survives_the_journey_in_one_buffer():
    parts = [
        sample("a", 2, frames=[np.full((2, 12), 1.0, np.float32)], grids=[(1, 1, 2)]),
        sample("b", 3, clips=[np.full((5, 4), 2.0, np.float32)]),
    ]
    for row in ([parts[0]], [parts[1]], parts, [sample("c", 7)]):
        rows, keys = [assemble_row(row, 9, SHAPE, pad_id=0)], [[part.__key__ for part in row]]
        received = Microbatch(**pickle.loads(ForkingPickler.dumps(pack(rows, keys))))
        assert received.keys() == FIELDS.keys() == rows[0].keys() and received.sample_keys == keys
        for name, field in FIELDS.items():
            expected = torch.from_numpy(rows[0][name] if field.ragged else rows[0][name][None])
            assert torch.equal(received[name], expected) and received[name].dtype == field.dtype, name
        assert received.sizes == HostSizes.of(
            *(received[name].numpy() for name in ("segment_ids", "token_modality", "image_grids", "audio_lengths"))
        )


def test_a_header_describes_the_microbatch_that_follows_it():
    video = sample("a", 9, frames=[np.full((2, 12), 1.0, np.float32)], grids=[(1, 1, 2)])
    batch = collate([assemble_row([video, sample("b", 3)], 16, SHAPE, pad_id=0)] * 2, [["a", "b"]] * 2)
    empty = empty_microbatch(header_of(batch), torch.device("cpu"))
    assert (empty.shapes, empty.sizes, empty.buffer.shape) == (batch.shapes, batch.sizes, batch.buffer.shape)
