"""Copies of hot experts under grouped products: outputs and gradients are those without copies."""

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context

from tests.multirank import run_ranks
from tests.unit.moe.builders import EXPERTS, config
from tests.unit.moe.rank_cases import Net, initialize, wrap

HIDDEN = 32
TOKENS = 48
SHAPE = {
    "num_layers": 1,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": HIDDEN,
    "moe_ffn_hidden_size": HIDDEN,
    "activation_func": torch.nn.functional.silu,
    "bias_activation_fusion": False,
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_grouped_gemm": True,
    "anyexperts_alpha": 0.0,
    "anyexperts_kernels": "off",
}
COPIES = {"anyexperts_balance": "copies", "anyexperts_copies_eps": 0.0, "anyexperts_copies_per_rank": 2}


def build(rank: int, ranks: int, dtype: torch.dtype, **options) -> Net:
    own = {"expert_model_parallel_size": ranks, "params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    cfg = config(**SHAPE | own | options)
    net = Net(cfg)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(net.named_parameters())):
            seed = 100 * number + rank * (".experts." in name)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        net.layer.router.expert_bias[: EXPERTS // ranks] += 2
    return net


def _steps(rank: int, ranks: int, dtype: torch.dtype, **options) -> tuple[list, list, dict, int]:
    """Outputs, input gradients and weight gradients of two steps of two microbatches, and slots copied."""
    net = build(rank, ranks, dtype, **options)
    model, loads, dispatch = wrap(net, overlap_grad_reduce=True), [], net.layer.dispatcher.dispatch
    net.layer.dispatcher.dispatch = lambda *args: loads.append((sent := dispatch(*args)).load) or sent
    outputs, inputs, gradients = [], [], {}
    for step in range(2):
        model.zero_grad_buffer()
        for name, parameter in net.named_parameters():
            if ".experts." in name and step == 0 and net.config.gradient_accumulation_fusion:
                # A layer's first product overwrites what it finds, all later ones add to it.
                parameter.main_grad.fill_(1e3)
        for microbatch in range(2):
            generator = torch.Generator().manual_seed(10 * rank + microbatch)
            x = torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(dtype).requires_grad_()
            with model.no_sync() if microbatch == 0 else torch.enable_grad():
                with get_fp8_context(net.config):
                    outputs.append(model(x))
                outputs[-1].float().square().sum().backward()
            inputs.append(x.grad)
        model.finish_grad_sync()
        gradients |= {(step, name): parameter.main_grad.clone() for name, parameter in net.named_parameters()}
    return outputs, inputs, gradients, sum(int(load.copied) for load in loads)


def compare(rank: int, ranks: int, dtype: torch.dtype) -> tuple[dict[str, float], int]:
    """Largest relative differences to the layer without copies by quantity, and slots that copies served."""
    initialize(1, ranks)
    unfused = _steps(rank, ranks, dtype)
    worst: dict[str, float] = {}
    for fused in (False, True):
        plain, copied = (_steps(rank, ranks, dtype, gradient_accumulation_fusion=fused, **how) for how in ({}, COPIES))
        for kind, ours, theirs in zip(("output", "input"), copied, plain, strict=False):
            worst[f"{kind}, {fused=}"] = max(map(_difference, ours, theirs))
        worst[f"weight, {fused=}"] = max(_difference(copied[2][name], plain[2][name]) for name in plain[2])
        worst[f"fusion, {fused=}"] = max(_difference(plain[2][name], unfused[2][name]) for name in plain[2])
        assert plain[3] == 0
    return worst, copied[3]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-9)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_copies_reach_main_grad_as_the_owners_do(dtype):
    for worst, copied in run_ranks(compare, 2, dtype):
        assert copied > 0
        # Unfused, a bf16 gradient is rounded before it is added to the fp32 sum; everything else rounds as fp32 does.
        rounded = {"weight, fused=False", "fusion, fused=True"} if dtype == torch.bfloat16 else set()
        far = {kind: value for kind, value in worst.items() if value > (1e-2 if kind in rounded else 1e-6)}
        assert not far


def _compare_fp8(rank: int, ranks: int) -> tuple[list[float], list[float], int]:
    """Distances from the layer in fp32, without and with copies, of outputs and gradients; and slots copied."""
    initialize(1, ranks)
    recipe = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "gradient_accumulation_fusion": True}
    exact, plain, copied = (_steps(rank, ranks, torch.float32, **how) for how in ({}, recipe, recipe | COPIES))
    assert plain[3] == 0
    return *([_distance(run, exact, part) for part in range(3)] for run in (plain, copied)), copied[3]


def _distance(run: tuple, exact: tuple, part: int) -> float:
    ours, theirs = run[part], exact[part]
    pairs = [(ours[name], theirs[name]) for name in theirs] if part == 2 else list(zip(ours, theirs, strict=True))
    away = sum((a - b).double().square().sum() for a, b in pairs)
    return (away / sum(b.double().square().sum() for _, b in pairs)).sqrt().item()


def test_copies_in_fp8_round_as_the_layer_without_them_does():
    for plain, copied, slots in run_ranks(_compare_fp8, 2):
        assert slots > 0
        for without, within in zip(plain, copied, strict=True):
            assert 1e-3 < without < 0.1, "the layer is not in FP8"
            assert within < 1.2 * without
