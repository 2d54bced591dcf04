"""Compares precisions and implementations of the whole model on one device: one command, one table.

    anyexperts gpu-check [--steps 50] [--hidden-size 1024] [--no-te] [--attention fused] [--json FILE]

Every row trains the same small multimodal model, from the same weights on the same batches, in another way, and is
held against a reference row: the losses of all steps, the first gradient's direction, memory and speed. FP8 recipes
are those that the doctor finds usable. Without CUDA it ends with exit code 2; `--device cpu` runs the
rows that need no GPU. Exit code 1: a row failed or is further from its reference than its limit.
`--attention` chooses Transformer Engine's attention, for instance cuDNN's fused one, and runs the rows that have it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_anyexperts.checks.doctor import inspect_installation
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.platform import cpu

SHAPE = MediaShape(patch_size=14, spatial_merge=2, n_mels=80, audio_stride=8)
VOCABULARY = 1024
OF_ATTENTION = ("dynamic, fp32, local", "dynamic, bf16, local", "dynamic, bf16, TE", "dynamic, bf16, TE, fused rope")
"""Rows that `--attention` runs."""
DYNAMIC = {
    "anyexperts_k_min": 1,
    "anyexperts_k_max": 4,
    "anyexperts_rho_max": 0.5,
    "anyexperts_target_slots": 2.0,
    "anyexperts_target_real": 1.8,
}
STATIC = {"anyexperts_alpha": 0.0}
STOCK = {"anyexperts_stock_moe": True}
FP32 = {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
TE = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True}


@dataclass(frozen=True)
class Row:
    """One way to train the model.

    Args:
        name: shown in the table.
        settings: fields of the configuration.
        reference: name of the row it is held against; None for no comparison.
        loss_limit: largest mean relative difference of the losses of all steps.
        cosine_limit: smallest cosine of the first gradients.
    """

    name: str
    settings: dict[str, Any]
    reference: str | None = None
    loss_limit: float = 0.0
    cosine_limit: float = 1.0


@dataclass
class Result:
    """What a row measured."""

    losses: list[float]
    gradient: dict[tuple, torch.Tensor]
    tokens_per_second: float
    peak_gib: float


def rows(cuda: bool, fp8_recipes: tuple[str, ...], fusion: bool = False, te: bool = True) -> list[Row]:
    """The rows that a device can run; a reference comes before what is held against it.

    Args:
        cuda: whether there is a GPU.
        fp8_recipes: usable ones.
        fusion: whether gradient accumulation can be fused.
        te: whether there is Transformer Engine, on a GPU.
    """
    fp32 = Row("dynamic, fp32, local", DYNAMIC | FP32)
    bf16 = Row("dynamic, bf16, local", DYNAMIC | BF16, fp32.name, 0.02, 0.98)
    stock = Row("stock top-k, fp32, local", STOCK | FP32)
    plan = [fp32, bf16, stock, Row("static, fp32, local", STATIC | FP32, stock.name, 1e-5, 0.99999)]
    if cuda:
        operators = DYNAMIC | FP32 | {"anyexperts_kernels": "off"}
        plan.append(Row("dynamic, fp32, local, no kernels", operators, fp32.name, 1e-4, 0.9999))
    if cuda and te:
        on_te = Row("dynamic, bf16, TE", DYNAMIC | BF16 | TE, bf16.name, 0.02, 0.98)
        fused_rope = on_te.settings | {"apply_rope_fusion": True}
        rope = Row("dynamic, bf16, TE, fused rope", fused_rope, on_te.name, 0.005, 0.999)
        stock_te = Row("stock top-k, bf16, TE", STOCK | BF16 | TE)
        static_te = Row("static, bf16, TE", STATIC | BF16 | TE, stock_te.name, 0.005, 0.999)
        plan += [on_te, rope, stock_te, static_te]
        if fusion:
            fused = {"gradient_accumulation_fusion": True}
            plan.append(Row("dynamic, bf16, TE, fused gradients", on_te.settings | fused, on_te.name, 0.005, 0.999))
        for recipe in fp8_recipes:
            fp8 = {"fp8": "hybrid", "fp8_recipe": recipe}
            if recipe == "delayed":
                fp8 |= {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
            plan.append(Row(f"dynamic, fp8 {recipe}, TE", on_te.settings | fp8, on_te.name, 0.03, 0.9))
    return plan


def build(settings: dict[str, Any], options: Namespace) -> torch.nn.Module:
    """The check's model: two mixture blocks behind a dense one, with both encoders."""
    from megatron_anyexperts.models.build import EncoderConfig, LanguageModelConfig, build_model
    from megatron_anyexperts.moe.config import AnyExpertsConfig

    hidden = options.hidden_size
    config = AnyExpertsConfig(
        **{
            "num_layers": 6,
            "hidden_size": hidden,
            "ffn_hidden_size": 2 * hidden,
            "num_attention_heads": hidden // 64,
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "qk_layernorm": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "num_moe_experts": 16,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": hidden,
            "moe_router_score_function": "sigmoid",
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "transformer_impl": "local",
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "use_cpu_initialization": True,
        }
        | settings
    )
    encoders = {
        f"{kind}_{name}": value
        for kind in ("vision", "audio")
        for name, value in (("num_layers", 2), ("hidden_size", 256), ("ffn_hidden_size", 512), ("num_heads", 4))
    }
    if options.attention:  # Megatron sets it for the whole process
        from megatron.core.transformer.enums import AttnBackend

        config.attention_backend = AttnBackend[options.attention]
    language = LanguageModelConfig("*-*E*E", VOCABULARY, options.seq_length, rotary_percent=0.5)
    torch.manual_seed(1)
    model = build_model(language, EncoderConfig(**encoders), SHAPE, config).to(options.device)
    return model.bfloat16() if config.bf16 else model


