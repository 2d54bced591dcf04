"""Operations and bytes of memory traffic that a layer asks for, for one token."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anyexperts.checks.plan_sizes import EncoderSizes, ModelSizes


@dataclass(frozen=True)
class Work:
    """Of one token, forward.

    Attributes:
        dense, grouped, attention: operations of products with weights, of those of routed experts, of attention.
        moved: bytes read and written between products.
    """

    dense: float = 0.0
    grouped: float = 0.0
    attention: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, factor: float) -> Work:
        """As often."""
        return Work(*(getattr(self, name) * factor for name in self.__dataclass_fields__))

    @property
    def operations(self) -> float:
        """All of them."""
        return self.dense + self.grouped + self.attention


KERNELS = {"*": 60, "-": 30, "E": 250, "head": 40, "encoder": 90}
"""Launches of a layer, of an output layer with its loss, of a block of an encoder, forward and backward: rounded."""


def layer_work(sizes: ModelSizes, letter: str, document: float) -> Work:
    """Of a layer with its norm and residual.

    Args:
        document: tokens of a document, within which tokens attend to those before them.
    """
    hidden = sizes.hidden
    around = 10.0 * hidden  # norm and residual: read and written, bf16
    if letter == "*":
        scores = (sizes.query_width + sizes.value_width) * document
        moved = around + 2 * (3 * sizes.query_width + 3 * sizes.kv_width + 2 * sizes.value_width)
        return Work(2.0 * attention_weights(sizes), 0.0, scores, moved)
    inner = sizes.matrices - 1
    if letter == "-":
        weights = sizes.matrices * hidden * sizes.ffn
        return Work(2.0 * weights, 0.0, 0.0, around + 4 * hidden + 2 * (2 * inner + 2) * sizes.ffn)
    mixture = sizes.mixture
    read = mixture.latent or hidden
    dense = hidden * (mixture.experts + mixture.virtual + mixture.importance) + sizes.matrices * hidden * mixture.shared
    dense += 2 * hidden * mixture.latent if mixture.latent else 0
    # A slot: permuted, sorted by expert, read, written, sorted back, summed; and its inner values.
    slot = 2 * (2 + 2 + 1 + 1 + 2 + 1) * read + 2 * (2 * inner + 2) * mixture.ffn
    moved = around + 2 * (2 * inner + 2) * mixture.shared + 24 * (mixture.experts + mixture.virtual)
    grouped = 2.0 * mixture.real * sizes.matrices * read * mixture.ffn
    return Work(2.0 * dense, grouped, 0.0, moved + mixture.real * slot)


def attention_weights(sizes: ModelSizes) -> int:
    """Products of a token with the weights of an attention layer."""
    hidden, latent = sizes.hidden, sizes.latent
    out = hidden * sizes.value_width
    if latent is None:
        return out + hidden * (sizes.query_width + sizes.kv_width)
    down = hidden * ((latent.query_rank or 0) + latent.kv_rank + latent.rotary)
    return out + down + latent_weights(sizes)


def latent_weights(sizes: ModelSizes) -> int:
    """Those of them that bring compressed queries, keys and values up again."""
    latent = sizes.latent
    queries = (latent.query_rank or sizes.hidden) * sizes.query_width
    return queries + latent.kv_rank * sizes.heads * (latent.plain + latent.value)


def head_work(sizes: ModelSizes) -> Work:
    """Of the output layer and the loss, once for each depth of prediction and once more."""
    heads = 1 + len(sizes.prediction)
    join = Work(4.0 * sizes.hidden**2, 0.0, 0.0, 20.0 * sizes.hidden).times(len(sizes.prediction))
    return join + Work(2.0 * sizes.hidden * sizes.vocabulary, 0.0, 0.0, 16.0 * sizes.vocabulary).times(heads)


def encoder_work(encoder: EncoderSizes, output: int, neighbours: float) -> Work:
    """Of one token that an encoder makes, its projector too.

    Args:
        neighbours: positions that a position attends to.
    """
    hidden, ffn, layers = encoder.hidden, encoder.ffn, encoder.layers
    weights = encoder.front + layers * (4 * hidden**2 + 2 * hidden * ffn)
    moved = layers * (20.0 * hidden + 14 * hidden + 8 * ffn)
    position = Work(2.0 * weights, 0.0, layers * 4.0 * hidden * neighbours, moved)
    projector = Work(2.0 * (encoder.merged * hidden + output) * output)
    return position.times(encoder.merged) + projector


def encoder_again(encoder: EncoderSizes, recompute: frozenset[str], work: Work) -> Work:
    """What of an encoder's forward work for one token the backward pass does once more."""
    if "full" in recompute:
        return work
    mlp = 4.0 * encoder.layers * encoder.hidden * encoder.ffn * encoder.merged
    return Work(dense=mlp * bool(recompute & ENCODER_MLP))


ENCODER_MLP = frozenset({"mlp", "moe", "moe_act"})
"""Modules of the decoder for which an encoder recomputes its MLPs; see `models.encoder`."""


def again(sizes: ModelSizes, letter: str, recompute: frozenset[str], work: Work) -> Work:
    """What of a layer's forward work the backward pass does once more."""
    if "full" in recompute or (letter == "E" and "moe" in recompute) or (letter == "-" and "mlp" in recompute):
        return work
    norm = 6.0 * sizes.hidden * ("layernorm" in recompute)
    if letter == "*":
        up = 2.0 * latent_weights(sizes) if sizes.latent and "mla_up_proj" in recompute else 0.0
        return Work(up, 0.0, work.attention * ("core_attn" in recompute), norm)
    if letter == "E":
        inner = 2 * sizes.matrices * sizes.mixture.real * sizes.mixture.ffn * ("moe_act" in recompute)
        shared = 2.0 * sizes.matrices * sizes.hidden * sizes.mixture.shared * ("shared_experts" in recompute)
        return Work(shared, 0.0, 0.0, norm + inner)
    return Work(0.0, 0.0, 0.0, norm)


def training_operations(sizes: ModelSizes, document: float) -> float:
    """Of one text token and a training step: what the model needs, recomputation not counted."""
    letters = sizes.decoder + "".join(sizes.prediction)
    forward = sum((layer_work(sizes, letter, document) for letter in letters), head_work(sizes))
    return 3 * forward.operations
