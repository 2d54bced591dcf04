"""Core attention on torch's scaled_dot_product_attention, for the spec that runs without Transformer Engine."""

import math
from contextlib import nullcontext

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SDPACoreAttention(torch.nn.Module):
    """Drop-in for Megatron's `DotProductAttention` that never stores the score matrix.

    Grouped queries, a boolean mask (true means masked), causal masks with or without cached keys, dropout and a
    custom softmax scale are supported; values may have another width than keys. It owns no parameters.

    Under context parallelism each rank attends from its own tokens to those of all ranks, whose keys and values are
    gathered; the gradients of a rank's keys and values are the sum of what all ranks found.

    Raises:
        ValueError: a setting that only Transformer Engine's attention implements.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        super().__init__()
        unsupported = {
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
        }
        for name, refused in unsupported.items():
            if refused:
                raise ValueError(
                    f"{name}={getattr(config, name)} needs Transformer Engine's attention: "
                    "use --transformer-impl transformer_engine on a GPU, or leave the setting out"
                )
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        if config.apply_query_key_layer_scaling:
            self.softmax_scale /= max(1, layer_number)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [Sq, B, heads, D]; without B where rows are packed for context parallelism.
            key, value: [Sk, B, groups, D]; `groups` divides `heads`.
            attention_mask: bool, broadcastable to [B, heads, Sq, Sk], true where attention is forbidden. It replaces
                the causal mask, so it has to contain it. A row without any allowed key has no defined result.
            attn_mask_type: not used; Megatron passes `no_mask` for queries behind a cache, on the assumption that there
                is only one, whereas the type given at construction is right for any number.
            packed_seq_params: not read; the mask of `attention_inputs.cut_documents` says as much. Only with context
                parallelism.

        Returns:
            [Sq, B, heads * D].
        """
        if attention_bias is not None or (packed_seq_params is None) != (self.cp_group is None):
            raise ValueError(
                "attention biases, and packed sequences without context parallelism, need the attention of "
                "Transformer Engine"
            )
        if self.cp_group is not None:
            query = query.unsqueeze(1)
            key, value = (
                tensor_parallel.gather_from_sequence_parallel_region(x.unsqueeze(1).contiguous(), group=self.cp_group)
                for x in (key, value)
            )
        queries, keys = query.size(0), key.size(0)
        is_causal = attention_mask is None and self.attn_mask_type == AttnMaskType.causal and queries > 1
        allowed = None if attention_mask is None else ~attention_mask
        if is_causal and queries != keys:
            # The queries are the last ones of a sequence whose earlier keys are cached.
            allowed = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
            is_causal = False
        dropout = self.dropout if self.training else 0.0
        heads_first = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        # Heads are split over tensor-parallel ranks, so dropout must differ between them.
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else nullcontext():
            context_BHSD = torch.nn.functional.scaled_dot_product_attention(
                *heads_first,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return context_BHSD.permute(2, 0, 1, 3).flatten(2)
