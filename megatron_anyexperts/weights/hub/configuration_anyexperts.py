"""Configuration of a model trained by megatron-anyexperts."""

from typing import Any

from transformers import PretrainedConfig

from .slots import virtual_cap

ATTENTION = "*+"
"""Letters of the pattern that stand for attention."""


class AnyExpertsConfig(PretrainedConfig):
    """Sizes and settings; an export writes all of them.

    The slots of a token may be changed on an exported model: `anyexperts_k_min`, `anyexperts_k_max`,
    `anyexperts_rho_max`.

    Args:
        layer_pattern: one letter a layer: `*` attention, `+` multi-latent attention, `-` dense MLP, `E` mixture of
            experts.
        head_dim: width of a head, of its rotated part in multi-latent attention.
        latent: of multi-latent attention: `query_rank` (None for no latent of queries), `rank`, width of a head's part
            without positions (`plain`) and of its values (`value`), and `scaling` of the scores.
        qk_norm: norm of queries and keys: "none", over each "head", or over "all" heads together.
        rope_parameters: as transformers 5 has them.
        vision_encoder, audio_encoder: sizes, by the flags of megatron-anyexperts without prefix; None for no encoder.
        image_token_id, video_token_id, audio_token_id: placeholders that features replace.
        moe_*: as the flags of Megatron-Core.
        anyexperts_importance: there are importance modules; without one every token has importance 0.5.
        anyexperts_*: as the flags of megatron-anyexperts; docs/routing.md says what they mean.
    """

    model_type = "anyexperts"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        layer_pattern: str = "*-*E",
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 16,
        latent: dict[str, Any] | None = None,
        qk_norm: str = "none",
        attention_bias: bool = False,
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 2048,
        rope_parameters: dict[str, Any] | None = None,
        num_moe_experts: int = 8,
        moe_ffn_hidden_size: int = 64,
        moe_shared_expert_intermediate_size: int = 0,
        moe_router_topk: int = 2,
        moe_router_score_function: str = "softmax",
        moe_router_pre_softmax: bool = False,
        moe_router_topk_scaling_factor: float | None = None,
        moe_router_num_groups: int | None = None,
        moe_router_group_topk: int | None = None,
        moe_router_enable_expert_bias: bool = False,
        moe_router_dtype: str | None = "fp32",
        anyexperts_k_min: int = 2,
        anyexperts_k_max: int = 2,
        anyexperts_slot_gradient: str = "fractional",
        anyexperts_alpha: float = 0.0,
        anyexperts_learn_alpha: bool = False,
        anyexperts_importance: bool = False,
        anyexperts_importance_hidden: int = 32,
        anyexperts_rho_max: float = 0.0,
        anyexperts_virtual_experts: int = 0,
        anyexperts_virtual_kind: str = "identity",
        vision_encoder: dict[str, Any] | None = None,
        audio_encoder: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        audio_token_id: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **others: Any,
    ):
        own = {name: value for name, value in locals().items() if name not in ("self", "others", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        # What caches ask for: they hold keys and values of attention layers alone.
        others["num_hidden_layers"] = sum(map(layer_pattern.count, ATTENTION))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)

    @property
    def max_virtual_slots(self) -> int:
        """Most virtual slots that a token can have."""
        return virtual_cap(self.anyexperts_k_max, self.anyexperts_rho_max)

    @property
    def fuses(self) -> bool:
        """Whether importance is fused back into the hidden state."""
        return self.anyexperts_alpha != 0 or self.anyexperts_learn_alpha
