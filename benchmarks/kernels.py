"""Our Triton kernels against the operators that define them: largest differences, and times of both.

    python benchmarks/kernels.py            # on a GPU: the mixture layer of Ling-mini-2.0 on 4,096 tokens
    python benchmarks/kernels.py --small    # anywhere: few tokens; without CUDA in Triton's interpreter, whose times
                                            # say nothing

Scores that nearly tie may be ordered otherwise, so the routing is compared where both chose the same experts, and the
tokens for which they did not are counted. Exit code 1: more than 1 in 1,000 of these, or a difference above its limit.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.metrics import install_metrics
from megatron_anyexperts.platform import cpu

LIMITS = {"routing": 0.01, "permutation": 0.02, "figures": 1e-6}
"""Largest difference over largest value: gradients in bf16, sums in bf16, squares in fp32."""
WARM = 2 if torch.cuda.is_available() else 0
"""Passes before the timed ones: the first compiles."""
OTHERWISE = 1e-3
"""Largest share of tokens that may get other experts."""
OURS = {
    "anyexperts_k_min": 8,
    "anyexperts_k_max": 12,
    "anyexperts_target_slots": 8.2,
    "anyexperts_rho_max": 0.2,
    "anyexperts_target_real": 7.2,
    "anyexperts_alpha": 0.1,
}


def build(kernels: str, experts: int, hidden: int) -> AnyExpertsMoELayer:
    """A layer whose experts are never run."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_anyexperts.checks.launches import ling_config
    from megatron_anyexperts.moe.router import AnyExpertsRouter

    torch.manual_seed(1)
    config = replace(ling_config(**OURS, anyexperts_kernels=kernels), num_moe_experts=experts, hidden_size=hidden)
    spec = get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False).keywords["submodules"]
    spec = replace(spec, router=AnyExpertsRouter)
    layer = AnyExpertsMoELayer(config, spec, layer_number=1, pg_collection=get_default_pg_collection())
    layer.set_layer_number(1)
    return layer.to(torch.cuda.current_device())


def timed(passes: int, forward: Callable[[], list[Tensor]], grads: Callable[[list[Tensor]], list[Tensor]]) -> tuple:
    """Outputs, and median milliseconds forward and backward."""
    forwards, backwards = [], []
    for _ in range(passes + WARM):
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = forward()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        differentiable = [each for each in outputs if each.requires_grad]
        if differentiable:
            torch.autograd.backward(differentiable, grads(differentiable))
        torch.cuda.synchronize()
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - middle)
    return outputs, *(1e3 * statistics.median(each[WARM:]) for each in (forwards, backwards))


def weights(outputs: list[Tensor]) -> list[Tensor]:
    """Gradients of outputs, the same in every call."""
    return [torch.linspace(-1, 1, each.numel(), device=each.device).view_as(each).to(each.dtype) for each in outputs]


def difference(ours: list[Tensor], defined: list[Tensor]) -> float:
    """Largest over all pairs of largest difference / largest value; infinite where NaN is not met by NaN."""
    worst = 0.0
    for found, expected in zip(ours, defined, strict=True):
        found, expected = found.detach().double(), expected.detach().double()
        if not torch.equal(found.isnan(), expected.isnan()):
            return float("inf")
        scale = expected.nan_to_num().abs().max().clamp(min=1e-12)
        worst = max(worst, ((found - expected).nan_to_num().abs().max() / scale).item())
    return worst


def routing(layer: AnyExpertsMoELayer, hidden: Tensor, importance: Tensor, passes: int) -> tuple:
    """Router on given importance: decision, gradients, times."""
    hidden, importance = hidden.clone().requires_grad_(), importance.clone().requires_grad_()
    kept: list[RoutingDecision] = []

    def forward() -> list[Tensor]:
        hidden.grad = importance.grad = None
        kept[:] = [layer.router(hidden, None, importance)]
        return [kept[0].gates_TE, kept[0].virtual_gate_T]

    _, *times = timed(passes, forward, weights)
    return kept[0], [hidden.grad.view(len(importance), -1), importance.grad], times


