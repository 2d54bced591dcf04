import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.moe.slots import (
    entry_slots,
    integer_slots,
    last_slot_weight,
    slot_weights,
    soft_slots,
    trim_to_budget,
    virtual_cap,
)

seeds = st.integers(0, 2**31)
shares = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.29, 0.3, 0.5, 0.75, 0.9])


def scores(seed: int, tokens: int, real: int, virtual: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted scores; few levels make ties."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(0, levels, (tokens, real + virtual), generator=generator).float()
    return draw[:, :real].sort(descending=True).values, draw[:, real:].sort(descending=True).values


def best_eligible(real: list[float], virtual: list[float], slots: int, rho_max: float) -> set[int]:
    """The definition, word for word: the best `slots` of all real and the first floor(rho * slots) virtual columns."""
    eligible = [(-score, 0, rank, rank) for rank, score in enumerate(real)]
    eligible += [
        (-score, 1, rank, len(real) + rank) for rank, score in enumerate(virtual[: virtual_cap(slots, rho_max)])
    ]
    return {column for *_, column in sorted(eligible)[:slots]}


@given(seeds, st.integers(1, 9), shares, st.sampled_from([3, 1000]))
@settings(max_examples=150)
def test_entries_below_k_are_the_best_k_eligible_columns_for_every_k(seed, k_max, rho_max, levels):
    cap = virtual_cap(k_max, rho_max)
    real, virtual = scores(seed, 5, k_max, cap, levels)
    entry = entry_slots(real, virtual if cap else None, rho_max).expand(5, -1)
    for token in range(5):
        for slots in range(1, k_max + 1):
            used = set((entry[token] <= slots).nonzero().flatten().tolist())
            assert used == best_eligible(real[token].tolist(), virtual[token].tolist(), slots, rho_max)


@given(seeds, st.integers(1, 9), shares)
@settings(max_examples=60)
def test_each_further_slot_adds_one_column_and_takes_none_away(seed, k_max, rho_max):
    cap = virtual_cap(k_max, rho_max)
    real, virtual = scores(seed, 7, k_max, cap, 4)
    entry = entry_slots(real, virtual if cap else None, rho_max)
    for slots in range(1, k_max + 1):
        assert ((entry == slots).sum(1) == 1).all()


@given(st.integers(1, 40), shares)
def test_the_cap_leaves_at_least_one_real_slot(slots, rho_max):
    assert 0 <= virtual_cap(slots, rho_max) < slots


def test_the_cap_is_exact_where_floating_point_is_not():
    assert 0.29 * 100 < 29
    assert virtual_cap(100, 0.29) == 29


@given(seeds, st.integers(1, 6), st.integers(0, 6), st.floats(-1, 1), st.sampled_from(["fractional", "none"]))
def test_integer_slots_stay_in_range(seed, k_min, span, offset, gradient):
    importance = torch.rand(50, generator=torch.Generator().manual_seed(seed))
    slots = integer_slots(soft_slots(importance, offset, k_min, k_min + span), gradient)
    assert slots.dtype == torch.int64
    assert slots.min() >= k_min and slots.max() <= k_min + span


@given(seeds, st.integers(1, 4), st.integers(0, 5), st.floats(0, 1.5))
def test_trim_keeps_the_budget_the_floor_and_the_important(seed, k_min, span, share):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(k_min, k_min + span + 1, (40,), generator=generator)
    importance = torch.rand(40, generator=generator)
    budget = int(share * slots.sum())
    trimmed = trim_to_budget(slots, importance, k_min, budget)
    assert (trimmed >= k_min).all() and (trimmed <= slots).all()
    assert trimmed.sum() == max(min(int(slots.sum()), budget), 40 * k_min)
    touched = trimmed < slots
    if touched.any():
        spared = ~touched & (slots > k_min)
        assert not spared.any() or importance[spared].min() >= importance[touched].max()


def test_fractional_weight_is_continuous_where_a_slot_appears():
    soft = torch.tensor([3.0, 3.0001, 3.9999, 4.0])
    slots = integer_slots(soft, "fractional")
    assert slots.tolist() == [3, 4, 4, 4]
    last = last_slot_weight(soft, slots, "fractional")
    torch.testing.assert_close(last, torch.tensor([1.0, 0.0001, 0.9999, 1.0]), atol=1e-6, rtol=0)


def test_trimmed_tokens_use_their_last_slot_fully():
    soft, slots = torch.tensor([3.4]), torch.tensor([2])
    assert last_slot_weight(soft, slots, "fractional").item() == 1.0


def test_straight_through_is_one_forward_and_the_identity_backward():
    soft = torch.tensor([3.4], requires_grad=True)
    last = last_slot_weight(soft, integer_slots(soft, "straight_through"), "straight_through")
    assert last.item() == 1.0
    last.backward()
    assert soft.grad.item() == 1.0


def test_weights_are_one_in_use_and_zero_beyond():
    entry = torch.tensor([[1, 2, 3, 4]])
    slots = torch.tensor([2, 4])
    last = torch.tensor([0.25, 0.5])
    used, weights = slot_weights(entry, slots, last)
    assert used.tolist() == [[True, True, False, False], [True] * 4]
    assert weights.tolist() == [[1, 0.25, 0, 0], [1, 1, 1, 0.5]]
    assert slot_weights(entry, slots, None)[1].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    torch.testing.assert_close(slot_weights(entry, slots, last, log=True)[1], weights.log())
