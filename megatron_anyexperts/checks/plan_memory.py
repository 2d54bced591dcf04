"""Bytes of a GPU: parameters and optimizer, activations, logits, exchanged slots; and of a host that saves.

Activations are those that Transformer Engine's layers keep for the backward pass, in bf16, or in FP8 the operands of
products. A formula for each layer, after Korthikanti et al. (arXiv 2205.05198), extended to grouped queries, mixtures
and what Megatron recomputes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_parameters import Parameters, Stage, stage_parameters, stages
from megatron_anyexperts.checks.plan_sizes import EncoderSizes, MixtureSizes, ModelSizes
from megatron_anyexperts.checks.plan_work import ENCODER_MLP


@dataclass(frozen=True)
class Precision:
    """Bytes of a parameter and of what belongs to it.

    Attributes:
        parameter, gradient: of its copy that computes, and of the accumulated gradient.
        optimizer: of master copy and moments, which the distributed optimizer spreads over data-parallel ranks.
        distributed: whether it does.
        fp8: products in FP8.
        fp8_copies: whether FP8 copies of weights lie beside the bf16 ones.
        fused_loss: cross entropy by Transformer Engine, in place.
    """

    parameter: int = 2
    gradient: int = 4
    optimizer: int = 12
    distributed: bool = True
    fp8: bool = False
    fp8_copies: bool = False
    fused_loss: bool = False

    @property
    def operand(self) -> int:
        """Of a saved operand of a product."""
        return 1 if self.fp8 else 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at its peak. Text rows; `pictures` is what rows full of pictures add."""

    static: float
    activations: float
    logits: float
    exchange: float
    exchange_worst: float
    pictures: float

    @property
    def text(self) -> float:
        """All, for text rows at the slot budget."""
        return self.static + self.activations + self.logits + self.exchange

    @property
    def most(self) -> float:
        """All, for rows full of pictures at the slot budget."""
        return self.text + self.pictures


def static_bytes(parameters: list[Parameters], layout: Layout, precision: Precision) -> float:
    """Of parameters, gradients and optimizer state of one rank."""
    experts = layout.expert * layout.expert_tensor
    found = 0.0
    for each in parameters:
        number = each.local(layout.tensor, experts)
        ranks = layout.expert_data if each.spread == "expert" else layout.data
        copy = 4 if each.wide else precision.parameter + 2 * (precision.fp8_copies and each.spread != "whole")
        # An fp32 parameter is its own master copy.
        state = precision.optimizer - 4 * (each.wide and not precision.distributed)
        found += number * (copy + precision.gradient + state / (ranks if precision.distributed else 1))
    return found


def layer_bytes(sizes: ModelSizes, letter: str, recompute: frozenset[str], operand: int) -> float:
    """What a layer keeps of one token, before it is spread over tensor-parallel ranks."""
    hidden, matrices = sizes.hidden, sizes.matrices
    kept = 2 * hidden
    if "full" in recompute:
        return kept
    if letter == "E":
        return kept + _mixture_bytes(sizes, sizes.mixture, recompute, operand)
    # The norm's output: kept by the fused norm and product as the operand.
    kept += operand * hidden
    if letter == "-":
        return kept if "mlp" in recompute else kept + (2 * (matrices - 1) + operand) * sizes.ffn
    attended = 2 * (sizes.query_width + sizes.kv_width) * (sizes.latent is None or "mla_up_proj" not in recompute)
    normed = 2 * (sizes.query_width + sizes.kv_width / 2) * bool(sizes.head_norm and not sizes.latent)
    if latent := sizes.latent:
        attended += (2 + operand) * ((latent.query_rank or 0) + latent.kv_rank)
    return kept + attended + normed + 2 * sizes.value_width + 4 * sizes.heads


def _mixture_bytes(sizes: ModelSizes, mixture: MixtureSizes, recompute: frozenset[str], operand: int) -> float:
    if "moe" in recompute:
        return 0.0
    read, inner = mixture.latent or sizes.hidden, 2 * (sizes.matrices - 1)
    kept = 0 if "layernorm" in recompute else 2 * sizes.hidden
    kept += 0 if "shared_experts" in recompute else (inner + operand) * mixture.shared
    # Logits, scores, gates in fp32 and masks.
    kept += 16 * (mixture.experts + mixture.virtual)
    activated = 0 if "moe_act" in recompute else operand * mixture.ffn
    return kept + mixture.real * (operand * read + inner * mixture.ffn + activated)


