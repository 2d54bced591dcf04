"""The layer on several ranks, under Megatron's DDP and gradient finalisation."""

import pytest
import torch

from tests.multirank import run_ranks
from tests.unit.moe import rank_cases


@pytest.fixture(scope="module")
def runs():
    return run_ranks(rank_cases.reference, 1)[0], run_ranks(rank_cases.all_layouts, 2)


@pytest.mark.parametrize("layout", rank_cases.LAYOUTS)
def test_gradients_and_controllers_are_those_of_one_rank(runs, layout):
    (reference, _), ranks = runs
    gradients, states = reference[bool(rank_cases.LAYOUTS[layout][2])]
    for mine, mine_states in (rank[layout] for rank, _ in ranks):
        for state, other in zip(states, mine_states, strict=True):
            torch.testing.assert_close(other, state, rtol=1e-5, atol=1e-6)
        assert mine.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", rank_cases.LAYOUTS)
def test_controllers_are_bit_equal_on_all_ranks(runs, layout):
    first, second = (rank[layout][1] for rank, _ in runs[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", rank_cases.LOSS_LAYOUTS)
@pytest.mark.parametrize("case", rank_cases.loss_cases())
def test_the_gradient_of_each_router_loss_is_that_of_one_rank(runs, layout, case):
    """Whatever the padding and the number of targets of each microbatch."""
    (_, reference), ranks = runs
    assert max(gradient.abs().max() for gradient in reference[case].values()) > 1e-3
    for mine in (losses[layout][case] for _, losses in ranks):
        for name, gradient in reference[case].items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_controller_state_survives_saving_and_another_layout(tmp_path):
    for pairs in run_ranks(rank_cases.save_and_load, 2, str(tmp_path)):
        for saved, restored in pairs:
            assert saved.abs().min() > 0
            assert torch.equal(saved, restored)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(rank_cases.two_ranks, 2)


def test_a_step_with_an_infinite_gradient_on_one_rank_moves_no_controller_on_any(two_ranks):
    assert all(still for _, still, *_ in two_ranks)


def test_padding_takes_no_part_in_the_dispatch_cap(two_ranks):
    for *_, (change, same_load, acted), _ in two_ranks:
        assert change < 1e-5 and same_load and acted


def test_tensor_parallelism_alone_is_refused_in_training_only(two_ranks):
    for *_, (said, finite) in two_ranks:
        assert "route every token once per tensor rank; add --sequence-parallel" in said and finite


def test_a_bf16_model_keeps_importance_controllers_and_counters_in_fp32(two_ranks):
    for dtypes, *_ in two_ranks:
        wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert {name for name in dtypes if name.startswith("importance.")} <= wide
        moved = {"router.control.slot_offset", "router.control.virtual_bias", "router.expert_bias"}
        assert moved | {"router.local_tokens_per_expert", "router.global_tokens_per_expert", "router.ga_steps"} <= wide
        assert dtypes["router.weight"] == dtypes["router.virtual_weight"] == torch.bfloat16
        assert dtypes["router.control.counts"] == torch.int64
