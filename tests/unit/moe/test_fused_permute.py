"""Tokens to slots and back by kernels, in Triton's interpreter, against sums by hand; and that they compile."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.moe.fused_permute import permute, unpermute
from tests.unit.moe.builders import HIDDEN, config, layer

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@settings(max_examples=40)
@given(
    seed=st.integers(0, 9999),
    shape=st.tuples(st.integers(0, 9), st.integers(1, 7), st.integers(1, 9)),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    virtual=st.booleans(),
)
def test_slots_are_sorted_by_expert_and_their_sum_comes_back(seed, shape, share, dtype, virtual):
    torch.manual_seed(seed)
    tokens, experts, width = shape
    map_TE = torch.rand(tokens, experts) < share
    broken_T = torch.rand(tokens) < 0.2
    hidden_TH = torch.randn(tokens, width).to(dtype).requires_grad_()
    gates_TE, gate_T = torch.rand(tokens, experts, requires_grad=True), torch.rand(tokens, requires_grad=True)
    slots_NH, probs_N, place_TE = permute(hidden_TH, gates_TE, map_TE, map_TE.sum(0), int(map_TE.sum()))
    expert_N, token_N = map_TE.T.nonzero().unbind(1)
    assert torch.equal(slots_NH, hidden_TH[token_N]) and torch.equal(probs_N, gates_TE[token_N, expert_N])
    added = (hidden_TH, gate_T) if virtual else (None, None)
    output_TH = unpermute(slots_NH * probs_N.unsqueeze(1).to(dtype), place_TE, *added, broken_T)

    total = ((gates_TE * map_TE).sum(1) + (gate_T if virtual else 0)).unsqueeze(1)
    expected = (total * hidden_TH.float()).masked_fill(broken_T.unsqueeze(1), float("nan")).to(dtype)
    found = []
    for output in (output_TH, expected):
        leaves = (hidden_TH, gates_TE, gate_T)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        loss = (output * weights)[~broken_T].float().sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append([output, *(each for each in gradients if each is not None)])
    limit = TOLERANCE[dtype]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=4 * limit, equal_nan=True)


@pytest.mark.parametrize("kind", ["identity", "constant", "zero"])
@pytest.mark.parametrize("routing", [{}, {"anyexperts_k_min": 2, "anyexperts_k_max": 6, "anyexperts_rho_max": 0.35}])
def test_a_layer_of_kernels_is_one_of_operators(one_rank, kind, routing):
    torch.manual_seed(3)
    hidden = torch.randn(5, 3, HIDDEN)
    padding = torch.zeros(3, 5, dtype=torch.bool).index_fill_(1, torch.tensor([4]), True)
    results = []
    for kernels in ("off", "on"):
        torch.manual_seed(1)
        built = layer(config(**routing, anyexperts_kernels=kernels, anyexperts_virtual_kind=kind))
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if name == "virtual.vector":
                    parameter.copy_(torch.randn(HIDDEN))
        x = hidden.clone().requires_grad_()
        output = built(x, padding_mask=padding)[0]
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for _, p in sorted(built.named_parameters()) if p.grad is not None)])
    for operators, kernels in zip(*results, strict=True):
        torch.testing.assert_close(kernels, operators, rtol=1e-4, atol=1e-5)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatron_anyexperts.moe import permute_kernels as kernels

sizes = {"E": 256, "E2": 256, "BLOCK": 2048, "VIRTUAL": True, "BROKEN": True}
wide = {name + "_ptr": "*fp32" for name in ("gates", "probs", "d_probs", "d_gates", "gate", "d_gate")}
types = wide | {"map_ptr": "*i1", "broken_ptr": "*i1", "upto_ptr": "*i32", "place_ptr": "*i32", "ends_ptr": "*i64"}
types |= {"counts_ptr": "*i64", "H": "i32", "hidden_stride": "i32"}
for name in ("permute", "permute_backward", "unpermute", "unpermute_backward"):
    kernel = getattr(kernels, name)
    names = kernel.arg_names
    signature = {each: "constexpr" if each in sizes else types.get(each, "*bf16") for each in names}
    places = {(names.index(each),): value for each, value in sizes.items() if each in names}
    assert compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32)).asm["cubin"], name
print("compiled")
"""


def test_they_compile_for_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip().endswith("compiled"), result.stderr
