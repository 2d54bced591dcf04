"""A model trained by megatron-anyexperts, in transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_anyexperts import Attention, LatentAttention, RMSNorm, Rotary
from .configuration_anyexperts import ATTENTION, AnyExpertsConfig
from .encoders_anyexperts import AudioEncoder, VisionEncoder
from .routing_anyexperts import GatedMLP, MixtureOfExperts


@dataclass
class AnyExpertsOutput(CausalLMOutputWithPast):
    """Logits, cache and what the mixture layers decided.

    Attributes:
        slots: int64 [mixture layers, B, S], expert slots of each token, virtual ones included.
        importance: fp32 [mixture layers, B, S].
    """

    slots: Tensor | None = None
    importance: Tensor | None = None


class Layer(nn.Module):
    """One letter of the pattern: x + f(norm(x))."""

    def __init__(self, config: AnyExpertsConfig, place: int):
        super().__init__()
        self.kind = config.layer_pattern[place]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.kind in ATTENTION:
            before = sum(map(config.layer_pattern[:place].count, ATTENTION))
            self.self_attn = (Attention if self.kind == "*" else LatentAttention)(config, before)
        elif self.kind == "-":
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MixtureOfExperts(config)


class AnyExpertsPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config_class = AnyExpertsConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # A slot more or less hangs on small differences of importance.
    _keep_in_fp32_modules_strict = ["importance", "expert_bias", "slot_offset", "virtual_bias"]


class AnyExpertsModel(AnyExpertsPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: AnyExpertsConfig):
        super().__init__(config)
        eps, width = config.rms_norm_eps, config.hidden_size
        self.vision = VisionEncoder(config.vision_encoder, eps, width) if config.vision_encoder else None
        self.audio = AudioEncoder(config.audio_encoder, eps, width) if config.audio_encoder else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, place) for place in range(len(config.layer_pattern)))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_patches: Tensor | None = None,
        image_grids: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        **kwargs,
    ) -> AnyExpertsOutput:
        """Hidden states in the place of logits, and the decisions of the mixture layers.

        Args:
            image_patches, image_grids: see `VisionEncoder.forward`; of pictures and videos, in the order of their
                placeholders. Behind a cache they have been read.
            audio_features, audio_lengths: see `AudioEncoder.forward`.
            others: as in other models of transformers.

        Raises:
            ValueError: placeholders and features differ in number, or there is no encoder for the input.
        """
        hidden_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if input_ids is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            ids = self.config
            for name, codes, values, sizes in (
                ("vision", (ids.image_token_id, ids.video_token_id), image_patches, image_grids),
                ("audio", (ids.audio_token_id,), audio_features, audio_lengths),
            ):
                hidden_BSH = self._fill(hidden_BSH, input_ids, name, codes, values, sizes)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(hidden_BSH.shape[1], device=hidden_BSH.device).unsqueeze(0) + seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BSH,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotation = self.rotary(position_ids, hidden_BSH.dtype)
        importance, slots = [], []
        for layer in self.layers:
            normed_BSH = layer.norm(hidden_BSH)
            if layer.kind in ATTENTION:
                update_BSH = layer.self_attn(normed_BSH, rotation, mask, past_key_values, **kwargs)
            elif layer.kind == "-":
                update_BSH = layer.mlp(normed_BSH)
            else:
                update_BSH, importance_BS, slots_BS = layer.mlp(normed_BSH)
                importance.append(importance_BS)
                slots.append(slots_BS)
            hidden_BSH = hidden_BSH + update_BSH
        return AnyExpertsOutput(
            logits=self.norm(hidden_BSH),
            past_key_values=past_key_values,
            slots=torch.stack(slots) if slots else None,
            importance=torch.stack(importance) if importance else None,
        )

    def _fill(
        self, embedded_BSH: Tensor, input_ids: Tensor, name: str, codes: tuple, values: Tensor | None, sizes
    ) -> Tensor:
        """Replace the embeddings of placeholders by the features of an encoder."""
        places_BS = torch.isin(input_ids, torch.tensor([code for code in codes if code is not None]).to(input_ids))
        encoder, placeholders = getattr(self, name), int(places_BS.sum())
        if values is None or not len(values):
            features = embedded_BSH[:0, 0]
        elif encoder is None:
            raise ValueError(f"the inputs hold {name}, but the model has no {name} encoder")
        else:
            features = encoder(values, torch.as_tensor(sizes).tolist())
        if placeholders != len(features):
            raise ValueError(
                f"{name}: the tokens hold {placeholders} placeholders, the encoder has features for {len(features)}; "
                "the processor of the model widens placeholders"
            )
        return embedded_BSH.masked_scatter(places_BS.unsqueeze(-1), features.to(embedded_BSH.dtype))


class AnyExpertsForCausalLM(AnyExpertsPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AnyExpertsConfig):
        super().__init__(config)
        self.model = AnyExpertsModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        image_patches: Tensor | None = None,
        image_grids: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        **inputs,
    ) -> AnyExpertsOutput:
        """Logits [B, S, V], or of the last `logits_to_keep` positions; with `labels`, the loss of the next token."""
        inputs |= {"image_patches": image_patches, "image_grids": image_grids}
        output = self.model(input_ids, audio_features=audio_features, audio_lengths=audio_lengths, **inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output.logits = self.lm_head(output.logits[:, kept])
        if labels is not None:
            output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=self.config.vocab_size)
        return output if return_dict is not False else output.to_tuple()
