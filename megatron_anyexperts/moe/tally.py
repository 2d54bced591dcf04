"""Sums of routing figures over microbatches, on this rank's device, until they are reduced and summarised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_anyexperts.moe.fused_tally import add_figures
from megatron_anyexperts.moe.kernels import has_kernels
from megatron_anyexperts.moe.summary import SUMS, summarise

if TYPE_CHECKING:
    from megatron_anyexperts.moe.decision import RoutingDecision
    from megatron_anyexperts.moe.dispatcher import LoadReport


class Tally:
    """Sums over microbatches for all layers of the model; layers of other pipeline stages stay 0.

    Shapes: L layers, M modalities, F sums per modality (`SUMS`, then two histograms over 0..k_max), E experts.
    """

    def __init__(
        self,
        modalities: tuple[str, ...],
        num_layers: int,
        k_max: int,
        num_experts: int,
        device: torch.device | int | str,
        kernels: str = "auto",
    ):
        self.modalities, self.k_max, self.kernels = modalities, k_max, kernels
        fields = len(SUMS) + 2 * (k_max + 1)
        self.nonfinite_L = torch.zeros(num_layers, dtype=torch.float64, device=device)
        self.sums_LMF = torch.zeros(num_layers, len(modalities), fields, dtype=torch.float64, device=device)
        self.experts_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=device)
        # observations, received max/mean, demanded max/mean, rerouted, displaced, copied
        self.load_L6 = torch.zeros(num_layers, 6, dtype=torch.float64, device=device)
        self.peak_L = torch.zeros(num_layers, dtype=torch.float64, device=device)

    def add(self, layer_number: int, kinds_T: Tensor, decision: RoutingDecision, load: LoadReport) -> None:
        """Add one microbatch of one layer; tokens that are not finite are counted as such and enter nothing else."""
        layer = layer_number - 1
        if has_kernels(self.kernels, decision.slots_T):
            return self._add_fused(layer, kinds_T, decision, load)
        if decision.nonfinite_T is not None:
            self.nonfinite_L[layer] += (decision.nonfinite_T & (kinds_T >= 0)).sum()
            kinds_T = kinds_T.masked_fill(decision.nonfinite_T, -1)
        slots_T, importance_T = decision.slots_T, decision.importance_T
        real_T = decision.routing_map_TE.sum(1)
        bins = torch.arange(self.k_max + 1, device=slots_T.device)
        features_TF = torch.cat(
            (
                torch.stack(
                    (torch.ones_like(importance_T), slots_T, real_T, importance_T, importance_T.square()), dim=1
                ),
                slots_T.unsqueeze(1) == bins,
                real_T.unsqueeze(1) == bins,
            ),
            dim=1,
        )
        kinds_MT = kinds_T == torch.arange(len(self.modalities), device=kinds_T.device).unsqueeze(1)
        self.sums_LMF[layer] += kinds_MT.to(features_TF) @ features_TF
        received, demanded = _imbalance(load.received_P), _imbalance(load.demanded_P)
        one = torch.ones_like(received)
        moved = (count.double() for count in (load.rerouted, load.displaced, load.copied))
        self.load_L6[layer] += torch.stack((one, received, demanded, *moved))
        self.peak_L[layer] = torch.maximum(self.peak_L[layer], received)
        self.experts_LE[layer] += load.received_E

    def _add_fused(self, layer: int, kinds_T: Tensor, decision: RoutingDecision, load: LoadReport) -> None:
        """`add` as one launch."""
        add_figures(
            kinds_T,
            decision.slots_T,
            decision.importance_T,
            decision.routing_map_TE,
            decision.nonfinite_T,
            load.received_P,
            load.demanded_P,
            load.received_E,
            load.rerouted,
            load.displaced,
            load.copied,
            self.sums_LMF[layer],
            self.experts_LE[layer],
            self.load_L6[layer],
            self.peak_L[layer],
            self.nonfinite_L[layer],
        )

    def drain(self, sum_groups: list[torch.distributed.ProcessGroup]) -> dict[str, Any]:
        """Reduce over `sum_groups` one after the other, clear, and return the summary; collective."""
        parts = (self.sums_LMF, self.experts_LE, self.load_L6, self.nonfinite_L)
        flat = torch.cat([part.flatten() for part in parts])
        peak_L = self.peak_L.clone()
        for group in sum_groups:
            torch.distributed.all_reduce(flat, group=group)
            torch.distributed.all_reduce(peak_L, op=torch.distributed.ReduceOp.MAX, group=group)
        split = flat.cpu().split([part.numel() for part in parts])
        sums_LMF, experts_LE, load_L6, nonfinite_L = (x.view(part.shape) for x, part in zip(split, parts, strict=True))
        for part in (*parts, self.peak_L):
            part.zero_()
        return summarise(self.modalities, sums_LMF, experts_LE, load_L6, peak_L.cpu(), nonfinite_L, self.k_max)


def _imbalance(load_P: Tensor) -> Tensor:
    """Return max over mean, fp64 scalar; 1 for no load."""
    load_P = load_P.double()
    return torch.where(load_P.sum() > 0, load_P.max() / load_P.mean().clamp(min=1e-9), 1.0)