def batches(options: Namespace, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Packed rows of two documents: an image with text, a clip with text. Training repeats them."""
    generator = torch.Generator().manual_seed(2)
    size, first = options.seq_length, options.seq_length // 2
    image, clip = 16, 12
    modality = torch.zeros(1, size, dtype=torch.int8)
    modality[0, 1 : 1 + image] = 1
    modality[0, first + 1 : first + 1 + clip] = 2
    segments = (torch.arange(size)[None] >= first).int() + 1
    segments[0, -8:] = 0
    made = []
    for _ in range(count):
        text = torch.randint(VOCABULARY, (1, size + 1), generator=generator)
        batch = {
            "tokens": text[:, :-1],
            "labels": text[:, 1:],
            "position_ids": torch.arange(size)[None] % first,
            "segment_ids": segments,
            "token_modality": modality,
            "image_patches": torch.randn(4 * image, SHAPE.patch_values, generator=generator),
            "audio_features": torch.randn(clip * SHAPE.audio_stride, SHAPE.n_mels, generator=generator),
        }
        batch = {name: value.to(options.device) for name, value in batch.items()}
        batch["image_grids"] = torch.tensor([[1, 8, 8]])
        batch["audio_lengths"] = torch.tensor([clip * SHAPE.audio_stride])
        made.append(batch)
    return made


def sharded_parts(model: torch.nn.Module) -> dict[tuple, torch.Tensor]:
    """Parameters by their place in a distributed checkpoint, which does not depend on the implementation."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return {
        (part.key, part.global_offset): part.data for part in nested_values(state) if isinstance(part, ShardedTensor)
    }


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give `target` the weights of `source`; parts that only one of them has stay as they are."""
    weights = sharded_parts(source)
    for place, values in sharded_parts(target).items():
        if place in weights:
            values.copy_(weights[place].view_as(values))


def train(row: Row, weights: torch.nn.Module, options: Namespace) -> Result:
    """Train the row's model from the given weights with fp32 master weights and Adam."""
    model = build(row.settings, options)
    copy_weights(weights, model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float().clone() for parameter in parameters]
    for parameter, master in zip(parameters, masters, strict=True):
        # Where a fused kernel adds the gradient, and how it says so: as under Megatron's DDP.
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(master), False
    optimizer = torch.optim.Adam(masters, lr=options.lr)
    data, losses, gradient = batches(options), [], None
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for step in range(options.steps):
        batch = data[step % len(data)]
        real = batch["segment_ids"] > 0
        loss = model(**batch)[real].float().mean()
        loss.backward()
        losses.append(loss.item())
        for master, parameter in zip(masters, parameters, strict=True):
            if parameter.grad is not None and not parameter.grad_added_to_main_grad:
                parameter.main_grad += parameter.grad
            master.grad, parameter.grad = parameter.main_grad.clone(), None
            parameter.main_grad.zero_()
            parameter.grad_added_to_main_grad = False
        if step == 0:
            gradient = common_gradient(model, parameters, masters)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
        if step == 0:
            started = time.perf_counter()  # the first step warms up
    seconds = time.perf_counter() - started
    speed = (options.steps - 1) * options.seq_length / seconds if options.steps > 1 else float("nan")
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else float("nan")
    return Result(losses, gradient, speed, peak)


