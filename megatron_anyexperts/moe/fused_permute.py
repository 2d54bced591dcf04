"""The kernels of `permute_kernels` as operators with gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(
    hidden_TH: Tensor, gates_TE: Tensor, map_TE: Tensor, counts_E: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out slots by expert, then by token.

    Args:
        hidden_TH: [T, H].
        gates_TE: [T, E].
        map_TE: bool, which slots there are.
        counts_E: int64, how many per expert.
        slots: how many altogether, N.

    Returns:
        [N, H]; their gates [N]; and for `unpermute` int32 [T, E], where each slot lies, -1 for none.
    """
    return _Permute.apply(hidden_TH, gates_TE, map_TE, counts_E, slots)


def unpermute(
    slots_NH: Tensor, place_TE: Tensor, hidden_TH: Tensor | None, gate_T: Tensor | None, broken_T: Tensor | None
) -> Tensor:
    """Sum the slots of each token, and gate x hidden of its virtual ones.

    Args:
        slots_NH: in the order of `permute`.
        place_TE: what `permute` returned.
        hidden_TH, gate_T: None: no virtual slots.
        broken_T: bool, tokens whose output is NaN; None: none.
    """
    return _Unpermute.apply(slots_NH, place_TE, hidden_TH, gate_T, broken_T)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, gates_TE, map_TE, counts_E, slots):
        upto_TE, ends_E = map_TE.cumsum(0, dtype=torch.int32), counts_E.cumsum(0)
        slots_NH, probs_N, place_TE = torch.ops.anyexperts.permute(
            hidden_TH, gates_TE.contiguous(), map_TE.contiguous(), upto_TE, ends_E, counts_E.contiguous(), slots
        )
        ctx.save_for_backward(place_TE)
        ctx.mark_non_differentiable(place_TE)
        return slots_NH, probs_N, place_TE

    @staticmethod
    def backward(ctx, d_slots, d_probs, _):
        (place_TE,) = ctx.saved_tensors
        gradients = torch.ops.anyexperts.permute_backward(d_slots.contiguous(), d_probs.contiguous(), place_TE)
        return *gradients, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots_NH, place_TE, hidden_TH, gate_T, broken_T):
        ctx.save_for_backward(place_TE, hidden_TH, gate_T, broken_T)
        ctx.slots = len(slots_NH)
        return torch.ops.anyexperts.unpermute(slots_NH.contiguous(), place_TE, hidden_TH, gate_T, broken_T)

    @staticmethod
    def backward(ctx, d_output):
        d_slots, d_hidden, d_gate = torch.ops.anyexperts.unpermute_backward(
            d_output.contiguous(), *ctx.saved_tensors, ctx.slots
        )
        virtual = ctx.saved_tensors[1] is not None
        return d_slots, None, d_hidden if virtual else None, d_gate if virtual else None, None


def _sizes(experts: int, hidden: int) -> dict[str, int]:
    return {
        "E": experts,
        "E2": 1 << max(0, experts - 1).bit_length(),
        "BLOCK": min(2048, 1 << max(0, hidden - 1).bit_length()),
    }


def _permute(hidden_TH, gates_TE, map_TE, upto_TE, ends_E, counts_E, slots):
    from megatron_anyexperts.moe import permute_kernels as kernels

    tokens, hidden = hidden_TH.shape
    slots_NH, probs_N = hidden_TH.new_empty(slots, hidden), gates_TE.new_empty(slots)
    place_TE = torch.empty_like(upto_TE)
    if tokens:
        kernels.permute[(tokens,)](
            hidden_TH, gates_TE, map_TE, upto_TE, ends_E, counts_E, slots_NH, probs_N, place_TE, hidden,
            hidden_TH.stride(0), **_sizes(map_TE.shape[1], hidden),
        )  # fmt: skip
    return slots_NH, probs_N, place_TE


def _permute_backward(d_slots, d_probs, place_TE):
    from megatron_anyexperts.moe import permute_kernels as kernels

    tokens, hidden = len(place_TE), d_slots.shape[1]
    d_hidden, d_gates = d_slots.new_empty(tokens, hidden), d_probs.new_empty(place_TE.shape)
    if tokens:
        sizes = _sizes(place_TE.shape[1], hidden)
        kernels.permute_backward[(tokens,)](d_slots, d_probs, place_TE, d_hidden, d_gates, hidden, **sizes)
    return d_hidden, d_gates


def _unpermute(slots_NH, place_TE, hidden_TH, gate_T, broken_T):
    from megatron_anyexperts.moe import permute_kernels as kernels

    tokens, hidden = len(place_TE), slots_NH.shape[1]
    output_TH = slots_NH.new_empty(tokens, hidden)
    if tokens:
        given = [slots_NH if each is None else each for each in (hidden_TH, gate_T, broken_T)]
        kernels.unpermute[(tokens,)](
            slots_NH, place_TE, *given, output_TH, hidden, given[0].stride(0), **_sizes(place_TE.shape[1], hidden),
            VIRTUAL=hidden_TH is not None, BROKEN=broken_T is not None,
        )  # fmt: skip
    return output_TH


def _unpermute_backward(d_output, place_TE, hidden_TH, gate_T, broken_T, slots):
    from megatron_anyexperts.moe import permute_kernels as kernels

    tokens, hidden = d_output.shape
    d_slots = d_output.new_empty(slots, hidden)
    d_hidden = d_output.new_empty(0) if hidden_TH is None else torch.empty_like(hidden_TH)
    d_gate = d_output.new_empty(0) if gate_T is None else torch.empty_like(gate_T)
    if tokens:
        given = [d_output if each is None else each for each in (hidden_TH, gate_T, broken_T)]
        kernels.unpermute_backward[(tokens,)](
            d_output, place_TE, *given, d_slots, d_hidden, d_gate, hidden, given[0].stride(0),
            **_sizes(place_TE.shape[1], hidden), VIRTUAL=hidden_TH is not None, BROKEN=broken_T is not None,
        )  # fmt: skip
    return d_slots, d_hidden, d_gate


_library = torch.library.Library("anyexperts", "FRAGMENT")
for _schema, _function in (
    ("permute(Tensor hidden, Tensor gates, Tensor map, Tensor upto, Tensor ends, Tensor counts, int slots) "
     "-> (Tensor, Tensor, Tensor)", _permute),
    ("permute_backward(Tensor d_slots, Tensor d_probs, Tensor place) -> (Tensor, Tensor)", _permute_backward),
    ("unpermute(Tensor slots, Tensor place, Tensor? hidden, Tensor? gate, Tensor? broken) -> Tensor", _unpermute),
    ("unpermute_backward(Tensor d_output, Tensor place, Tensor? hidden, Tensor? gate, Tensor? broken, int slots) "
     "-> (Tensor, Tensor, Tensor)", _unpermute_backward),
):  # fmt: skip
    _library.define(_schema)
    _library.impl(_schema.split("(")[0], _function, "CompositeExplicitAutograd")
