"""Keeps what mixture layers decide for chosen tokens, expert by expert: the layers' part of a routing trace.

Megatron-Core 0.19's `router_trace` keeps the indices of a fixed top-k; here tokens have different numbers of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_anyexperts.moe.decision import RoutingDecision


@dataclass(frozen=True)
class LayerTrace:
    """One layer's decisions on N tokens, as the router made them: before a dispatch cap moves slots.

    Attributes:
        place_N2: int64 on the host; row, and position within the row.
        figures_NF: fp32 on the layer's device, one tensor so that one copy brings it to the host: K gates in descending
            order (-1: no slot), K experts, virtual gate, importance, slots.
    """

    place_N2: Tensor
    figures_NF: Tensor

    def split(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gates [N, K], experts [N, K], virtual gate [N], importance [N] and slots [N], on the host."""
        figures_NF = self.figures_NF.cpu()
        width = (figures_NF.shape[1] - 3) // 2
        gates_NK, experts_NK, others_N3 = figures_NF.split((width, width, 3), dim=1)
        return gates_NK, experts_NK.long(), *others_N3.unbind(1)


@dataclass
class ForwardTrace:
    """Decisions of one forward pass.

    Args:
        positions: int64 [P] on the host, ascending; the positions of each row to keep.
        seq_length: of a whole row, of which a rank holds a part under sequence parallelism.
        most_slots: real slots that a token can have.

    Attributes:
        layers: by layer number, 1-based; the local stage's.
    """

    positions: Tensor
    seq_length: int
    most_slots: int
    layers: dict[int, LayerTrace] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, layer_number: int, decision: RoutingDecision, shape: tuple[int, int], tp_rank: int) -> None:
        """Keep one layer's decision; for the arguments see `metrics.observe`."""
        length, rows = shape
        start = tp_rank * length
        if length == self.seq_length:  # all tensor-parallel ranks route the same tokens
            if tp_rank:
                return
            start = 0
        inside = self.positions[(self.positions >= start) & (self.positions < start + length)]
        place_N2 = torch.stack((torch.arange(rows).repeat(len(inside)), inside.repeat_interleave(rows)), dim=1)
        chosen_N = ((place_N2[:, 1] - start) * rows + place_N2[:, 0]).to(decision.slots_T.device, non_blocking=True)
        gates_NE = decision.gates_TE[chosen_N].float().masked_fill(~decision.routing_map_TE[chosen_N], -1.0)
        gates_NK, experts_NK = gates_NE.topk(min(self.most_slots, gates_NE.shape[1]), dim=1)
        virtual_T = decision.virtual_gate_T
        virtual_N = gates_NK.new_zeros(len(gates_NK)) if virtual_T is None else virtual_T[chosen_N].float()
        others = (virtual_N, decision.importance_T[chosen_N].float(), decision.slots_T[chosen_N].float())
        figures_NF = torch.cat((gates_NK, experts_NK.float(), torch.stack(others, dim=1)), dim=1)
        self.layers[layer_number] = LayerTrace(place_N2, figures_NF)
