"""Decides how many slots each token gets and which real and virtual experts fill them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_biased_logits,
    apply_random_logits,
    router_gating_linear,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_anyexperts.moe.controllers import RouterControl
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.losses import balance_loss, budget_loss, shared_mean, spread_loss
from megatron_anyexperts.moe.scores import Scores
from megatron_anyexperts.moe.slots import (
    entry_slots,
    integer_slots,
    last_slot_weight,
    slot_weights,
    soft_slots,
    trim_to_budget,
)

if TYPE_CHECKING:
    from megatron_anyexperts.config import AnyExpertsConfig


class AnyExpertsRouter(TopKRouter):
    """Routes each token to a variable number of real and virtual experts.

    Shapes: S sequence, B batch, H hidden, T = S * B local tokens, E real experts, V virtual columns, K = k_max.

    Stages:
        1. Logits [S, B, E + V] of the (jittered) hidden states; z-loss.
        2. Slots: importance [T] -> continuous count -> integer k [T]; in training an optional trim to the budget.
        3. Candidates: best K real columns and the virtual columns that may ever win; each gets the slot it enters in.
        4. Gates of the columns in use, the last one weighted; scattered to [T, E], virtual ones summed to [T].
        5. Losses and counters, in training only and once per microbatch under recomputation.

    With k_min = k_max = moe_router_topk and no virtual columns, stages 2 to 4 are Megatron's own top-k.
    """

    config: AnyExpertsConfig

    def __init__(
        self, config: AnyExpertsConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ):
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.virtual_weight = None
        if config.anyexperts_virtual_experts:
            self.virtual_weight = torch.nn.Parameter(
                torch.empty(config.anyexperts_virtual_experts, config.hidden_size, dtype=torch.float32)
            )
            if config.perform_initialization:
                config.init_method(self.virtual_weight)
            self.virtual_weight.data = self.virtual_weight.data.to(config.params_dtype)
            self.virtual_weight.sequence_parallel = config.sequence_parallel
        self.control = RouterControl(config)
        self.needs_fallback = config.anyexperts_dispatch_eps is not None

    def gating(self, input: Tensor) -> Tensor:
        """Return logits [S, B, E + V] in the router dtype."""
        if self.virtual_weight is None:
            return super().gating(input)
        for parameter in (self.weight, self.virtual_weight, self.bias):
            if parameter is not None and parameter.device != input.device:
                parameter.data = parameter.data.to(input.device)
        weight = torch.cat((self.weight, self.virtual_weight))
        bias = self.bias if self.bias is None else torch.nn.functional.pad(self.bias, (0, len(self.virtual_weight)))
        dtype = {"fp32": torch.float32, "fp64": torch.float64}[self.config.moe_router_dtype]
        return router_gating_linear(input, weight, bias, dtype)

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, importance_T: Tensor | None = None
    ) -> RoutingDecision:
        """Route hidden states.

        Args:
            input: fused hidden states [S, B, H].
            padding_mask: bool [S, B], True for padding. Padding is routed but never counted.
            importance_T: fp32 [T] in (0, 1), differentiable. None: every token has importance 0.5.
        """
        self._maintain_float32_expert_bias()
        if self.training:
            self.control.undo_if_rerunning()
        # Megatron 0.19 jitters in evaluation too, which then has no fixed result and moves the generator of training.
        logits = self.gating(self.apply_input_jitter(input) if self.training else input)
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        if self.config.moe_router_force_biased is not None:
            logits = apply_biased_logits(logits, self.config.moe_router_force_biased, self.layer_number)
        if importance_T is None:
            importance_T = logits.new_full((logits.shape[:2].numel(),), 0.5, dtype=torch.float32)
        if self.config.anyexperts_static:
            return self._route_static(logits, padding_mask, importance_T)
        return self.decide(logits, padding_mask, importance_T)

    def _route_static(self, logits: Tensor, padding_mask: Tensor | None, importance_T: Tensor) -> RoutingDecision:
        gates_TE, map_TE = self.routing(logits, padding_mask)
        slots_T = torch.full_like(importance_T, self.topk, dtype=torch.long)
        fallback_TE = None
        if self.needs_fallback:
            scores = Scores.of(logits.view(-1, self.num_experts), self.config)
            fallback_TE = scores.fallback(gates_TE, map_TE, self.expert_bias)
        gates_TE = self._importance_losses(gates_TE, importance_T, None, slots_T, padding_mask)
        return RoutingDecision(gates_TE, map_TE, None, importance_T.detach(), slots_T, fallback_TE)

    def decide(self, logits: Tensor, padding_mask: Tensor | None, importance_T: Tensor) -> RoutingDecision:
        """Turn logits [S, B, E + V] and importance [T] into slots and gates: stages 2 to 5 of the class docstring."""
        config = self.config
        seq_length, batch = logits.shape[:2]
        logits_TC = logits.reshape(-1, logits.shape[-1])
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TC = self.apply_z_loss(logits_TC, padding_mask=padding_T)

        soft_T, slots_T = self._slots(importance_T)
        scores = Scores.of(logits_TC, config)
        real = scores.best_real(config.anyexperts_k_max, self.expert_bias)
        virtual = scores.best_virtual(config.anyexperts_max_virtual_slots, self.control.virtual_bias)
        columns_TC, rivals_TV = real.columns, None
        if virtual is not None:
            columns_TC, rivals_TV = torch.cat((real.columns, virtual.columns), dim=1), virtual.selection
        entry_TC = entry_slots(real.selection, rivals_TV, config.anyexperts_rho_max)
        last_T = last_slot_weight(soft_T, slots_T, config.anyexperts_slot_gradient)
        used_TC, weight_TC = slot_weights(entry_TC, slots_T, last_T, log=scores.log_weights)
        values_TC = scores.scores_TC.gather(1, columns_TC)
        gates_TC = scores.gates(values_TC, weight_TC)

        width = config.anyexperts_k_max
        gates_TE = gates_TC.new_zeros(len(gates_TC), self.num_experts).scatter(1, real.columns, gates_TC[:, :width])
        used_TK = used_TC[:, :width]
        map_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter_(1, real.columns, used_TK)
        virtual_gate_T = None if virtual is None else gates_TC[:, width:].sum(1)
        fallback_TE = None
        if self.needs_fallback:
            fallback_TE = scores.fallback(gates_TE, map_TE, self.expert_bias, values_TC, weight_TC)

        if self.training and torch.is_grad_enabled():
            gates_TE = self._balance_losses(gates_TE, scores, map_TE, padding_T, seq_length, batch)
            gates_TE = self._importance_losses(gates_TE, importance_T, soft_T, slots_T, padding_T)
            self._apply_expert_bias(map_TE, padding_T)
        if self.control.calibrating or (self.training and torch.is_grad_enabled()):
            self.control.count(soft_T, slots_T, used_TK, padding_T)
        return RoutingDecision(gates_TE, map_TE, virtual_gate_T, importance_T.detach(), slots_T, fallback_TE)

    def _slots(self, importance_T: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        k_min, k_max = config.anyexperts_k_min, config.anyexperts_k_max
        soft_T = soft_slots(importance_T, self.control.slot_offset, k_min, k_max)
        slots_T = integer_slots(soft_T, config.anyexperts_slot_gradient)
        if config.anyexperts_budget_slack is not None and self.training:
            budget = int(config.anyexperts_budget_slack * config.anyexperts_target_slots * len(slots_T))
            slots_T = trim_to_budget(slots_T, importance_T.detach(), k_min, budget)
        return soft_T, slots_T

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # Megatron 0.19 forgets the expert dimension of the mask and counts in evaluation with gradients.
        if self.enable_expert_bias and self.training and torch.is_grad_enabled():
            with torch.no_grad():
                valid_TE = routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(1)
                self.local_tokens_per_expert += valid_TE.sum(dim=0)

    def _balance_losses(
        self, gates_TE: Tensor, scores: Scores, map_TE: Tensor, padding_T: Tensor | None, seq_length: int, batch: int
    ) -> Tensor:
        """Attach the Switch-style losses, with loads from the real slots in use, to the gates."""
        if not self.is_aux_loss_enabled():
            return gates_TE
        probs_TE, tokens_SB, local_tokens = scores.normalised(), None, len(map_TE)
        if padding_T is not None:
            valid_T = ~padding_T
            probs_TE, map_TE = probs_TE * valid_T.unsqueeze(1), map_TE & valid_T.unsqueeze(1)
            tokens_SB, local_tokens = valid_T.view(seq_length, batch), valid_T.sum()
        for kind, name, group in (
            ("aux_loss", "load_balancing_loss", self.tp_cp_group),
            ("seq_aux_loss", "seq_load_balancing_loss", self.tp_cp_group),
            ("global_aux_loss", "global_load_balancing_loss", self.tp_dp_cp_group),
        ):
            coeff = self.get_aux_loss_coeff(kind)
            if coeff == 0:
                continue
            probs, used = probs_TE, map_TE
            if kind == "seq_aux_loss":
                probs, used = (x.view(seq_length, batch, -1) for x in (probs_TE, map_TE))
            counts = used.sum(0)
            if tokens_SB is None:
                tokens = counts.new_full(counts.shape[:-1], len(used))
            else:
                tokens = tokens_SB.sum(0) if kind == "seq_aux_loss" else local_tokens
            if group.size() > 1:
                both = torch.cat((counts.flatten(), tokens.flatten()))
                torch.distributed.all_reduce(both, group=group)
                counts, tokens = both[: counts.numel()].view_as(counts), both[counts.numel() :].view_as(tokens)
            if kind == "global_aux_loss":
                self.global_tokens_per_expert += counts
                self.ga_steps += 1
                counts = self.global_tokens_per_expert
            gates_TE = self.attach_and_log_load_balancing_loss(
                gates_TE,
                coeff,
                coeff * balance_loss(probs, counts, tokens),
                name,
                group,
                needs_dp_avg=kind != "global_aux_loss",
                valid_token_count=local_tokens,
            )
        return gates_TE

    def _importance_losses(
        self, gates_TE: Tensor, importance_T: Tensor, soft_T: Tensor | None, slots_T: Tensor, padding_T: Tensor | None
    ) -> Tensor:
        """Attach the budget and spread losses, of all tokens of the microbatch, to the gates."""
        config = self.config
        span = config.anyexperts_k_max - config.anyexperts_k_min
        budget = config.anyexperts_budget_loss_coeff if span else 0.0
        spread = config.anyexperts_spread_loss_coeff
        active = self.training and torch.is_grad_enabled() and importance_T.requires_grad
        if not (active and (budget or spread)):
            return gates_TE
        # Moments about 0.5, where importance starts, keep digits of a small variance.
        rows = [importance_T - 0.5, (importance_T - 0.5) ** 2]
        if budget:
            rows += [soft_T, slots_T.to(soft_T.dtype)]
        valid_T = None if padding_T is None else ~padding_T.reshape(-1)
        means = shared_mean(torch.stack(rows), valid_T, self.tp_cp_group)
        if budget:
            loss = budget_loss(means[2], means[3], config.anyexperts_target_slots, span)
            gates_TE = self._attach(gates_TE, "slot_budget_loss", budget, loss, valid_T)
        if spread:
            loss = spread_loss(means[0], means[1], config.anyexperts_spread_target)
            gates_TE = self._attach(gates_TE, "importance_spread_loss", spread, loss, valid_T)
        return gates_TE

    def _attach(self, gates_TE: Tensor, name: str, coeff: float, loss: Tensor, valid_T: Tensor | None) -> Tensor:
        """Attach a loss that is the same on all ranks of a microbatch; `attach_and_log_load_balancing_loss` sums."""
        config = self.config
        number = self.layer_number
        if self.is_mtp_layer:
            number += config.num_layers
            if config.mtp_use_repeated_layer:  # one layer, called mtp_num_layers times
                loss = loss / config.mtp_num_layers
        layers = config.num_layers + (config.mtp_num_layers or 0)
        get_moe_metrics_tracker().record(name, loss, number, layers, avg_group=self.tp_cp_group)
        if self.calculate_per_token_loss:
            # Megatron then divides all gradients by the tokens of the global batch.
            tokens = len(gates_TE) if valid_T is None else valid_T.sum()
            loss = loss * tokens * self.tp_cp_group.size()
        return MoEAuxLossAutoScaler.apply(gates_TE, coeff * loss)