def encoder_bytes(encoder: EncoderSizes, recompute: frozenset[str], operand: int) -> float:
    """What the blocks of an encoder keep of one position."""
    hidden = encoder.hidden
    if "full" in recompute:
        return encoder.layers * 4.0 * hidden
    attention = (2 + operand) * hidden + 6 * hidden + 2 * hidden + 4 * encoder.heads
    mlp = (2 + operand) * hidden + (2 + operand) * encoder.ffn
    return encoder.layers * (attention + (2 * hidden if recompute & ENCODER_MLP else mlp))


def logit_bytes(sizes: ModelSizes, layout: Layout, precision: Precision) -> float:
    """At the peak of the loss: kept by earlier heads, and in work for the last one."""
    kept, working = (2, 4) if precision.fused_loss else (4, 10)
    values = layout.micro_batch * layout.sequence * sizes.vocabulary / layout.tensor
    return values * (kept * len(sizes.prediction) + working)


def exchange_bytes(sizes: ModelSizes, layout: Layout, slots: float) -> float:
    """Of the slots on their way: sent, received, computed and sent back, of one layer."""
    return 4 * 2.0 * (sizes.mixture.latent or sizes.hidden) * slots


def worst_slots(mixture: MixtureSizes, layout: Layout) -> float:
    """Most slots that one rank can receive in a layer: of every token of the group as many as it has experts for."""
    tokens = layout.tokens * layout.expert
    everything = tokens * min(mixture.most, mixture.experts / layout.expert)
    return everything if mixture.limit is None else min(everything, mixture.limit * layout.tokens * mixture.most)


def in_flight(layout: Layout, rank: int) -> int:
    """Microbatches whose activations a pipeline rank keeps, in one-forward-one-backward order."""
    return min(layout.pipeline - rank, layout.microbatches)


def copy_bytes(sizes: ModelSizes, layers: int) -> float:
    """Of the places for copies on one GPU: weights, their gradients, and these in a row; kept ones in all layers."""
    mixture = sizes.mixture
    weights = mixture.copies * sizes.matrices * (mixture.latent or sizes.hidden) * mixture.ffn
    return 2.0 * weights * (layers if mixture.keeps else 1) + 4.0 * weights


def stage_memory(sizes: ModelSizes, layout: Layout, precision: Precision, stage: Stage, rank: int) -> Memory:
    """Of one GPU of a pipeline rank."""
    waiting, mixture = in_flight(layout, rank), sizes.mixture
    letters = stage.letters + "".join(sizes.prediction) * stage.last
    kept = [layer_bytes(sizes, letter, layout.recompute, precision.operand) for letter in letters]
    again = 0.0
    if layout.recompute & {"full", "moe"}:
        # The layer that is just being computed again keeps everything.
        again = max((layer_bytes(sizes, letter, frozenset(), precision.operand) for letter in letters), default=0.0)
    slots = layout.tokens * mixture.real if mixture and "E" in letters else 0.0
    worst = worst_slots(mixture, layout) if slots else 0.0
    copies = copy_bytes(sizes, letters.count("E")) if slots else 0
    beyond = (worst - slots) * (layer_bytes(sizes, "E", frozenset(), precision.operand) / mixture.real if slots else 0)
    pictures = 0.0
    if stage.first and sizes.vision:
        places = layout.micro_batch * layout.sequence * sizes.vision.merged
        # One microbatch's: gradients of placed features are needed until its backward pass.
        pictures = waiting * places * encoder_bytes(sizes.vision, layout.recompute, precision.operand) / layout.tensor
    return Memory(
        static=static_bytes(list(stage_parameters(sizes, stage)), layout, precision),
        activations=layout.tokens * (waiting * sum(kept) + again),
        logits=logit_bytes(sizes, layout, precision) if stage.last else 0.0,
        exchange=copies + exchange_bytes(sizes, layout, slots) if slots else 0.0,
        exchange_worst=copies + exchange_bytes(sizes, layout, worst) + beyond if slots else 0.0,
        pictures=pictures,
    )


def fullest(sizes: ModelSizes, layout: Layout, precision: Precision) -> Memory:
    """Of the GPU that needs most, over the pipeline's stages."""
    every = enumerate(stages(sizes, layout.pipeline))
    return max((stage_memory(sizes, layout, precision, stage, rank) for rank, stage in every), key=lambda m: m.most)
