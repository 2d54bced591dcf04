"""Router scores of real and virtual columns: which are best, and what gate each slot gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Scoring(Protocol):
    """What scores depend on, as `AnyExpertsConfig` has it and the configuration of an exported model."""

    num_moe_experts: int
    moe_router_topk: int
    moe_router_score_function: str
    moe_router_pre_softmax: bool
    moe_router_topk_scaling_factor: float | None
    moe_router_num_groups: int | None
    moe_router_group_topk: int | None
    anyexperts_k_max: int


@dataclass(frozen=True)
class Candidates:
    """The best columns of each token, best first.

    Attributes:
        columns: int64 [T, N], of E + V.
        selection: [T, N], what they were ranked by; no gradient.
    """

    columns: Tensor
    selection: Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of E real, then V virtual columns, with Megatron-Core's semantics for the real ones.

    "Post-softmax" (Megatron's default) selects by logits and normalises the chosen ones; "pre-softmax" takes the
    softmax over all columns; "sigmoid" and "sqrtsoftplus" score each column alone and normalise the chosen ones.

    Attributes:
        logits_TC: [T, E + V].
        scores_TC: [T, E + V]; the logits for post-softmax.
    """

    config: Scoring
    logits_TC: Tensor
    scores_TC: Tensor

    @classmethod
    def of(cls, logits_TC: Tensor, config: Scoring) -> Scores:
        """Score logits [T, E + V]."""
        if config.moe_router_score_function != "softmax":
            return cls(config, logits_TC, _pointwise(logits_TC, config))
        if config.moe_router_pre_softmax:
            return cls(config, logits_TC, torch.softmax(logits_TC, dim=-1, dtype=torch.float32))
        return cls(config, logits_TC, logits_TC)

    @property
    def log_weights(self) -> bool:
        """Whether slot weights add to logits (post-softmax) instead of scaling scores."""
        return self._softmax and not self.config.moe_router_pre_softmax

    @property
    def _softmax(self) -> bool:
        return self.config.moe_router_score_function == "softmax"

    @torch.no_grad()
    def best_real(self, count: int, expert_bias: Tensor | None) -> Candidates:
        """Return the best `count` real columns: by biased score, and only in the best groups if groups are on."""
        selection, columns = torch.topk(self._eligible(expert_bias), k=count, dim=1)
        return Candidates(columns, selection)

    @torch.no_grad()
    def best_virtual(self, count: int, bias: Tensor) -> Candidates | None:
        """Return the best `count` virtual columns; their bias is in logits, whatever the score function."""
        if count == 0:
            return None
        experts = self.config.num_moe_experts
        if self.log_weights:
            selection_TV = self.logits_TC[:, experts:] + bias
        elif self._softmax:
            selection_TV = self.scores_TC[:, experts:] * bias.exp()
        else:
            selection_TV = _pointwise(self.logits_TC[:, experts:] + bias, self.config)
        selection, indices = torch.topk(selection_TV, k=count, dim=1)
        return Candidates(indices + experts, selection)

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
        return gates_TC.type_as(self.logits_TC)

    def normalised(self) -> Tensor:
        """Return scores of the real columns that sum to 1 per token, fp32 [T, E]: what balance losses push on."""
        if self._softmax:
            return torch.softmax(self._real(self.logits_TC), dim=-1, dtype=torch.float32)
        scores_TE = self._real(self.scores_TC)
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)

    def fallback(
        self,
        gates_TE: Tensor,
        map_TE: Tensor,
        expert_bias: Tensor | None,
        values_TC: Tensor | None = None,
        weight_TC: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gates of eligible real columns that have no slot, under the normaliser of those that have one.

        A column is eligible when its group is, also where its gate is 0 (a score of 0, a logit of -inf); the second
        tensor, bool [T, E], says which are.

        Args:
            gates_TE: gates in use.
            map_TE: bool, real slots.
            expert_bias: [E] or None; decides which groups are eligible.
            values_TC: values of the candidates in use; None: those of the real slots in `map_TE`.
            weight_TC: weights that belong to `values_TC`.
        """
        scores_TE = self._real(self.scores_TC)
        if values_TC is None:
            values_TC = scores_TE
            weight_TC = map_TE.float().log() if self.log_weights else map_TE.float()
        if self.log_weights:
            log_total_T1 = (values_TC.float() + (0.0 if weight_TC is None else weight_TC)).logsumexp(1, keepdim=True)
            gates = (scores_TE.float() - log_total_T1).exp().clamp(max=1)
        elif self._softmax or self.config.anyexperts_k_max == 1:
            gates = scores_TE
        else:
            used_TC = values_TC if weight_TC is None else values_TC * weight_TC
            gates = scores_TE / (used_TC.sum(dim=1, keepdim=True) + 1e-20)
        if self.config.moe_router_topk_scaling_factor:
            gates = gates * self.config.moe_router_topk_scaling_factor
        outside_TG = self._outside_groups(expert_bias)
        eligible_TE = torch.ones_like(map_TE)
        if outside_TG is not None:
            eligible_TE = ~outside_TG.repeat_interleave(map_TE.shape[1] // outside_TG.shape[1], dim=1)
        return gates.type_as(gates_TE).masked_fill(map_TE | ~eligible_TE, 0), eligible_TE

    def _real(self, values_TC: Tensor) -> Tensor:
        return values_TC[:, : self.config.num_moe_experts]

    def _eligible(self, expert_bias: Tensor | None) -> Tensor:
        """Return what real columns are ranked by: biased scores, -inf outside the best groups (DeepSeek-V3)."""
        scores_TE, outside_TG = self._biased(expert_bias), self._outside_groups(expert_bias)
        if outside_TG is None:
            return scores_TE
        by_group_TGM = scores_TE.unflatten(1, (self.config.moe_router_num_groups, -1))
        return by_group_TGM.masked_fill(outside_TG.unsqueeze(2), float("-inf")).flatten(1)

    def _biased(self, expert_bias: Tensor | None) -> Tensor:
        scores_TE = self._real(self.scores_TC)
        return scores_TE if expert_bias is None or self._softmax else scores_TE + expert_bias.float()

    def _outside_groups(self, expert_bias: Tensor | None) -> Tensor | None:
        """Return which groups of a token are not among its best, bool [T, G]; None without groups."""
        config = self.config
        if not config.moe_router_group_topk:
            return None
        by_group_TGM = self._biased(expert_bias).unflatten(1, (config.moe_router_num_groups, -1))
        # The group score keeps the recipe's top-k, so that the slot range does not change which groups win.
        per_group = config.moe_router_topk // config.moe_router_group_topk
        group_score_TG = by_group_TGM.detach().topk(per_group, dim=-1).values.sum(-1)
        best = group_score_TG.topk(config.moe_router_group_topk, dim=-1, sorted=False).indices
        return torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(1, best, False)


def _pointwise(logits: Tensor, config: Scoring) -> Tensor:
    if config.moe_router_score_function == "sigmoid":
        return torch.sigmoid(logits.float())
    return torch.nn.functional.softplus(logits.float()).sqrt()
