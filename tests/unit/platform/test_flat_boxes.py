"""Boxes of a flat range hold its elements, each once."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_anyexperts.platform.flat_boxes import boxes_of_range


@st.composite
def cases(draw):
    """A view of a contiguous tensor, narrowed in some dimensions as factories do, and a range of its storage."""
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    view = torch.arange(torch.Size(shape).numel()).reshape(shape)
    storage = view.flatten()
    for dim, size in enumerate(shape):
        start = draw(st.integers(0, size))
        view = view.narrow(dim, start, draw(st.integers(0, size - start)))
    start = draw(st.integers(0, storage.numel()))
    return storage, view, start, draw(st.integers(start, storage.numel()))


@given(cases())
@example((torch.arange(6), torch.arange(6).reshape(3, 2), 2, 2))
def test_boxes_hold_exactly_the_elements_of_the_range(case):
    storage, view, start, stop = case
    boxes = boxes_of_range(view.shape, view.stride(), view.storage_offset(), start, stop)
    own = storage[start:stop]
    found = torch.zeros_like(view)
    for offsets, lengths, first in boxes:
        ours = own.as_strided(lengths, view.stride(), own.storage_offset() + first - start)
        there = tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
        assert torch.equal(view[there], ours)
        found[there] += 1
    assert torch.equal(found == 1, (view >= start) & (view < stop))
    assert not (found > 1).any()
    assert len(boxes) <= max(1, 2 * view.dim() - 1)


def test_rows_that_reach_into_each_other_are_refused():
    turned = torch.empty(4, 6).T
    with pytest.raises(ValueError, match="not row-major"):
        boxes_of_range(turned.shape, turned.stride(), 0, 0, 24)
