"""The kernel against the operators that define it, in Triton's interpreter; and that it compiles for a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_anyexperts.moe.router import AnyExpertsRouter
from tests.unit.moe.builders import HIDDEN, config, groups, static

SCORES = [
    {"moe_router_score_function": "softmax"},
    {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"moe_router_score_function": "sqrtsoftplus"},
]
GROUPS = [{}, {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5}]
LOSSES = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "anyexperts_spread_loss_coeff": 0.3,
    "anyexperts_spread_target": 0.4,
    "anyexperts_budget_loss_coeff": 0.2,
}


def build(kernel: str, options: dict) -> AnyExpertsRouter:
    torch.manual_seed(1)
    router = AnyExpertsRouter(config(**options, anyexperts_kernels=kernel), groups())
    router.set_layer_number(1)
    if router.expert_bias is not None:
        router.expert_bias.copy_(0.1 * torch.randn(len(router.expert_bias)))
    router.control.virtual_bias.fill_(0.3)
    router.control.slot_offset.fill_(0.05)
    return router


def run(kernel: str, options: dict, inputs: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    """All that a router returns, counts and learns from."""
    router = build(kernel, options)
    hidden, importance, mask = (each if each is None else each.clone() for each in inputs)
    hidden, importance = hidden.to(dtype).requires_grad_(), importance.requires_grad_()
    decision = router.to(dtype)(hidden, mask, importance)
    weights = torch.linspace(-1, 1, decision.gates_TE.numel()).view_as(decision.gates_TE)
    total = (decision.gates_TE * weights).sum()
    if decision.virtual_gate_T is not None:
        total = total + (decision.virtual_gate_T * torch.linspace(1, 2, len(importance))).sum()
    total.backward()
    found = [decision.gates_TE, decision.virtual_gate_T, decision.routing_map_TE, decision.slots_T]
    found += [decision.importance_T, decision.nonfinite_T, router.control.counts, router.local_tokens_per_expert]
    found = [each for each in found if each is not None]
    leaves = [hidden, importance, *router.parameters()]
    return found + [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def inputs(seed: int, length: int, rows: int, masked: str, broken: bool) -> tuple:
    torch.manual_seed(seed)
    hidden, importance = torch.randn(length, rows, HIDDEN), torch.rand(length * rows)
    padding = torch.rand(length, rows) < 0.3
    mask = {"none": None, "bool": padding, "weights": (~padding).float() * 0.5}[masked]
    if broken:
        importance[0] = float("nan")
    return hidden, importance, mask


def assert_alike(options: dict, given_inputs: tuple, dtype: torch.dtype = torch.float32) -> None:
    defined, kernel = (run(kind, options, given_inputs, dtype) for kind in ("off", "on"))
    tolerance = {"rtol": 1e-4, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    for expected, found in zip(defined, kernel, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


ranges = st.integers(1, 4).flatmap(lambda low: st.tuples(st.just(low), st.integers(max(low, 2), 4)))


@settings(
    max_examples=40,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # the interpreter is too slow to shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    score=st.sampled_from(SCORES),
    grouped=st.sampled_from(GROUPS),
    slots=ranges,
    rho_max=st.sampled_from([0.0, 0.34, 0.5]),
    gradient=st.sampled_from(["fractional", "straight_through", "none"]),
    losses=st.sampled_from([{}, LOSSES, {"moe_z_loss_coeff": 0.3}, LOSSES | {"moe_z_loss_coeff": 0.3}]),
    slack=st.sampled_from([None, 1.0]),
    centred=st.booleans(),
    shape=st.tuples(st.integers(0, 9999), st.integers(1, 7), st.integers(1, 3)),
    masked=st.sampled_from(["none", "bool", "weights"]),
    broken=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_is_what_the_operators_define(
    one_rank, score, grouped, slots, rho_max, gradient, losses, slack, centred, shape, masked, broken, dtype
):
    low, high = slots
    options = score | grouped | losses
    options |= {"anyexperts_k_min": low, "anyexperts_k_max": high, "anyexperts_rho_max": rho_max}
    options |= {"anyexperts_slot_gradient": gradient, "anyexperts_virtual_experts": 3 if rho_max else 0}
    options |= {"anyexperts_target_slots": (low + high) / 2}
    options |= {"anyexperts_budget_slack": slack}
    options |= {"anyexperts_importance_gradient": "centred" if centred and gradient != "none" else "plain"}
    if config(**options).anyexperts_no_kernel is None:  # else it is static
        assert_alike(options, inputs(*shape, masked, broken), dtype)


@pytest.mark.parametrize("experts", [5, 24])
def test_any_number_of_experts_and_virtual_columns(one_rank, experts):
    options = SCORES[0] | {"num_moe_experts": experts, "moe_router_topk": 3, "anyexperts_virtual_experts": 5}
    options |= {"anyexperts_k_min": 1, "anyexperts_k_max": 5, "anyexperts_rho_max": 0.6}
    assert_alike(options, inputs(0, 5, 2, "none", False))


BASE = {"anyexperts_k_min": 1, "anyexperts_rho_max": 0.34, "anyexperts_target_slots": 2.2}


@pytest.mark.parametrize(
    "option",
    [
        {"anyexperts_budget_slack": 1.0},
        {"anyexperts_importance_gradient": "centred"},
        {"moe_z_loss_coeff": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", ["none", "weights"])
def test_budget_centred_gradient_and_z_loss_act_and_are_alike(one_rank, option, masked):
    given = inputs(3, 9, 2, masked, True)
    without, with_option = (run("on", BASE | each, given, torch.float32) for each in ({}, option))
    assert not all(torch.equal(a, b) for a, b in zip(without, with_option, strict=True))
    assert build("on", BASE | option)._fuses(given[0])
    assert_alike(BASE | option, given)


def test_what_the_kernel_cannot_do_is_said():
    assert "fp32" in config(anyexperts_k_min=1, moe_router_dtype="fp64").anyexperts_no_kernel
    assert "static" in static().anyexperts_no_kernel


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatron_anyexperts.moe import route_kernels as kernels
from megatron_anyexperts.moe.slots_kernel import token_slots

sizes = {"E": 256, "E2": 256, "V": 2, "V2": 8, "K_MIN": 8, "K_MAX": 12, "SCALE": 2.5, "TOKENS": 4, "PROBS": True}
sizes |= {"MOST_VIRTUAL": 2, "G": 8, "G2": 8, "KEEP": 4, "PER": 2, "MASK": 2, "BIASED": True, "COLUMNS": 264}
sizes |= {"TRIMMED": True, "Z": True, "CENTRED": True, "C": 258, "C2": 512}
flags = {name + "_ptr": "*i1" for name in ("map", "virtual_used", "valid", "broken")}
types = flags | {name: "i32" for name in ("T", "stride", "out_stride")}
types |= {"last_ptr": "*i32", "slots_ptr": "*i64", "given_ptr": "*i64"}
from megatron_anyexperts.moe.tally_kernel import add_figures

sizes |= {"P": 8, "P2": 8, "M": 4, "FIELDS": 31, "BINS": 13, "BINS2": 16, "BROKEN": True}
doubles = ("to_experts", "load", "peak", "nonfinite")
counts = ("received", "demanded", "experts", "rerouted", "displaced", "copied")
route = [(kernel, (0, 2)) for kernel in (kernels.route_forward, kernels.route_backward)]
for kernel, scores in (*route, (token_slots, (0,)), (add_figures, (0,))):
    if kernel is add_figures:
        types |= {name + "_ptr": "*fp64" for name in doubles} | {name + "_ptr": "*i64" for name in counts}
        types |= {"kinds_ptr": "*i8", "sums_ptr": "*fp64", "kinds_stride": "i32"}
    for score in scores:
        names = kernel.arg_names
        given = sizes | {"SCORE": score, "GRADIENT": 0}
        constants = {name: given[name] for name in names if name in given}
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        built = compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"], kernel
print("compiled")
"""


def test_it_compiles_for_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip().endswith("compiled"), result.stderr
