"""Sizes of a model, as far as its memory, traffic and time depend on them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.encoder import POSITION_FEATURES
from megatron_anyexperts.moe.slots import virtual_cap
from megatron_anyexperts.training.usage import UsageError

LETTERS = "*-E"
"""Layers that can be planned: attention, dense MLP, mixture of experts."""


@dataclass(frozen=True)
class LatentSizes:
    """Multi-latent attention: ranks of queries (None: not compressed), keys and values; widths of a head."""

    query_rank: int | None
    kv_rank: int
    plain: int
    rotary: int
    value: int


@dataclass(frozen=True)
class EncoderSizes:
    """An encoder of two-matrix blocks, and its projector.

    Attributes:
        layers, hidden, ffn, heads: of its blocks.
        front: parameters before the blocks, each of them one product a position.
        merged: positions that become one token.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    front: int
    merged: int


@dataclass(frozen=True)
class MixtureSizes:
    """A mixture layer.

    Attributes:
        experts, ffn: real experts and their inner width.
        real, most: mean real slots of a token, and the most that one can have.
        shared: inner width of the shared expert, 0 without.
        latent: width that experts read, None for the model's.
        virtual: columns of the router beyond the experts.
        importance: width of the importance module, 0 without.
        learns_alpha: whether the strength of fusion is trained.
        vectors: further vectors of the model's width: a constant virtual expert, a gate of the shared expert.
        limit: the most slots of all that the fullest expert rank gets, relative to the mean; None without a cap.
        copies: experts of others that a rank may hold; of all layers at once where it `keeps` them.
        reach: share of the experts that routing limited to groups leaves to a token.
    """

    experts: int
    ffn: int
    real: float
    most: int
    shared: int = 0
    latent: int | None = None
    virtual: int = 0
    importance: int = 0
    learns_alpha: bool = False
    vectors: int = 0
    limit: float | None = None
    copies: int = 0
    keeps: bool = False
    reach: float = 1.0


@dataclass(frozen=True)
class ModelSizes:
    """The decoder, and the encoders before it. `pattern` is Megatron's, `|` between pipeline chunks, MTP behind `/`."""

    pattern: str
    vocabulary: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    channels: int
    mixture: MixtureSizes | None = None
    latent: LatentSizes | None = None
    gated: bool = True
    tied: bool = False
    head_norm: int = 0
    """Parameters of the norms of queries and keys in a layer."""
    norm: int = 1
    """Vectors of a norm: LayerNorm has two."""
    vision: EncoderSizes | None = None
    audio: EncoderSizes | None = None

    def __post_init__(self) -> None:
        unknown = set(self.pattern) - set(LETTERS + "|/")
        if unknown:
            raise UsageError(f"layers {', '.join(sorted(unknown))} of {self.pattern!r} cannot be planned, only * - E")

    @property
    def decoder(self) -> str:
        """Letters of the decoder's layers."""
        return self.pattern.partition("/")[0].replace("|", "")

    @property
    def prediction(self) -> list[str]:
        """Letters of each depth of multi-token prediction."""
        return self.pattern.split("/")[1:]

    @property
    def matrices(self) -> int:
        """Matrices of an MLP."""
        return 3 if self.gated else 2

    @property
    def query_width(self) -> int:
        """Queries of a token, all heads."""
        return self.heads * (self.latent.plain + self.latent.rotary if self.latent else self.channels)

    @property
    def value_width(self) -> int:
        """What attention returns for a token."""
        return self.heads * (self.latent.value if self.latent else self.channels)

    @property
    def kv_width(self) -> int:
        """Keys and values of a token as attention reads them."""
        return self.query_width + self.value_width if self.latent else 2 * self.groups * self.channels


