"""Seconds of a step by roofline: each product at its peak, each byte at its bandwidth, times what is reached of them.

Nothing overlaps but gradients and parameters with computation, where that is on.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_memory import Precision
from megatron_anyexperts.checks.plan_parameters import Stage, stage_parameters, stages
from megatron_anyexperts.checks.plan_sizes import ModelSizes
from megatron_anyexperts.checks.plan_traffic import (
    Sent,
    data_exchange,
    expert_exchange,
    pipeline_exchange,
    tensor_exchange,
)
from megatron_anyexperts.checks.plan_work import (
    KERNELS,
    Work,
    again,
    encoder_again,
    encoder_work,
    head_work,
    layer_work,
)
from megatron_anyexperts.hardware import Efficiency, Gpu


@dataclass(frozen=True)
class Feed:
    """What a step reads.

    Attributes:
        document: tokens of a document.
        pictures: share of the tokens that the vision encoder makes.
        patches: patches of a picture.
    """

    document: float
    pictures: float = 0.0
    patches: float = 1024.0


@dataclass(frozen=True)
class Setting:
    """What stays the same while layouts are compared.

    Attributes:
        overlap: gradients and parameters travel behind computation.
        once: see `plan_traffic.expert_exchange`.
    """

    sizes: ModelSizes
    precision: Precision
    gpu: Gpu
    reached: Efficiency
    feed: Feed
    overlap: bool = True
    once: bool = False


@dataclass(frozen=True)
class Step:
    """Seconds of a step by cause, those of the slowest pipeline stage; and what a GPU of it sends."""

    seconds: dict[str, float]
    sent: dict[str, Sent]

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())


def step_time(setting: Setting, layout: Layout) -> Step:
    """Of the slowest pipeline stage, with the bubble that it makes for all."""
    every = (_stage_time(setting, layout, stage) for stage in stages(setting.sizes, layout.pipeline))
    return max(every, key=lambda step: step.total)


def _stage_time(setting: Setting, layout: Layout, stage: Stage) -> Step:
    sizes, gpu, reached = setting.sizes, setting.gpu, setting.reached
    chunks = max(1, (sizes.pattern.partition("/")[0].count("|") + 1) // layout.pipeline)
    parts = _compute(setting, layout, stage)
    sent = _exchanges(setting, layout, stage)
    for cause in ("expert exchange", "tensor exchange", "pipeline exchange"):
        parts[cause] = sent[cause].seconds(gpu, reached)
    busy = sum(parts.values())
    seconds = {cause: layout.microbatches * value for cause, value in parts.items()}
    seconds["pipeline bubble"] = busy * (layout.pipeline - 1) / chunks
    sent = {cause: each.times(layout.microbatches) for cause, each in sent.items()}
    sent["data exchange"] = data_exchange(sizes, layout, setting.precision, stage)
    shown = 1 - reached.hidden * setting.overlap
    seconds["data exchange"] = shown * sent["data exchange"].seconds(gpu, reached)
    seconds["optimizer"] = _optimizer_bytes(setting, layout, stage) / (gpu.hbm * reached.hbm)
    seconds["everything else"] = sum(seconds.values()) * (1 / reached.whole - 1)
    return Step(seconds, sent)


def _compute(setting: Setting, layout: Layout, stage: Stage) -> dict[str, float]:
    """Seconds of a microbatch without exchanges."""
    sizes, gpu, reached = setting.sizes, setting.gpu, setting.reached
    layers, plain, quantised, kernels, waits = Work(), Work(), 0.0, 0.0, 0
    for letter in stage.letters + "".join(sizes.prediction) * stage.last:
        forward = layer_work(sizes, letter, setting.feed.document)
        repeated = again(sizes, letter, layout.recompute, forward)
        layers += forward.times(3) + repeated
        if setting.precision.fp8:
            # Read in bf16, written in FP8 by rows and by columns.
            quantised += 4 * operands(sizes, letter) * (3 + (repeated.operations > 0))
        kernels += KERNELS[letter] * (4 if repeated.operations else 3) / 3
        waits += (letter == "E") * (1 + (repeated.grouped > 0))
    if stage.last:
        plain += head_work(sizes).times(3)
        kernels += KERNELS["head"] * (1 + len(sizes.prediction))
    if stage.first and sizes.vision and setting.feed.pictures:
        picture = encoder_work(sizes.vision, sizes.hidden, setting.feed.patches)
        passes = picture.times(3) + encoder_again(sizes.vision, layout.recompute, picture)
        plain += passes.times(setting.feed.pictures)
        kernels += KERNELS["encoder"] * sizes.vision.layers
    peak = gpu.fp8 * reached.fp8 if setting.precision.fp8 else gpu.bf16 * reached.bf16
    tokens, bf16 = layout.tokens, gpu.bf16 * reached.bf16
    weights = sum(each.local(layout.tensor, layout.expert * layout.expert_tensor)
                  for each in stage_parameters(sizes, stage) if each.part != "embedding")  # fmt: skip
    # Each microbatch reads the weights forward and backward, and adds to the gradients.
    through = weights * (2 * setting.precision.parameter + 2 * setting.precision.gradient)
    return {
        "products of dense layers": tokens * (layers.dense / peak + plain.dense / bf16),
        "products of experts": tokens * layers.grouped / (peak * reached.grouped),
        "attention": tokens * (layers.attention + plain.attention) / (gpu.bf16 * reached.attention),
        "memory traffic": (tokens * (layers.moved + plain.moved + quantised) + through) / (gpu.hbm * reached.hbm),
        "launches and waits": kernels * reached.launch + waits * reached.wait,
    }


def operands(sizes: ModelSizes, letter: str) -> float:
    """Values of a token that are quantised for the products of a layer."""
    if letter == "*":
        return sizes.hidden + sizes.value_width
    if letter == "-":
        return sizes.hidden + sizes.ffn
    mixture = sizes.mixture
    return mixture.real * ((mixture.latent or sizes.hidden) + mixture.ffn) + bool(mixture.shared) * (
        sizes.hidden + mixture.shared
    )


def _exchanges(setting: Setting, layout: Layout, stage: Stage) -> dict[str, Sent]:
    """Bytes of a microbatch."""
    sizes = setting.sizes
    letters = stage.letters + "".join(sizes.prediction) * stage.last
    expert = Sent()
    if mixtures := letters.count("E"):
        # There and back, forward and backward; forward again where the layer is recomputed.
        ways = 4 + 2 * bool(layout.recompute & {"full", "moe"})
        expert = expert_exchange(sizes, layout, setting.once).times(ways * mixtures)
    tensor = Sent()
    for letter in letters:
        tensor += tensor_exchange(sizes, layout, letter)
    chunks = max(1, (sizes.pattern.partition("/")[0].count("|") + 1) // layout.pipeline)
    pipeline = pipeline_exchange(sizes, layout).times(chunks)
    return {"expert exchange": expert, "tensor exchange": tensor, "pipeline exchange": pipeline}


def _optimizer_bytes(setting: Setting, layout: Layout, stage: Stage) -> float:
    """Moved by an optimizer step: state and gradients of a rank's share, gradients once more for their norm."""
    precision, experts = setting.precision, layout.expert * layout.expert_tensor
    moved = 0.0
    for each in stage_parameters(setting.sizes, stage):
        ranks = layout.expert_data if each.spread == "expert" else layout.data
        share = each.local(layout.tensor, experts) / (ranks if precision.distributed else 1)
        moved += share * (2 * precision.optimizer + 2 * precision.gradient + precision.parameter)
        moved += each.local(layout.tensor, experts) * precision.gradient  # set to zero
    return moved
