"""The kernel of `tally_kernel` as an operator of torch."""

import torch
from torch import Tensor

TOKENS = 16
"""Of one program."""


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _add(
    kinds_T: Tensor, slots_T: Tensor, importance_T: Tensor, map_TE: Tensor, broken_T: Tensor | None,
    received_P: Tensor, demanded_P: Tensor, received_E: Tensor, rerouted: Tensor, displaced: Tensor, copied: Tensor,
    sums_MF: Tensor, experts_E: Tensor, load_6: Tensor, peak: Tensor, nonfinite: Tensor,
) -> None:  # fmt: skip
    from megatron_anyexperts.moe import tally_kernel

    (tokens, experts), (modalities, fields), ranks = map_TE.shape, sums_MF.shape, len(received_P)
    bins = (fields - 5) // 2
    tally_kernel.add_figures[(max(1, -(-tokens // TOKENS)),)](
        kinds_T, slots_T, importance_T, map_TE, slots_T if broken_T is None else broken_T, received_P, demanded_P,
        received_E, rerouted, displaced, copied, sums_MF, experts_E, load_6, peak, nonfinite, tokens, kinds_T.stride(0),
        E=experts, E2=_power(experts), P=ranks, P2=_power(ranks), M=modalities, FIELDS=fields, BINS=bins,
        BINS2=_power(bins), BROKEN=broken_T is not None, TOKENS=TOKENS,
    )  # fmt: skip


_library = torch.library.Library("anyexperts", "FRAGMENT")
_library.define(
    "add_figures(Tensor kinds, Tensor slots, Tensor importance, Tensor map, Tensor? broken, Tensor received, "
    "Tensor demanded, Tensor received_by_expert, Tensor rerouted, Tensor displaced, Tensor copied, Tensor(a!) sums, "
    "Tensor(b!) experts, Tensor(c!) load, Tensor(d!) peak, Tensor(e!) nonfinite) -> ()"
)
_library.impl("add_figures", _add, "CompositeExplicitAutograd")

add_figures = torch.ops.anyexperts.add_figures
