"""Floating-point operations that a model needs for what it read: from its sizes and from measured counts.

A multiplication and an addition are two operations. Matrix products are counted; norms, activations, softmax, gates and
products with a single vector are not. Padding and recomputation are not counted either: they are work, but not the
model's.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch

from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.build import EncoderConfig
from megatron_anyexperts.models.encoder import POSITION_FEATURES
from megatron_anyexperts.moe.config import AnyExpertsConfig

WORK = ("tokens", "token_pairs", "patches", "patch_pairs", "frames", "steps", "step_pairs", "clip_tokens")
"""Counts of one or more microbatches: decoder tokens; pairs of a token and one it attends to; image patches and their
pairs; log-mel frames, positions that the audio front end makes of them, their pairs, and audio tokens."""

# Dense bf16 peak in TFLOP/s, from NVIDIA's data sheets, by the name that torch reports.
PEAK_BF16 = {
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250.0,
}


def measure_work(batch: dict[str, Any], shape: MediaShape) -> torch.Tensor:
    """Count what a microbatch asks of the model, fp64 `[len(WORK)]` on its device, without waiting for the device.

    Args:
        batch: see `microbatch.FIELDS`. Tokens attend to those before them in their document, patches to those of their
            frame, audio positions to those of their clip.
        shape: media geometry.
    """
    real_BS = batch["segment_ids"] > 0
    times_N, patches_N = batch["image_grids"][:, 0].double(), batch["image_grids"][:, 1:].double().prod(1)
    frames_M = batch["audio_lengths"].double()
    steps_M = (frames_M / 2).ceil()
    counts = (
        real_BS.sum(),
        (real_BS * (batch["position_ids"] + 1)).sum(),
        (times_N * patches_N).sum(),
        (times_N * patches_N**2).sum(),
        frames_M.sum(),
        steps_M.sum(),
        (steps_M**2).sum(),
        (frames_M / shape.audio_stride).ceil().sum(),
    )
    return torch.stack([count.to(real_BS.device, torch.float64) for count in counts])


@dataclass(frozen=True)
class ModelFlops:
    """Counts the operations of one model.

    Args:
        config: the decoder's.
        pattern: Megatron's hybrid layer pattern; see `knows`.
        vocabulary: columns of the output layer.
        encoders: sizes, and which parts are frozen.
        shape: media geometry.
    """

    config: AnyExpertsConfig
    pattern: str
    vocabulary: int
    encoders: EncoderConfig
    shape: MediaShape

    @staticmethod
    def knows(pattern: str) -> bool:
        """Whether the operations of all layers of a pattern can be counted."""
        return not set(pattern) - set("*-E|/")

    @classmethod
    def from_args(cls, args: Namespace, config: AnyExpertsConfig) -> ModelFlops:
        """For the model that Megatron's arguments describe."""
        encoders, shape = EncoderConfig.from_args(args), MediaShape.from_args(args)
        return cls(config, args.hybrid_layer_pattern, args.padded_vocab_size, encoders, shape)

    @property
    def mixture_layers(self) -> int:
        """Mixture layers that a token passes, those of multi-token prediction among them."""
        return self.pattern.count("E")

    def forward(self, work: dict[str, float], real_slots: float) -> dict[str, float]:
        """Operations of one forward pass, by part of the model (see `models.build.part_of`).

        Args:
            work: the counts of `WORK`.
            real_slots: slots that real experts computed, summed over tokens and mixture layers.
        """
        encoders, width = self.encoders, self.config.hidden_size
        vision, audio = encoders.vision_hidden_size, encoders.audio_hidden_size
        parts = {"decoder": self._decoder(work, real_slots)}
        if encoders.vision_num_layers:
            merged = self.shape.spatial_merge**2
            parts["vision_encoder"] = 2 * work["patches"] * vision * (self.shape.patch_values + 3 * POSITION_FEATURES)
            parts["vision_encoder"] += self._encoder("vision", work["patches"], work["patch_pairs"])
            parts["vision_projector"] = 2 * work["patches"] / merged * (merged * vision + width) * width
        if encoders.audio_num_layers:
            convolutions = 3 * audio * (self.shape.n_mels * work["frames"] + audio * work["steps"])
            parts["audio_encoder"] = 2 * (convolutions + POSITION_FEATURES * audio * work["steps"])
            parts["audio_encoder"] += self._encoder("audio", work["steps"], work["step_pairs"])
            parts["audio_projector"] = 2 * work["clip_tokens"] * (self.shape.audio_merge * audio + width) * width
        return parts

    def training(self, work: dict[str, float], real_slots: float) -> float:
        """Operations of training steps; see `forward` for the arguments."""
        return sum(cost * self.passes(part) for part, cost in self.forward(work, real_slots).items())

    def passes(self, part: str) -> int:
        """How often a training step does the products of a part: 3 times, or fewer where parts are frozen.

        A product in the forward pass has two in the backward pass, for the gradients of its weight and of its input. A
        frozen part needs no gradients of weights, and none of inputs unless something before it learns.
        """
        names = ("vision_encoder", "vision_projector", "audio_encoder", "audio_projector", "importance", "decoder")
        learns = {name: not getattr(self.encoders, f"freeze_{name}") for name in names}
        before = names if part == "decoder" else (part, part.replace("projector", "encoder"))
        return 1 + learns[part] + any(learns[name] for name in before)

    def _decoder(self, work: dict[str, float], real_slots: float) -> float:
        config, tokens = self.config, work["tokens"]
        matrices = 3 if config.gated_linear_unit else 2
        head = config.hidden_size * self.vocabulary
        queries = config.num_attention_heads * config.kv_channels
        groups = (config.num_query_groups or config.num_attention_heads) * config.kv_channels
        per_token = {
            "*": 2 * config.hidden_size * (queries + groups),
            "-": matrices * config.hidden_size * config.ffn_hidden_size,
            "E": self._mixture() if "E" in self.pattern else 0,
            # Each depth of multi-token prediction joins two states and predicts over the whole vocabulary.
            "/": 2 * config.hidden_size**2 + head,
        }
        products = tokens * (head + sum(self.pattern.count(letter) * cost for letter, cost in per_token.items()))
        products += self.pattern.count("*") * 2 * queries * work["token_pairs"]
        if real_slots:
            width = config.moe_latent_size or config.hidden_size
            products += real_slots * matrices * width * config.moe_ffn_hidden_size
        return 2.0 * products

    def _mixture(self) -> int:
        """Products per token of a mixture layer without its routed experts."""
        config = self.config
        columns = config.num_moe_experts + (config.anyexperts_virtual_experts or 0)
        products = config.hidden_size * columns
        if config.anyexperts_needs_importance and not config.anyexperts_stock_moe:
            products += config.hidden_size * config.anyexperts_importance_hidden
        if config.moe_shared_expert_intermediate_size:
            matrices = 3 if config.gated_linear_unit else 2
            products += matrices * config.hidden_size * config.moe_shared_expert_intermediate_size
        if config.moe_latent_size:
            products += 2 * config.hidden_size * config.moe_latent_size
        return products

    def _encoder(self, name: str, positions: float, pairs: float) -> float:
        layers, hidden, inner = (
            getattr(self.encoders, f"{name}_{field}") for field in ("num_layers", "hidden_size", "ffn_hidden_size")
        )
        return 2 * layers * (positions * (4 * hidden**2 + 2 * hidden * inner) + 2 * hidden * pairs)
