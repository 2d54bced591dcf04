import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunState

from megatron_anyexperts.moe.controllers import calibration, next_offset, next_virtual_bias, update_controllers
from megatron_anyexperts.moe.router import AnyExpertsRouter
from tests.unit.moe import rank_cases
from tests.unit.moe.builders import HIDDEN, config, groups


def build(**options) -> AnyExpertsRouter:
    router = AnyExpertsRouter(config(**({"anyexperts_k_min": 2, "anyexperts_k_max": 6} | options)), groups())
    router.weight.data.normal_()
    return router


def step(router: AnyExpertsRouter, hidden: torch.Tensor, importance: torch.Tensor) -> tuple[float, float]:
    decision = router(hidden, None, importance)
    update_controllers([router])
    return decision.slots_T.float().mean().item(), decision.routing_map_TE.sum(1).float().mean().item()


@pytest.mark.parametrize("gradient", ["fractional", "straight_through", "none"])
@pytest.mark.parametrize("target", [2.5, 4.0, 5.8])
def test_mean_slots_reach_the_target_and_stay(one_rank, gradient, target):
    router = build(anyexperts_target_slots=target, anyexperts_slot_gradient=gradient)
    hidden, importance = torch.randn(500, 4, HIDDEN), torch.rand(2000)
    means = [step(router, hidden, importance)[0] for _ in range(25)]
    assert all(abs(mean / target - 1) < 0.01 for mean in means[15:])


def test_mean_real_slots_reach_their_target(one_rank):
    router = build(anyexperts_rho_max=0.34, anyexperts_target_slots=5.0, anyexperts_target_real=4.5)
    hidden, importance = torch.randn(500, 4, HIDDEN), torch.rand(2000)
    for _ in range(200):
        slots, real = step(router, hidden, importance)
    assert abs(slots - 5.0) < 0.05
    assert abs(real - 4.5) < 0.05


def test_without_targets_nothing_moves(one_rank):
    router = build(anyexperts_rho_max=0.34)
    before = {name: value.clone() for name, value in router.control.state_dict().items()}
    step(router, torch.randn(20, 1, HIDDEN), torch.rand(20))
    assert all(torch.equal(before[name], value) for name, value in router.control.state_dict().items())


def test_a_step_without_tokens_moves_nothing(one_rank):
    router = build(anyexperts_target_slots=3.0)
    router.control.slot_offset.fill_(0.125)
    update_controllers([router])
    assert router.control.slot_offset.item() == 0.125


@given(st.floats(-1, 1), st.integers(0, 1000), st.floats(2, 6), st.floats(0, 1), st.floats(2, 6))
def test_the_offset_moves_toward_the_target_and_stays_bounded(offset, tokens, mean, movable, target):
    count = torch.tensor([float(tokens)])
    moved = next_offset(torch.tensor([offset]), count, mean * count, movable * count, target, 4, 0.5).item()
    assert abs(moved) <= 1
    if tokens and abs(target - mean) > 1e-3 and abs(offset) < 0.99:
        assert (moved - offset) * (target - mean) > 0


@given(st.floats(-12, 12), st.floats(0, 8), st.floats(0, 8))
def test_the_virtual_bias_stays_bounded(bias, mean, target):
    moved = next_virtual_bias(torch.tensor([bias]), torch.tensor([10.0]), torch.tensor([10 * mean]), target, 5.0)
    assert -12 <= moved.item() <= 12


def test_a_repeated_step_sees_the_state_of_the_first_run(one_rank, monkeypatch):
    router = build(anyexperts_target_slots=3.0)
    hidden, importance = torch.randn(50, 2, HIDDEN), torch.rand(100)
    machine = rerun_state_machine.RerunStateMachine()
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)
    router.control.remember(None)
    first = router(hidden, None, importance).slots_T
    update_controllers([router])
    after = router.control.slot_offset.clone()
    assert not torch.equal(router(hidden, None, importance).slots_T, first)
    router.control.counts.zero_()

    machine.state = RerunState.RERUNNING_IN_PLACE
    assert torch.equal(router(hidden, None, importance).slots_T, first)
    router.control.remember(None)
    update_controllers([router])
    assert torch.equal(router.control.slot_offset, after)

    machine.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
    assert router.state_dict()["control.slot_offset"].item() == 0


def test_a_checkpoint_is_dialled_to_other_ranges_and_targets_without_training(one_rank):
    trained = build(anyexperts_rho_max=0.34, anyexperts_target_slots=5.0, anyexperts_target_real=4.5)
    hidden, importance = torch.randn(500, 4, HIDDEN), torch.rand(2000)
    for _ in range(30):
        step(trained, hidden, importance)
    for options in (
        {"anyexperts_target_slots": 3.0, "anyexperts_target_real": 2.8, "anyexperts_rho_max": 0.34},
        {"anyexperts_k_max": 4, "anyexperts_target_slots": 3.5, "anyexperts_rho_max": 0.0},
    ):
        dialled = build(anyexperts_virtual_experts=2, **options)
        dialled.load_state_dict(trained.state_dict())
        dialled.eval()
        with torch.no_grad(), calibration([dialled]) as adjust:
            for _ in range(100):
                decision = dialled(hidden, None, importance)
                adjust()
        slots, real = decision.slots_T.float().mean().item(), decision.routing_map_TE.sum(1).float().mean().item()
        assert abs(slots / options["anyexperts_target_slots"] - 1) < 0.01
        if options["anyexperts_rho_max"]:
            assert abs(real / options["anyexperts_target_real"] - 1) < 0.01
        else:
            assert real == slots
        before = dialled.control.slot_offset.clone()
        with torch.no_grad():
            dialled(hidden, None, importance)
        assert dialled.control.counts.sum() == 0 and torch.equal(before, dialled.control.slot_offset)


@pytest.mark.parametrize(
    ("update", "options", "centred"),
    [
        ("auto", {}, True),
        ("auto", rank_cases.STATIC, False),
        ("zero_mean", rank_cases.STATIC, True),
        ("stock", {}, False),
    ],
    ids=["auto, virtual experts", "auto, without", "zero_mean", "stock"],
)
def test_the_mean_of_the_expert_bias_is_kept_at_zero_where_it_would_drift_against_virtual_experts(
    one_rank, update, options, centred
):
    settings = rank_cases.DYNAMIC | options | {"anyexperts_expert_bias_update": update}
    model = rank_cases.wrap(rank_cases.Net(config(**settings)))
    bias = rank_cases.mixture(model).router.expert_bias
    bias.fill_(0.5)  # one step does not lead here, many do
    rank_cases.train(model, 3)
    assert (bias - bias.mean()).abs().max() > 1e-3
    assert bias.mean().item() == pytest.approx(0 if centred else 0.5, abs=1e-8 if centred else 1e-2)
