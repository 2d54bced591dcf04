"""Attaches the router's losses to its outputs, weighted like the language-model loss, and records them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_anyexperts.moe.losses import (
    LEAST_WEIGHT,
    TokenWeights,
    balance_loss,
    budget_loss,
    shared_mean,
    spread_loss,
    z_loss,
)

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig


class RouterLosses(TopKRouter):
    """Megatron's router with losses whose gradient depends neither on the layout nor on how many tokens are targets.

    The gradient of a step is the sum over its microbatches of targets x loss, divided by the targets of the step
    (`calculate_per_token_loss`), or the mean over its microbatches. It differs from Megatron 0.19's in two cases:

    - Some tokens are no targets. Megatron multiplies a loss of a microbatch by its tokens and divides by the targets
      of the step: at one target in ten tokens it acts tenfold. Here it is multiplied by the microbatch's targets.
    - `global_aux_loss` on several data-parallel ranks. Its loads come from all of them but its scores from one, so the
      ranks' gradients must be added up. Megatron averages them, which divides the loss by the data-parallel size.

    Attributes:
        tokens: the tokens of the microbatch that is being routed. Kept here because Megatron's `routing` calls the
            methods below with arguments of its own.
    """

    config: AnyExpertsConfig
    tokens: TokenWeights

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss to logits [T, E + V], over the tokens that take part."""
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not (self.training and torch.is_grad_enabled()):
            return logits
        loss = z_loss(logits, self.tokens, self.tp_cp_group)
        return self._attach(logits, "z_loss", coeff, coeff * loss, self.tp_cp_group, reduce_group=self.tp_cp_group)

    def attach_z_loss(self, gates_TE: Tensor, squares: Tensor) -> Tensor:
        """The same from the local sum of weighted squares, attached to the gates."""
        coeff, group = self.config.moe_z_loss_coeff, self.tp_cp_group
        if coeff is None:
            return gates_TE
        loss = coeff * squares / self.tokens.total(group).clamp(min=LEAST_WEIGHT)
        return self._attach(gates_TE, "z_loss", coeff, loss, group, reduce_group=group)

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        needs_dp_avg: bool = True,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """See `TopKRouter`; the weight of the microbatch is ours, `valid_token_count` is not read."""
        reduction = {"reduce_group": reduce_group, "needs_dp_avg": needs_dp_avg}
        return self._attach(activation, aux_loss_name, aux_loss_coeff, aux_loss, reduce_group, **reduction)

    def attach_balance_losses(
        self, gates_TE: Tensor, probs_TE: Tensor, map_TE: Tensor, seq_length: int, batch: int
    ) -> Tensor:
        """Attach the Switch-style losses, with loads from the real slots in use, to the gates.

        Args:
            probs_TE: scores that sum to 1 per token, 0 for tokens that take no part.
        """
        valid_T = self.tokens.valid_T
        for kind, name, group in (
            ("aux_loss", "load_balancing_loss", self.tp_cp_group),
            ("seq_aux_loss", "seq_load_balancing_loss", self.tp_cp_group),
            ("global_aux_loss", "global_load_balancing_loss", self.tp_dp_cp_group),
        ):
            coeff = self.get_aux_loss_coeff(kind)
            if coeff == 0:
                continue
            probs, used, valid = probs_TE, map_TE, valid_T
            if kind == "seq_aux_loss":
                probs, used = (x.view(seq_length, batch, -1) for x in (probs_TE, map_TE))
                valid = valid_T.view(seq_length, batch)
            counts, tokens = used.sum(0), valid.sum(0)
            if group.size() > 1:
                both = torch.cat((counts.flatten(), tokens.flatten()))
                torch.distributed.all_reduce(both, group=group)
                counts, tokens = both[: counts.numel()].view_as(counts), both[counts.numel() :].view_as(tokens)
            if kind == "global_aux_loss":
                self.global_tokens_per_expert += counts
                self.ga_steps += 1
                counts = self.global_tokens_per_expert
            loss = coeff * balance_loss(probs, counts, tokens)
            gates_TE = self.attach_and_log_load_balancing_loss(
                gates_TE, coeff, loss, name, group, needs_dp_avg=kind != "global_aux_loss"
            )
        return gates_TE

    def importance_sums(self, importance_T: Tensor, soft_T: Tensor | None, slots_T: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the local tokens that take part, for `attach_importance_losses`, and how many these are."""
        # Moments about 0.5, where importance starts, keep digits of a small variance.
        rows = [importance_T - 0.5, (importance_T - 0.5) ** 2]
        if self._budget_coeff:
            rows += [soft_T, slots_T.to(soft_T.dtype)]
        valid_T = self.tokens.valid_T.to(importance_T.dtype)
        return torch.stack(rows) @ valid_T, valid_T.sum()

    @property
    def _budget_coeff(self) -> float:
        ranges = self.config.anyexperts_k_max > self.config.anyexperts_k_min
        return self.config.anyexperts_budget_loss_coeff if ranges else 0.0

    def has_importance_losses(self, importance_T: Tensor) -> bool:
        """Whether budget or spread loss act on this microbatch."""
        active = self.training and torch.is_grad_enabled() and importance_T.requires_grad
        return active and bool(self._budget_coeff or self.config.anyexperts_spread_loss_coeff)

    def attach_importance_losses(self, gates_TE: Tensor, sums: Tensor, tokens: Tensor) -> Tensor:
        """Attach the budget and spread losses, of all tokens of the microbatch, to the gates.

        Args:
            sums: of the local tokens: importance - 0.5, its square, continuous and integer slots (for the budget).
            tokens: how many these are.
        """
        config, group = self.config, self.tp_cp_group
        budget, spread = self._budget_coeff, config.anyexperts_spread_loss_coeff
        means = shared_mean(sums if budget else sums[:2], tokens, group)
        if budget:
            span = config.anyexperts_k_max - config.anyexperts_k_min
            loss = budget * budget_loss(means[2], means[3], config.anyexperts_target_slots, span)
            gates_TE = self._attach(gates_TE, "slot_budget_loss", budget, loss, group, avg_group=group)
        if spread:
            loss = spread * spread_loss(means[:2] if budget else means, config.anyexperts_spread_target)
            gates_TE = self._attach(gates_TE, "importance_spread_loss", spread, loss, group, avg_group=group)
        return gates_TE

    def _attach(
        self,
        activation: Tensor,
        name: str,
        coeff: float,
        loss: Tensor,
        group: torch.distributed.ProcessGroup,
        **reduction,
    ) -> Tensor:
        """Attach `loss`, coefficient included, to an activation, and record it without its coefficient.

        Args:
            loss: its gradients, summed over the ranks of `group`, are those of the loss over all their tokens.
            reduction: how the tracker gets the value from those of the ranks.
        """
        config = self.config
        number, layers = self.layer_number, config.num_layers + (config.mtp_num_layers or 0)
        if self.is_mtp_layer:
            number = None if number is None else number + config.num_layers
            if config.mtp_use_repeated_layer:  # one layer, called mtp_num_layers times
                loss = loss / config.mtp_num_layers
        get_moe_metrics_tracker().record(name, loss / coeff, number, layers, **reduction)
        if (weight := self._weight(group)) is not None:
            loss = loss * weight
        return MoEAuxLossAutoScaler.apply(activation, loss)

    def _weight(self, group: torch.distributed.ProcessGroup) -> Tensor | int | None:
        if self.calculate_per_token_loss:
            # Megatron sums gradients over the data-parallel ranks and divides by the targets of the step.
            return self.tokens.total(group)
        # It averages them over the data-parallel ranks; a loss that these share is not an average.
        shared = group.size() // self.tp_cp_group.size()
        return shared if shared > 1 else None
