"""Megatron's roll of packed rows, done in one go, equals Megatron's."""

import inspect
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction

from megatron_anyexperts.platform import packed_rows
from megatron_anyexperts.platform.cut_rows import cut_places, roll_cut
from megatron_anyexperts.platform.packed_rows import roll_left
from megatron_anyexperts.row_cut import held_places

STOCK = inspect.unwrap(multi_token_prediction._roll_tensor_packed_seq)


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    behind=st.integers(0, 3),
    dtype=st.sampled_from([torch.int64, torch.float32, torch.bool]),
)
def test_it_equals_megatrons_loop_over_documents(lengths, behind, dtype):
    size = sum(lengths) + behind
    values = torch.arange(2 * size).view(2, size).add(1).to(dtype)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    rolled, total = STOCK(values, -1, -1, PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders))
    assert torch.equal(roll_left(values, borders), rolled) and total == rolled.sum()


@given(
    chunks=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    ranks=st.integers(2, 4),
    dtype=st.sampled_from([torch.int64, torch.float32, torch.bool]),
)
def test_cut_rows_roll_like_whole_ones(chunks, ranks, dtype):
    lengths = [2 * ranks * chunk for chunk in chunks]
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    places = torch.from_numpy(held_places(lengths, ranks))
    assert torch.equal(cut_places(borders, places.shape[1], ranks), places)
    whole = (torch.arange(2 * sum(lengths)).view(2, -1) % 7).to(dtype)
    parts = whole[:, places].transpose(0, 1)
    assert torch.equal(roll_cut(parts, borders), roll_left(whole, borders)[:, places].transpose(0, 1))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(multi_token_prediction, "_roll_tensor_packed_seq", STOCK)
    packed_rows.install()
    packed_rows.install()


def test_megatrons_own_call_takes_it(installed):
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 2, 5]))
    rolled, total = multi_token_prediction.roll_tensor(torch.arange(5)[None], -1, -1, None, params)
    assert rolled.tolist() == [[1, 0, 3, 4, 0]] and total == 8
    assert inspect.unwrap(multi_token_prediction._roll_tensor_packed_seq) is STOCK
    with pytest.raises(ValueError, match="shifts=-2"):
        multi_token_prediction.roll_tensor(torch.arange(5)[None], -2, -1, None, params)
