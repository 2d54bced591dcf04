import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from megatron_anyexperts.row_cut import held_places, original_places, padded_documents

ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
RANKS = st.integers(1, 5)


@given(ROWS, RANKS, st.sampled_from([1, 2, 3, 16]))
def test_every_place_is_on_one_rank_once(lengths, ranks, multiple):
    padded = padded_documents(lengths, ranks, multiple)
    held = held_places(padded, ranks)
    assert sorted(held.flatten()) == list(range(sum(padded)))
    assert held.shape[1] % multiple == 0
    before = original_places(lengths, padded)[held]
    assert sorted(before[before >= 0]) == list(range(sum(lengths)))


@given(ROWS, RANKS)
def test_every_rank_attends_to_as_many_pairs(lengths, ranks):
    padded = padded_documents(lengths, ranks)
    in_document = np.concatenate([np.arange(length) for length in padded])
    pairs = (in_document + 1)[held_places(padded, ranks)].sum(1)
    assert len(set(pairs)) == 1


@given(ROWS, RANKS)
def test_documents_stay_in_order_and_whole(lengths, ranks):
    padded = padded_documents(lengths, ranks)
    assert all(0 <= after - before < 2 * ranks for before, after in zip(lengths, padded, strict=False))
    assert len(padded) - len(lengths) in (0, 1)
    before = original_places(lengths, padded)
    assert (np.diff(before[before >= 0]) == 1).all()
    assert (np.diff(held_places(padded, ranks)) > 0).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 60), RANKS)
def test_padding_is_used_before_a_row_grows(lengths, padding, ranks):
    added = sum(-length % (2 * ranks) for length in lengths)
    row = [*lengths, padding] if padding else lengths
    whole = sum(row)
    grown = sum(padded_documents(row, ranks)) - whole
    assert grown < max(added, 2 * ranks) + 2 * ranks


@given(ROWS, st.integers(2, 5))
def test_ranks_hold_what_megatron_turns_by(lengths, ranks):
    padded = padded_documents(lengths, ranks)
    held = held_places(padded, ranks)
    for rank in range(ranks):
        start, expected = 0, []
        for length in padded:
            part = torch.empty(length // ranks)
            positions = torch.arange(length)
            expected.append(start + _get_thd_freqs_on_this_cp_rank(rank, ranks, part, positions))
            start += length
        assert held[rank].tolist() == torch.cat(expected).tolist()
