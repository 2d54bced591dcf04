"""Budgets of launches and waits of a mixture layer; `benchmarks/launches.py` prints the table."""

import pytest

from megatron_anyexperts.checks.launches import count_ours, count_stock


@pytest.fixture
def stock(one_rank):
    return count_stock()


@pytest.fixture
def ours(one_rank):
    return count_ours(anyexperts_kernels="on")


def assert_few(stock, ours, factor: float) -> None:
    for direction in ("forward", "backward"):
        theirs, mine = (getattr(counted["router"], direction).launches.total() for counted in (stock, ours))
        assert mine <= factor * theirs, (direction, mine, theirs)


def test_the_router_launches_at_most_a_third_more_than_megatrons(stock, ours):
    assert_few(stock, ours, 1.3)


@pytest.mark.parametrize(
    ("option", "factor"),
    [
        ({"anyexperts_importance_gradient": "centred"}, 1.3),
        ({"moe_z_loss_coeff": 1e-3}, 1.3),
        ({"anyexperts_budget_slack": 1.1}, 1.6),
    ],
    ids=str,
)
def test_centred_gradient_z_loss_and_budget_stay_within_the_kernels(stock, option, factor):
    counted = count_ours(anyexperts_kernels="on", **option)
    assert_few(stock, counted, factor)
    assert not counted["router"].forward.waits and not counted["router"].backward.waits


def test_figures_are_one_launch(ours):
    assert ours["figures"].forward.launches.total() == 1


def test_a_layer_waits_once(ours):
    passes = [each for counted in ours.values() for each in (counted.forward, counted.backward) if each is not None]
    assert sum(each.waits.total() for each in passes) == 1


def test_the_cap_launches_at_most_three_times_as_much_and_waits_once_more(one_rank, ours):
    capped = count_ours(anyexperts_kernels="on", anyexperts_dispatch_eps=0.1)["dispatch"]
    for direction in ("forward", "backward"):
        without, mine = (getattr(counts, direction).launches for counts in (ours["dispatch"], capped))
        assert mine.total() <= 3 * without.total(), (direction, mine)
    assert capped.forward.launches["next_prices"], "the cap did not act"
    assert capped.forward.waits.total() + capped.backward.waits.total() == 2


def test_without_the_kernel_the_router_waits_as_little(one_rank):
    counted = count_ours(anyexperts_kernels="off")["router"]
    assert not counted.forward.waits and not counted.backward.waits
