"""Turns the documents of packed rows into what attention needs to keep them apart."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Exactly one of the two is set, after the implementation of attention."""

    attention_mask: Tensor | None = None
    """bool [B, 1, S, S], true where attention is forbidden (`local`)."""
    packed_seq_params: PackedSeqParams | None = None
    """Document borders for variable-length kernels (`transformer_engine`)."""


def attention_inputs(segment_ids_BS: Tensor, transformer_engine: bool) -> AttentionInputs:
    """Causal attention inside each document, none across documents.

    Rotary embeddings need no positions that restart: they make a score depend on the distance of two tokens only,
    and both always lie in one document.

    Args:
        segment_ids_BS: int [B, S]; equal numbers in a row are one document, 0 is padding. Documents are contiguous.
        transformer_engine: describe them as packed sequences instead of a mask.

    Raises:
        ValueError: packed sequences with B > 1.
    """
    if transformer_engine:
        return AttentionInputs(packed_seq_params=packed_documents(segment_ids_BS))
    return AttentionInputs(attention_mask=document_mask(segment_ids_BS))


def document_mask(segment_ids_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S], true where query and key differ in document or the key comes later.

    Padding counts as a document of its own: a row of the mask without any allowed key would have no softmax.
    """
    size = segment_ids_BS.size(1)
    other = segment_ids_BS[:, None, :, None] != segment_ids_BS[:, None, None, :]
    later = torch.ones(size, size, dtype=torch.bool, device=segment_ids_BS.device).triu(1)
    return other | later


def packed_documents(segment_ids_BS: Tensor) -> PackedSeqParams:
    """Cumulative lengths of the documents of one packed row.

    Raises:
        ValueError: B > 1.
    """
    if segment_ids_BS.size(0) != 1:
        raise ValueError(
            f"micro_batch_size={segment_ids_BS.size(0)}: Transformer Engine attends to packed sequences in one row; "
            "use --micro-batch-size 1 and a longer --seq-length"
        )
    lengths = torch.unique_consecutive(segment_ids_BS[0], return_counts=True)[1]
    return packed_lengths(lengths)


def packed_lengths(lengths_N: Tensor) -> PackedSeqParams:
    """Sequences of the given lengths, one behind the other."""
    borders = torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths_N.max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