def permutation(layer: AnyExpertsMoELayer, hidden: Tensor, decision: RoutingDecision, passes: int) -> tuple:
    """Tokens to slots, and back with the virtual slots, without experts."""
    hidden, gates = hidden.clone().requires_grad_(), decision.gates_TE.detach().clone().requires_grad_()
    decision = replace(decision, gates_TE=gates, virtual_gate_T=decision.virtual_gate_T.detach())

    def forward() -> list[Tensor]:
        hidden.grad = gates.grad = None
        hidden_TH = hidden.view(-1, hidden.shape[-1])
        sent = layer.dispatcher.dispatch(hidden_TH, decision)
        expert_output = sent.expert_input * sent.expert_probs.unsqueeze(-1).to(hidden.dtype)
        return [layer.combine(expert_output, sent, hidden_TH, decision)]

    outputs, *times = timed(passes, forward, weights)
    return [*outputs, hidden.grad, gates.grad], times


def figures(layer: AnyExpertsMoELayer, decision: RoutingDecision, hidden: Tensor, passes: int) -> tuple:
    """One microbatch's routing figures."""
    with torch.no_grad():
        load = layer.dispatcher.dispatch(hidden.view(-1, hidden.shape[-1]), decision).load
        tally = install_metrics(layer.config).tallies["train"]
        kinds = (torch.arange(len(decision.slots_T), device=hidden.device) % 3).to(torch.int8)

        def forward() -> list[Tensor]:
            tally.add(1, kinds, decision, load)
            return []

        _, *times = timed(passes, forward, weights)
    return [tally.sums_LMF, tally.experts_LE, tally.load_L6], times


def compare(tokens: int, experts: int, hidden_size: int, passes: int) -> list[dict[str, float | str | int]]:
    """One row for each kernel."""
    torch.manual_seed(0)
    device = torch.cuda.current_device()
    hidden = torch.randn(tokens, 1, hidden_size, dtype=torch.bfloat16, device=device)
    importance = torch.rand(tokens, device=device)
    layers = [build(kernels, experts, hidden_size) for kernels in ("on", "off")]
    (ours, ours_grads, ours_ms), (defined, grads, ms) = (
        routing(layer, hidden, importance, passes) for layer in layers
    )
    same = (ours.routing_map_TE == defined.routing_map_TE).all(1) & (ours.slots_T == defined.slots_T)
    values = [(ours.gates_TE, defined.gates_TE), (ours.virtual_gate_T, defined.virtual_gate_T)]
    pairs = [(a[same], b[same]) for a, b in [*values, *zip(ours_grads, grads, strict=True)]]
    rows = [_row("routing", difference(*map(list, zip(*pairs, strict=True))), ours_ms, ms)]
    rows[0]["other_experts"] = int((~same).sum())
    rows[0]["fine"] &= rows[0]["other_experts"] <= OTHERWISE * tokens
    for name, part in (
        ("permutation", lambda layer: permutation(layer, hidden, defined, passes)),
        ("figures", lambda layer: figures(layer, defined, hidden, passes)),
    ):
        (found, ours_ms), (expected, ms) = (part(layer) for layer in layers)
        rows.append(_row(name, difference(found, expected), ours_ms, ms))
    return [row | {"tokens": tokens} for row in rows]


def _row(name: str, worst: float, ours_ms: list[float], ms: list[float]) -> dict[str, float | str | int]:
    row = {"kernel": name, "difference": worst, "limit": LIMITS[name], "fine": worst <= LIMITS[name]}
    for label, times in (("kernel", ours_ms), ("operators", ms)):
        row |= {f"{label}_forward_ms": times[0], f"{label}_backward_ms": times[1]}
    return row


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="few tokens and a narrow layer")
    parser.add_argument("--passes", type=int, default=20, help="timed passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    cpu.bridge()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder, 'rendezvous')}"
        torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        rows = compare(*((16, 32, 32) if args.small else (4096, 256, 2048)), args.passes)
        torch.distributed.destroy_process_group()
    print(f"{'':14}{'difference':>12}{'limit':>9}{'kernel ms':>20}{'operators ms':>20}")
    for row in rows:
        times = [row[f"{kind}_{way}_ms"] for kind in ("kernel", "operators") for way in ("forward", "backward")]
        verdict = "ok" if row["fine"] else "TOO FAR"
        cells = "{:10.3f} /{:8.3f}{:10.3f} /{:8.3f}".format(*times)
        print(f"{row['kernel']:14}{row['difference']:12.2e}{row['limit']:9.0e}{cells}  {verdict}")
    print(f"other experts for {rows[0]['other_experts']} of {rows[0]['tokens']} tokens")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(row["fine"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
