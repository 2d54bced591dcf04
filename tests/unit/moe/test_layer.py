"""The layer on one rank: output by definition, gradients, initial state."""

import pytest
import torch

from megatron_anyexperts.moe.virtual import VirtualExpert
from tests.unit.moe.builders import EXPERTS, HIDDEN, config, layer

DYNAMIC = {"anyexperts_k_min": 2, "anyexperts_k_max": 6, "anyexperts_rho_max": 0.35}
VARIANTS = [
    {},
    {"anyexperts_virtual_kind": "zero"},
    {"anyexperts_virtual_kind": "constant", "anyexperts_learn_alpha": True},
    {"anyexperts_alpha": 0.0, "moe_router_score_function": "sigmoid"},
    {"anyexperts_slot_gradient": "none", "moe_router_pre_softmax": True},
    {"anyexperts_rho_max": 0.0, "anyexperts_virtual_experts": 2, "anyexperts_virtual_kind": "constant"},
    {"moe_shared_expert_intermediate_size": 8, "anyexperts_slot_gradient": "straight_through"},
]


def dynamic_layer(**options):
    built = layer(config(**(DYNAMIC | options)))
    built.importance.down.data.normal_()
    if built.virtual is not None and built.virtual.kind == "constant":
        built.virtual.vector.data.normal_()
    return built


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_output_is_the_sum_the_method_defines(one_rank, options):
    built = dynamic_layer(**options)
    built.eval()
    hidden = torch.randn(10, 2, HIDDEN)
    output = built(hidden)[0].reshape(-1, HIDDEN)
    importance, fused = built.importance(hidden)
    decision = built.router(fused, None, importance)
    fused = fused.reshape(-1, HIDDEN)
    expected = torch.zeros_like(fused)
    for expert in range(EXPERTS):
        tokens = torch.tensor([len(fused)])
        one = built.experts.local_experts[expert](fused, per_token_scale=decision.gates_TE[:, expert])[0]
        assert tokens.sum() == len(one)
        expected = expected + one * decision.routing_map_TE[:, expert, None]
    if decision.virtual_gate_T is not None:
        kinds = {"identity": fused, "zero": 0 * fused, "constant": getattr(built.virtual, "vector", fused)}
        expected = expected + decision.virtual_gate_T[:, None] * kinds[built.virtual.kind]
    if built.shared_experts is not None:
        expected = expected + built.shared_experts(fused)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(one_rank, options):
    """Overlapped gradient reduction waits for each parameter of a bucket."""
    built = dynamic_layer(**options)
    built(torch.randn(20, 2, HIDDEN, requires_grad=True))[0].square().sum().backward()
    missing = [name for name, parameter in built.named_parameters() if parameter.grad is None]
    assert missing == []


def test_virtual_experts_add_what_their_kind_says(one_rank):
    output, hidden, gate = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN), torch.tensor([0.0, 0.5, 2.0])
    for kind in ("identity", "zero", "constant"):
        virtual = VirtualExpert(config(**DYNAMIC, anyexperts_virtual_kind=kind))
        if kind == "constant":
            virtual.vector.data.normal_()
        value = {"identity": hidden, "zero": torch.zeros(HIDDEN), "constant": getattr(virtual, "vector", None)}[kind]
        torch.testing.assert_close(virtual(output, hidden, gate), output + gate[:, None] * value)


def test_expert_parameters_are_marked_alike_at_every_expert_parallel_size(one_rank):
    built = dynamic_layer()
    assert all(parameter.allreduce is False for parameter in built.experts.parameters())
    small = [built.router.weight, built.router.virtual_weight, *built.importance.parameters()]
    assert all(getattr(parameter, "allreduce", True) for parameter in small)


def test_single_stages_are_refused(one_rank):
    with pytest.raises(ValueError, match="one by one"):
        dynamic_layer()(torch.randn(2, 1, HIDDEN), intermediate_tensors=())
