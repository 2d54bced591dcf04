"""Turns the documents of packed rows into what attention needs to keep them apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_anyexperts.host_sizes import HostSizes
from megatron_anyexperts.models.to_device import to_device
from megatron_anyexperts.row_cut import held_places


@dataclass(frozen=True)
class AttentionInputs:
    """Exactly one of the two is set, after the implementation of attention; `local` has both for rows that are cut."""

    attention_mask: Tensor | None = None
    """bool [B, 1, queries, keys], true where attention is forbidden (`local`)."""
    packed_seq_params: PackedSeqParams | None = None
    """Document borders for variable-length kernels (`transformer_engine`)."""


def attention_inputs(
    segment_ids_BS: Tensor, transformer_engine: bool, documents: Sequence[Sequence[int]] | None = None
) -> AttentionInputs:
    """Causal attention inside each document, none across documents.

    Rotary embeddings need no positions that restart: they make a score depend on the distance of two tokens only,
    and both always lie in one document.

    Args:
        segment_ids_BS: int [B, S]; equal numbers in a row are one document, 0 is padding. Documents are contiguous.
        transformer_engine: describe them as packed sequences instead of a mask.
        documents: `HostSizes.documents`; None: counted here, for which a GPU is waited for.

    Raises:
        ValueError: packed sequences with B > 1.
    """
    if transformer_engine:
        return AttentionInputs(packed_seq_params=packed_documents(segment_ids_BS, documents))
    return AttentionInputs(attention_mask=document_mask(segment_ids_BS))


def cut_documents(
    lengths: Sequence[int], transformer_engine: bool, group: torch.distributed.ProcessGroup, device: torch.device
) -> AttentionInputs:
    """The same for one rank's part of a row that is cut over context-parallel ranks.

    What a document was padded with is part of it here: it comes last, so that no token attends to it.

    Args:
        lengths: of the documents of the whole row, which 2 x ranks divides; see `row_cut`.
        group: context-parallel group.
    """
    packed = packed_lengths(lengths, device)
    if transformer_engine:
        return AttentionInputs(packed_seq_params=packed)
    places = held_places(lengths, group.size())
    document_S = np.repeat(np.arange(len(lengths)), lengths)
    queries_Q1, keys_K = places[group.rank()][:, None], places.flatten()  # keys are gathered rank by rank
    forbidden_QK = (document_S[queries_Q1] != document_S[keys_K]) | (keys_K > queries_Q1)
    return AttentionInputs(to_device(torch.from_numpy(forbidden_QK)[None, None], device), packed)


def document_mask(segment_ids_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S], true where query and key differ in document or the key comes later.

    Padding counts as a document of its own: a row of the mask without any allowed key would have no softmax.
    """
    size = segment_ids_BS.size(1)
    other = segment_ids_BS[:, None, :, None] != segment_ids_BS[:, None, None, :]
    later = torch.ones(size, size, dtype=torch.bool, device=segment_ids_BS.device).triu(1)
    return other | later


def packed_documents(segment_ids_BS: Tensor, documents: Sequence[Sequence[int]] | None = None) -> PackedSeqParams:
    """Cumulative lengths of the documents of one packed row; see `attention_inputs`.

    Raises:
        ValueError: B > 1.
    """
    if segment_ids_BS.size(0) != 1:
        raise ValueError(
            f"micro_batch_size={segment_ids_BS.size(0)}: Transformer Engine attends to packed sequences in one row; "
            "use --micro-batch-size 1 and a longer --seq-length"
        )
    if documents is None:
        documents = HostSizes.of(segment_ids_BS.cpu().numpy()).documents
    return packed_lengths(documents[0], segment_ids_BS.device)


def packed_lengths(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """Sequences of the given lengths, one behind the other."""
    borders = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