def sizes_from(args: Namespace, vocabulary: int) -> ModelSizes:
    """Sizes of the model that parsed flags describe.

    Args:
        args: Megatron's, not necessarily validated.
        vocabulary: rows of the embedding.

    Raises:
        UsageError: a part of the model that the formulas do not know.
    """
    if args.hybrid_layer_pattern is None:
        raise UsageError("no --hybrid-layer-pattern: a plan needs the layers of the model")
    if args.add_bias_linear or args.add_qkv_bias:
        raise UsageError("biases of linear layers are not planned; set disable-bias-linear and leave add-qkv-bias out")
    channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    latent = None
    head_norm = (args.num_attention_heads + groups if args.qk_norm_all_heads else 2) * channels
    if args.multi_latent_attention:
        widths = (args.kv_lora_rank, args.qk_head_dim, args.qk_pos_emb_head_dim, args.v_head_dim)
        latent = LatentSizes(args.q_lora_rank, *widths)
        head_norm = (args.q_lora_rank or 0) + args.kv_lora_rank
    return ModelSizes(
        pattern=args.hybrid_layer_pattern,
        vocabulary=vocabulary,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size or 4 * args.hidden_size,
        heads=args.num_attention_heads,
        groups=groups,
        channels=channels,
        mixture=_mixture(args) if "E" in args.hybrid_layer_pattern else None,
        latent=latent,
        gated=args.swiglu,
        tied=not args.untie_embeddings_and_output_weights,
        head_norm=head_norm if args.qk_layernorm else 0,
        norm=1 if args.normalization == "RMSNorm" else 2,
        vision=_vision(args) if args.vision_num_layers else None,
        audio=_audio(args) if args.audio_num_layers else None,
    )


def _mixture(args: Namespace) -> MixtureSizes:
    topk, stock = args.moe_router_topk, args.anyexperts_stock_moe
    least = topk if stock or args.anyexperts_k_min is None else args.anyexperts_k_min
    most = topk if stock or args.anyexperts_k_max is None else args.anyexperts_k_max
    rho = 0.0 if stock else args.anyexperts_rho_max
    virtual = args.anyexperts_virtual_experts
    if virtual is None or stock:
        virtual = virtual_cap(most, rho)
    fuses = args.anyexperts_alpha != 0 or args.anyexperts_learn_alpha
    important = not stock and (fuses or least < most)
    constant = virtual > 0 and args.anyexperts_virtual_kind == "constant"
    slots = args.anyexperts_target_slots or topk
    eps = None if stock else args.anyexperts_dispatch_eps
    copies = not stock and args.anyexperts_balance != "reroute"
    return MixtureSizes(
        experts=args.num_experts,
        ffn=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        real=args.anyexperts_target_real or slots,
        most=most,
        shared=args.moe_shared_expert_intermediate_size or 0,
        latent=args.moe_latent_size,
        virtual=virtual,
        importance=args.anyexperts_importance_hidden if important else 0,
        learns_alpha=important and args.anyexperts_learn_alpha,
        vectors=constant + bool(args.moe_shared_expert_gate),
        limit=None if eps is None else 1 + eps,
        copies=args.anyexperts_copies_per_rank if copies else 0,
        keeps=args.anyexperts_copies_refresh > 0,
        reach=args.moe_router_group_topk / args.moe_router_num_groups if args.moe_router_group_topk else 1.0,
    )


def _vision(args: Namespace) -> EncoderSizes:
    shape, hidden = MediaShape.from_args(args), args.vision_hidden_size
    front = hidden * (shape.patch_values + 3 * POSITION_FEATURES)
    sizes = (args.vision_num_layers, hidden, args.vision_ffn_hidden_size, args.vision_num_heads)
    return EncoderSizes(*sizes, front=front, merged=shape.spatial_merge**2)


def _audio(args: Namespace) -> EncoderSizes:
    shape, hidden = MediaShape.from_args(args), args.audio_hidden_size
    front = hidden * (3 * shape.n_mels + 3 * hidden + POSITION_FEATURES)
    sizes = (args.audio_num_layers, hidden, args.audio_ffn_hidden_size, args.audio_num_heads)
    return EncoderSizes(*sizes, front=front, merged=shape.audio_merge)
