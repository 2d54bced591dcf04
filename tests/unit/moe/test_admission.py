"""Claims about selecting columns and admitting entries by sorted keys."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.moe.admission import admit, best


def _values(shape, seed, ties):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.round() if ties else values


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32), st.booleans())
def test_each_rank_admits_its_entries_of_highest_priority_and_of_equal_ones_the_first(tokens, width, ranks, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    priority = _values((tokens, width), seed, ties)
    valid = torch.rand(tokens, width, generator=generator) < 0.7
    rank = torch.randint(0, ranks, (tokens, width), generator=generator)
    limit = torch.randint(0, 5, (ranks,), generator=generator)
    expected = torch.zeros_like(valid).flatten()
    for r in range(ranks):
        mine = (valid & (rank == r)).flatten().nonzero().flatten()
        order = priority.flatten()[mine].sort(descending=True, stable=True).indices
        expected[mine[order[: limit[r]]]] = True
    assert torch.equal(admit(priority, valid, rank, limit), expected.view_as(valid))


@given(st.integers(0, 5), st.integers(1, 300), st.integers(0, 2**32), st.booleans())
def test_the_best_columns_are_those_of_a_stable_sort_up_to_near_ties(rows, columns, seed, ties):
    values = _values((rows, columns), seed, ties)
    count = min(columns, 1 + seed % 12)
    found = best(values, count)
    expected = values.sort(dim=1, descending=True, stable=True)
    if ties:
        assert torch.equal(found, expected.indices[:, :count])
    torch.testing.assert_close(values.gather(1, found), expected.values[:, :count], rtol=2**-13, atol=0)
