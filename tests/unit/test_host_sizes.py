"""Counts of a microbatch that stay on the host."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.host_sizes import HostSizes

few = st.lists(st.integers(1, 9), min_size=1, max_size=5)


ranges = st.lists(st.tuples(st.integers(0, 9), st.integers(10, 19)), max_size=3).map(tuple)


@given(
    rows=st.lists(few, max_size=3),
    grids=st.lists(st.tuples(*[st.integers(1, 9)] * 3)),
    clips=st.lists(few),
    first_frames=st.lists(st.integers(0, 9)),
    taken=st.none() | st.tuples(ranges, ranges),
)
def test_they_survive_a_message_whatever_follows(rows, grids, clips, first_frames, taken):
    counted = tuple(map(tuple, rows)), tuple(grids), tuple(map(sum, clips)), (len(grids), len(clips))
    sizes = HostSizes(*counted, tuple(first_frames), taken)
    assert HostSizes.from_list([*sizes.to_list(), 0, 0]) == sizes


@given(lengths=few, padding=st.integers(0, 3))
def test_documents_are_runs_of_a_row_padding_among_them(lengths, padding):
    row = [number for number, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding
    found = HostSizes.of(np.array([row, row[::-1]])).documents
    expected = (*lengths, padding) if padding else tuple(lengths)
    assert found == (expected, expected[::-1])


def test_placeholders_are_those_of_vision_and_of_audio():
    assert HostSizes.of(token_modality=np.array([[0, 1, 2, 3, 3, -1]])).placeholders == (3, 1)
    assert HostSizes.of() == HostSizes()