def common_gradient(
    model: torch.nn.Module, parameters: list[torch.Tensor], masters: list[torch.Tensor]
) -> dict[tuple, torch.Tensor]:
    """First gradient by place, so that implementations with other parameter names can be compared."""
    with torch.no_grad():
        kept = [parameter.detach().clone() for parameter in parameters]
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master.grad)
        gradient = {place: values.detach().float().cpu().clone() for place, values in sharded_parts(model).items()}
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)
    return gradient


def loss_difference(result: Result, reference: Result) -> float:
    """Mean over the steps of the relative difference of the losses."""
    pairs = zip(result.losses, reference.losses, strict=True)
    return sum(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs) / len(result.losses)


def gradient_cosine(result: Result, reference: Result) -> float:
    """Cosine between the first gradients, over the parameters that both have."""
    places = sorted(result.gradient.keys() & reference.gradient.keys(), key=str)
    ours, theirs = (torch.cat([part.gradient[place].flatten() for place in places]) for part in (result, reference))
    return torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=0).item()


def compare(plan: list[Row], options: Namespace) -> tuple[bool, list[dict[str, Any]]]:
    """Run all rows and print the table; return whether every row is within its limits, and the rows as printed."""
    table: list[dict[str, Any]] = []
    print(f"{'row':36}{'first':>8}{'last':>8}{'loss diff':>11}{'cosine':>9}{'tokens/s':>10}{'GiB':>7}  verdict")
    weights, results, passed = build(DYNAMIC | FP32, options), {}, True
    for row in plan:
        try:
            result = results[row.name] = train(row, weights, options)
        except Exception as error:
            verdict = f"FAILED: {type(error).__name__}: {error}"
            print(f"{row.name:36}{verdict}")
            table.append({"row": row.name, "verdict": verdict})
            passed = False
            continue
        cells, verdict, difference, cosine = f"{'':>11}{'':>9}", "reference", None, None
        if row.reference is not None and row.reference not in results:
            verdict = f"no reference: {row.reference} failed"
        elif row.reference is not None:
            difference = loss_difference(result, results[row.reference])
            cosine = gradient_cosine(result, results[row.reference])
            fine = difference <= row.loss_limit and cosine >= row.cosine_limit
            passed &= fine
            cells = f"{difference:>11.2e}{cosine:>9.5f}"
            verdict = f"{'ok' if fine else 'TOO FAR'} (limits {row.loss_limit:g}, {row.cosine_limit:g})"
        figures = {"row": row.name, "loss_difference": difference, "cosine": cosine}
        figures |= {"tokens_per_s": result.tokens_per_second, "gib": result.peak_gib, "verdict": verdict}
        table.append(figures)
        ends = f"{result.losses[0]:>8.3f}{result.losses[-1]:>8.3f}"
        print(
            f"{row.name:36}{ends}{cells}{result.tokens_per_second:>10.0f}{result.peak_gib:>7.2f}  {verdict}", flush=True
        )
    return passed, table


@contextlib.contextmanager
def one_rank(device: str) -> Iterator[None]:
    """Megatron's process groups for a single process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description="Compare precisions and implementations of the model.")
    own.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    own.add_argument("--steps", type=int, default=50, help="training steps of each row")
    own.add_argument("--hidden-size", type=int, default=1024, help="width of the decoder, a multiple of 64")
    own.add_argument("--seq-length", type=int, default=1024, help="tokens of a row, a multiple of 64")
    own.add_argument("--lr", type=float, default=3e-4)
    own.add_argument("--no-te", action="store_true", help="leave out the rows that need Transformer Engine")
    own.add_argument("--attention", choices=["fused", "flash", "unfused"], help="attention of Transformer Engine")
    own.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(cli)
    found = inspect_installation()
    cuda, te = options.device == "cuda", not options.no_te
    if cuda and (found.capability is None or te and found.transformer_engine is None):
        missing, rest = ("CUDA", "--device cpu") if found.capability is None else ("Transformer Engine", "--no-te")
        print(f"{missing} is missing (see anyexperts doctor); {rest} runs the rest", file=sys.stderr)
        return 2
    cpu.bridge()
    from megatron_anyexperts.models.build import can_fuse_gradient_accumulation

    logging.getLogger("megatron").setLevel(logging.ERROR)
    with one_rank(options.device):
        fusion = can_fuse_gradient_accumulation()
        if not fusion:
            print("gradient accumulation fusion is off, as in training: it needs apex")
        plan = rows(cuda, found.fp8_recipes, fusion, te)
        if options.attention:
            plan = [row for row in plan if row.name in OF_ATTENTION]
        passed, table = compare(plan, options)
    if options.json:
        known = [{name: None if value != value else value for name, value in row.items()} for row in table]
        options.json.write_text(json.dumps(known, indent=1))
    return 0 if passed else 1
