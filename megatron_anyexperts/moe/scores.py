"""Router scores of real and virtual columns: which are best, and what gate each slot gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_anyexperts.config import AnyExpertsConfig


@dataclass(frozen=True)
class Candidates:
    """The best columns of each token, best first.

    Attributes:
        values: [T, N] unbiased; post-softmax: logits, otherwise scores. Differentiable.
        indices: int64 [T, N], column numbers.
        selection: [T, N], what they were ranked by.
    """

    values: Tensor
    indices: Tensor
    selection: Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of E real and V virtual columns, with Megatron-Core's semantics for the real ones.

    "Post-softmax" (Megatron's default) selects by logits and normalises the chosen ones; "pre-softmax" takes the
    softmax over all columns; "sigmoid" and "sqrtsoftplus" score each column alone and normalise the chosen ones.
    """

    config: AnyExpertsConfig
    logits_TE: Tensor
    logits_TV: Tensor
    scores_TE: Tensor
    scores_TV: Tensor

    @classmethod
    def of(cls, logits_TC: Tensor, config: AnyExpertsConfig) -> Scores:
        """Score logits [T, E + V]."""
        experts = config.num_moe_experts
        if config.moe_router_score_function == "softmax":
            scores_TC = logits_TC
            if config.moe_router_pre_softmax:
                scores_TC = torch.softmax(logits_TC, dim=-1, dtype=torch.float32)
        else:
            scores_TC = _pointwise(logits_TC, config)
        return cls(
            config, logits_TC[:, :experts], logits_TC[:, experts:], scores_TC[:, :experts], scores_TC[:, experts:]
        )

    @property
    def log_weights(self) -> bool:
        """Whether slot weights add to logits (post-softmax) instead of scaling scores."""
        return self.config.moe_router_score_function == "softmax" and not self.config.moe_router_pre_softmax

    @property
    def _softmax(self) -> bool:
        return self.config.moe_router_score_function == "softmax"

    def best_real(self, count: int, expert_bias: Tensor | None) -> Candidates:
        """Return the best `count` real columns: by biased score, and only in the best groups if groups are on."""
        biased_TE = self._selection(expert_bias)
        selection, indices = torch.topk(self._group_limited(biased_TE), k=count, dim=1)
        values = selection if biased_TE is self.scores_TE else self.scores_TE.gather(1, indices)
        return Candidates(values, indices, selection)

    def best_virtual(self, count: int, bias: Tensor) -> Candidates | None:
        """Return the best `count` virtual columns; their bias is in logits, whatever the score function."""
        if count == 0:
            return None
        with torch.no_grad():
            if self.log_weights:
                selection_TV = self.scores_TV + bias
            elif self._softmax:
                selection_TV = self.scores_TV * bias.exp()
            else:
                selection_TV = _pointwise(self.logits_TV + bias, self.config)
            selection, indices = torch.topk(selection_TV, k=count, dim=1)
        return Candidates(self.scores_TV.gather(1, indices), indices, selection)

    def gates(self, values_TC: Tensor, weight_TC: Tensor | None) -> Tensor:
        """Return the gates of candidate columns in the router dtype, 0 where the weight is 0.

        The weight acts before normalisation: a last slot whose weight goes to 0 leaves the other gates as they are
        without it, so the output is continuous in the slot count.

        Args:
            values_TC: values of the candidates.
            weight_TC: their weights, logarithmic if `log_weights`; None: all 1.
        """
        if self.log_weights:
            if weight_TC is not None:
                values_TC = values_TC + weight_TC
            gates_TC = torch.softmax(values_TC, dim=-1, dtype=torch.float32)
        else:
            gates_TC = values_TC if weight_TC is None else values_TC * weight_TC
            if not self._softmax and self.config.anyexperts_k_max > 1:
                gates_TC = gates_TC / (gates_TC.sum(dim=-1, keepdim=True) + 1e-20)
        if self.config.moe_router_topk_scaling_factor:
            gates_TC = gates_TC * self.config.moe_router_topk_scaling_factor
        return gates_TC.type_as(self.logits_TE)

    def normalised(self) -> Tensor:
        """Return scores of the real columns that sum to 1 per token, fp32 [T, E]: what balance losses push on."""
        if self._softmax:
            return torch.softmax(self.logits_TE, dim=-1, dtype=torch.float32)
        return self.scores_TE / (self.scores_TE.sum(dim=-1, keepdim=True) + 1e-20)

    def fallback(
        self,
        gates_TE: Tensor,
        map_TE: Tensor,
        expert_bias: Tensor | None,
        values_TC: Tensor | None = None,
        weight_TC: Tensor | None = None,
    ) -> Tensor:
        """Return the gates of eligible real columns that have no slot, under the normaliser of those that have one.

        Args:
            gates_TE: gates in use.
            map_TE: bool, real slots.
            expert_bias: [E] or None; decides which groups are eligible.
            values_TC: values of the candidates in use; None: those of the real slots in `map_TE`.
            weight_TC: weights that belong to `values_TC`.
        """
        if values_TC is None:
            values_TC = self.scores_TE
            weight_TC = map_TE.float().log() if self.log_weights else map_TE.float()
        if self.log_weights:
            log_total_T1 = (values_TC.float() + (0.0 if weight_TC is None else weight_TC)).logsumexp(1, keepdim=True)
            gates = (self.scores_TE.float() - log_total_T1).exp().clamp(max=1)
        elif self._softmax or self.config.anyexperts_k_max == 1:
            gates = self.scores_TE
        else:
            used_TC = values_TC if weight_TC is None else values_TC * weight_TC
            gates = self.scores_TE / (used_TC.sum(dim=1, keepdim=True) + 1e-20)
        if self.config.moe_router_topk_scaling_factor:
            gates = gates * self.config.moe_router_topk_scaling_factor
        ineligible_TE = map_TE | self._group_limited(self._selection(expert_bias)).isneginf()
        return gates.type_as(gates_TE).masked_fill(ineligible_TE, 0)

    def _selection(self, expert_bias: Tensor | None) -> Tensor:
        if expert_bias is None or self._softmax:
            return self.scores_TE
        return self.scores_TE + expert_bias.float()

    def _group_limited(self, scores_TE: Tensor) -> Tensor:
        """Return the scores with columns outside the best groups at -inf (DeepSeek-V3's group-limited routing)."""
        config = self.config
        if not config.moe_router_group_topk:
            return scores_TE
        by_group_TGM = scores_TE.unflatten(1, (config.moe_router_num_groups, -1))
        # The group score keeps the recipe's top-k, so that the slot range does not change which groups win.
        per_group = config.moe_router_topk // config.moe_router_group_topk
        group_score_TG = by_group_TGM.detach().topk(per_group, dim=-1).values.sum(-1)
        best = group_score_TG.topk(config.moe_router_group_topk, dim=-1, sorted=False).indices
        outside_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(1, best, False)
        return by_group_TGM.masked_fill(outside_TG.unsqueeze(2), float("-inf")).flatten(1)


def _pointwise(logits: Tensor, config: AnyExpertsConfig) -> Tensor:
    if config.moe_router_score_function == "sigmoid":
        return torch.sigmoid(logits.float())
    return torch.nn.functional.softplus(logits.float()).sqrt()
