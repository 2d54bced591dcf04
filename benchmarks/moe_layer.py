"""Forward and backward of our mixture layer against Megatron's, in one run on one device.

    python benchmarks/moe_layer.py                  # small sizes, for a CPU
    python benchmarks/moe_layer.py --preset routing # Ling-mini-2.0's router over experts too thin to cost anything
    python benchmarks/moe_layer.py --preset ling    # Ling-mini-2.0 layer: H 2048, 256 experts, FFN 512, top-8, bf16

Both sides have the same experts and the same kind of dispatcher (alltoall). Dynamic layers route with virtual experts
and a slot range around top-k; their controllers are run in first, until the mean of real slots is the one asked for.
"operators" is without our Triton kernels, "unfused" without Transformer Engine's permutation either, and "cap" computes
all that the cap of an expert rank's load needs, as if there were several.
Rounds interleave all variants, and medians are compared, so that drift of the machine hits all alike. With one CPU
thread the clock is the processor time of this process, so that other load on the machine counts little.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.controllers import update_controllers
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.router import AnyExpertsRouter
from megatron_anyexperts.platform import cpu


@dataclass(frozen=True)
class Size:
    """One layer: T tokens, hidden H, E experts of FFN width, top-k."""

    tokens: int
    hidden: int
    experts: int
    ffn: int
    topk: int


PRESETS = {
    "small": [Size(1024, 256, 16, 256, 4), Size(2048, 512, 32, 256, 8), Size(1024, 1024, 64, 512, 8)],
    "routing": [Size(4096, 2048, 256, 8, 8)],
    "ling": [Size(tokens, 2048, 256, 512, 8) for tokens in (4096, 8192, 16384, 32768)],
}


def make_config(size: Size, dtype: torch.dtype, **own) -> AnyExpertsConfig:
    """Sigmoid scores with expert bias and a sequence-wise loss, as Ling and DeepSeek-V3 train."""
    own = {"moe_permute_fusion": HAVE_TE} | own
    return AnyExpertsConfig(
        num_layers=1,
        hidden_size=size.hidden,
        num_attention_heads=8,
        ffn_hidden_size=size.ffn,
        moe_ffn_hidden_size=size.ffn,
        num_moe_experts=size.experts,
        moe_router_topk=size.topk,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=HAVE_TE,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        **own,
    )


def dynamic_options(topk: int, real_share: float) -> dict:
    """A slot range around top-k, at most a quarter of the slots virtual, `real_share` * top-k real ones as target."""
    real = real_share * topk
    return {
        "anyexperts_k_min": max(1, topk // 2),
        "anyexperts_k_max": topk + topk // 2,
        "anyexperts_rho_max": 0.25,
        "anyexperts_target_slots": min(1.1 * real, topk * 1.45),
        "anyexperts_target_real": real,
    }


def build(kind: type[MoELayer], cfg: AnyExpertsConfig) -> MoELayer:
    """Build a layer with freshly seeded, hence equal, experts."""
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    spec = get_moe_module_spec(HAVE_TE, cfg.num_moe_experts, cfg.moe_grouped_gemm).keywords["submodules"]
    router = TopKRouter if kind is MoELayer else AnyExpertsRouter
    layer = kind(cfg, replace(spec, router=router), layer_number=1, pg_collection=get_default_pg_collection())
    layer.set_layer_number(1)
    if cfg.anyexperts_dispatch_eps is not None:  # a single rank would need no cap
        layer.dispatcher.eps = cfg.anyexperts_dispatch_eps
        layer.router.needs_fallback = True
    return layer.to(torch.cuda.current_device()) if torch.cuda.is_available() else layer


def run_in(layer: AnyExpertsMoELayer, hidden: torch.Tensor, steps: int) -> tuple[float, float]:
    """Run the controllers on one batch; return mean slots and mean real slots after it."""
    for _ in range(steps):
        decision = layer.router(*_routed_input(layer, hidden))
        update_controllers([layer])
    return decision.slots_T.float().mean().item(), decision.routing_map_TE.sum(1).float().mean().item()


def _routed_input(layer: AnyExpertsMoELayer, hidden: torch.Tensor) -> tuple:
    importance, fused = layer.importance(hidden) if layer.importance is not None else (None, hidden)
    return fused, None, importance


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> float:
    """Return seconds: wall time, or processor time on a single CPU thread."""
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def medians(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each step over interleaved rounds, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            synchronize()
            start = clock()
            step()
            synchronize()
            if turn >= 2:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def layer_step(layer: MoELayer, hidden: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """Return forward + backward of the whole layer."""

    def step() -> None:
        hidden.grad = None
        layer.zero_grad(set_to_none=True)
        layer(hidden)[0].backward(grad)

    return step


def router_step(layer: MoELayer, hidden: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """Return forward + backward of the router alone; importance is given."""
    importance = torch.rand(hidden.shape[:2].numel(), device=hidden.device, requires_grad=True)

    def step() -> None:
        hidden.grad = None
        layer.zero_grad(set_to_none=True)
        if isinstance(layer, AnyExpertsMoELayer):
            gates = layer.router(hidden, None, importance).gates_TE
        else:
            gates = layer.router(hidden)[0]
        gates.backward(grad)

    return step


def variants(topk: int) -> dict[str, tuple[type[MoELayer], dict]]:
    """Layers to compare, the first one with all others; what this device cannot fuse has no unfused counterpart."""
    equal = dynamic_options(topk, 1.0)
    found = {
        "Megatron MoELayer": (MoELayer, {"anyexperts_alpha": 0.0}),
        "ours, static": (AnyExpertsMoELayer, {"anyexperts_alpha": 0.0}),
        "ours, equal real slots": (AnyExpertsMoELayer, equal),
        "ours, 10 % fewer": (AnyExpertsMoELayer, dynamic_options(topk, 0.9)),
        "ours, 40 % fewer": (AnyExpertsMoELayer, dynamic_options(topk, 0.6)),
        "ours, equal, cap": (AnyExpertsMoELayer, equal | {"anyexperts_dispatch_eps": 0.1}),
    }
    unfused = {"moe_permute_fusion": False}
    if HAVE_TE:
        found["Megatron, unfused"] = (MoELayer, {"anyexperts_alpha": 0.0} | unfused)
        found["ours, equal, our permute"] = (AnyExpertsMoELayer, equal | unfused)
    if torch.cuda.is_available():
        found["ours, equal, operators"] = (AnyExpertsMoELayer, equal | unfused | {"anyexperts_kernels": "off"})
    return found


def measure(size: Size, dtype: torch.dtype, rounds: int) -> list[dict[str, float | str | int]]:
    """Print the rows of one size and return them."""
    device = torch.cuda.current_device()
    torch.manual_seed(0)
    hidden = torch.randn(size.tokens, 1, size.hidden, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn_like(hidden)
    layers, slots = {}, {}
    for name, (kind, options) in variants(size.topk).items():
        layers[name] = build(kind, make_config(size, dtype, **options))
        dynamic = "anyexperts_k_min" in options
        slots[name] = run_in(layers[name], hidden, 60) if dynamic else (float(size.topk),) * 2
    whole = medians({name: layer_step(layer, hidden, grad) for name, layer in layers.items()}, rounds)
    grad_TE = torch.randn(size.tokens, size.experts, device=device)
    routing = medians({name: router_step(layer, hidden, grad_TE) for name, layer in layers.items()}, 3 * rounds)
    stock = next(iter(layers))
    print(f"\nT {size.tokens}  H {size.hidden}  E {size.experts}  FFN {size.ffn}  top-{size.topk}  {dtype}")
    print(f"{'':26}{'slots':>7}{'real':>7}{'layer ms':>11}{'ratio':>8}{'router ms':>11}{'ratio':>8}")
    table = []
    for name in layers:
        row = {"layer": name, "tokens": size.tokens, "slots": slots[name][0], "real": slots[name][1]}
        row |= {"layer_ms": 1e3 * whole[name], "layer_ratio": whole[name] / whole[stock]}
        row |= {"router_ms": 1e3 * routing[name], "router_ratio": routing[name] / routing[stock]}
        table.append(row)
        print(
            f"{name:26}{row['slots']:7.2f}{row['real']:7.2f}{row['layer_ms']:11.2f}{row['layer_ratio']:8.3f}"
            f"{row['router_ms']:11.2f}{row['router_ratio']:8.3f}",
            flush=True,
        )
    return table


def main() -> None:
    """Parse, start a world of one rank, measure every size of the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="small", help="sizes to measure")
    parser.add_argument("--tokens", type=int, nargs="*", help="only the sizes of the preset with these token counts")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per variant")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there, after each size")
    args = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cpu.bridge()
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{Path(folder, 'rendezvous')}", rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} thread(s)"
        experts = "grouped GEMM" if HAVE_TE else "sequential experts"
        print(f"{where}; {experts}; forward + backward, median of {args.rounds} interleaved rounds")
        rows = []
        for size in PRESETS[args.preset]:
            if not args.tokens or size.tokens in args.tokens:
                rows += measure(size, dtype, args.rounds)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
