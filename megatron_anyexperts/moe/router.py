"""Decides how many slots each token gets and which real and virtual experts fill them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    apply_biased_logits,
    apply_random_logits,
    router_gating_linear,
)
from torch import Tensor

from megatron_anyexperts.moe.controllers import RouterControl
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.fused_route import Learns, route
from megatron_anyexperts.moe.importance import CentredGradient
from megatron_anyexperts.moe.kernels import has_kernels
from megatron_anyexperts.moe.losses import TokenWeights
from megatron_anyexperts.moe.precision import KeepsPrecision
from megatron_anyexperts.moe.router_losses import RouterLosses
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
    from megatron_anyexperts.moe.config import AnyExpertsConfig


class AnyExpertsRouter(KeepsPrecision, RouterLosses):
    """Routes each token to a variable number of real and virtual experts.

    Shapes: S sequence, B batch, H hidden, T = S * B local tokens, E real experts, V virtual columns, K = k_max.

    Stages:
        1. Logits [S, B, E + V] of the (jittered) hidden states; z-loss.
        2. Slots: importance [T] -> continuous count -> integer k [T]; in training an optional trim to the budget.
        3. Candidates: best K real columns and the virtual columns that may ever win; each gets the slot it enters in.
        4. Gates of the columns in use, the last one weighted; scattered to [T, E], virtual ones summed to [T].
        5. Losses and counters, in training only and once per microbatch under recomputation.

    Padding and tokens that are not finite get no slots and take part in no loss and no counter.

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
        self.fusible = config.anyexperts_no_kernel is None
        self._filler: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """Return logits [S, B, E + V] in the router dtype; more where `_fuses`, up to a multiple of 8 columns."""
        if self.virtual_weight is None:
            return super().gating(input)
        for parameter in (self.weight, self.virtual_weight, self.bias):
            if parameter is not None and parameter.device != input.device:
                parameter.data = parameter.data.to(input.device)
        parts = [self.weight, self.virtual_weight]
        if self._fuses(input) and (missing := -sum(map(len, parts)) % 8):
            if self._filler is None or self._filler.dtype != self.weight.dtype:
                self._filler = self.weight.new_zeros(missing, input.shape[-1])
            parts.append(self._filler)
        weight = torch.cat(parts)
        bias = self.bias if self.bias is None else torch.nn.functional.pad(self.bias, (0, len(weight) - len(self.bias)))
        dtype = {"fp32": torch.float32, "fp64": torch.float64}[self.config.moe_router_dtype]
        return router_gating_linear(input, weight, bias, dtype)

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None, importance_T: Tensor | None = None
    ) -> RoutingDecision:
        """Route hidden states.

        Args:
            input: fused hidden states [S, B, H].
            padding_mask: [S, B]; bool, True for padding, or fp32, the weights of `losses.token_weights`.
            importance_T: fp32 [T] in (0, 1), differentiable. None: every token has importance 0.5.
        """
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

    def _take_in(
        self, logits: Tensor, padding_mask: Tensor | None, importance_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Set the tokens that take part; return logits and importance without NaN and Inf, and where they were [T]."""
        sums_T = logits.detach().sum(-1, dtype=torch.float32).flatten() + importance_T.detach()
        broken_T = ~sums_T.isfinite()
        self.tokens = TokenWeights.of(padding_mask, ~broken_T)
        broken_SB1 = broken_T.view(*logits.shape[:2], 1)
        return logits.masked_fill(broken_SB1, 0), importance_T.masked_fill(broken_T, 0.5), broken_T

    def _route_static(self, logits: Tensor, padding_mask: Tensor | None, importance_T: Tensor) -> RoutingDecision:
        logits, importance_T, broken_T = self._take_in(logits, padding_mask, importance_T)
        valid_T = self.tokens.valid_T
        outside_SB = None if padding_mask is None else ~valid_T.view_as(padding_mask)
        gates_TE, map_TE = self.routing(logits, outside_SB)
        gates_TE, map_TE = gates_TE.masked_fill(~valid_T.unsqueeze(1), 0), map_TE & valid_T.unsqueeze(1)
        slots_T = self.topk * valid_T.long()
        fallback_TE = eligible_TE = None
        if self.needs_fallback:
            scores = Scores.of(logits.view(-1, self.num_experts), self.config)
            fallback_TE, eligible_TE = scores.fallback(gates_TE, map_TE, self.expert_bias)
        if self.has_importance_losses(importance_T):
            gates_TE = self.attach_importance_losses(gates_TE, *self.importance_sums(importance_T, None, slots_T))
        return RoutingDecision(
            gates_TE, map_TE, None, importance_T.detach(), slots_T, fallback_TE, eligible_TE, broken_T
        )

    def decide(self, logits: Tensor, padding_mask: Tensor | None, importance_T: Tensor) -> RoutingDecision:
        """Turn logits [S, B, E + V] and importance [T] into slots and gates: stages 2 to 5 of the class docstring."""
        if self._fuses(logits):
            return self._decide_fused(logits, padding_mask, importance_T)
        config = self.config
        seq_length, batch = logits.shape[:2]
        logits, importance_T, broken_T = self._take_in(logits, padding_mask, importance_T)
        valid_T = self.tokens.valid_T
        logits_TC = self.apply_z_loss(logits.reshape(-1, logits.shape[-1]))

        soft_T, slots_T = self._slots(importance_T, valid_T)
        gate_soft_T = soft_T
        if config.anyexperts_importance_gradient == "centred" and importance_T.requires_grad:
            # Losses keep their gradient: centring would take a budget loss away, which pushes all tokens alike.
            gate_soft_T = self._soft(CentredGradient.apply(importance_T, valid_T, self.tp_cp_group))
        scores = Scores.of(logits_TC, config)
        real = scores.best_real(config.anyexperts_k_max, self.expert_bias)
        virtual = scores.best_virtual(config.anyexperts_max_virtual_slots, self.control.virtual_bias)
        columns_TC, rivals_TV = real.columns, None
        if virtual is not None:
            columns_TC, rivals_TV = torch.cat((real.columns, virtual.columns), dim=1), virtual.selection
        entry_TC = entry_slots(real.selection, rivals_TV, config.anyexperts_rho_max)
        last_T = last_slot_weight(gate_soft_T, slots_T, config.anyexperts_slot_gradient)
        # Without any slot a softmax over the slots in use would be NaN, and so would its gradient.
        used_TC, weight_TC = slot_weights(entry_TC, slots_T.clamp(min=1), last_T, log=scores.log_weights)
        values_TC = scores.scores_TC.gather(1, columns_TC)
        gates_TC = scores.gates(values_TC, weight_TC).masked_fill(~valid_T.unsqueeze(1), 0)
        used_TC = used_TC & valid_T.unsqueeze(1)

        width = config.anyexperts_k_max
        gates_TE = gates_TC.new_zeros(len(gates_TC), self.num_experts).scatter(1, real.columns, gates_TC[:, :width])
        used_TK = used_TC[:, :width]
        map_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter_(1, real.columns, used_TK)
        virtual_gate_T = None if virtual is None else gates_TC[:, width:].sum(1)
        fallback_TE = eligible_TE = None
        if self.needs_fallback:
            fallback_TE, eligible_TE = scores.fallback(gates_TE, map_TE, self.expert_bias, values_TC, weight_TC)

        if self.training and torch.is_grad_enabled():
            if self.is_aux_loss_enabled():
                probs_TE = scores.normalised() * valid_T.unsqueeze(1)
                gates_TE = self.attach_balance_losses(gates_TE, probs_TE, map_TE, seq_length, batch)
            if self.has_importance_losses(importance_T):
                gates_TE = self.attach_importance_losses(
                    gates_TE, *self.importance_sums(importance_T, soft_T, slots_T)
                )
            self._apply_expert_bias(map_TE)
        if self.control.calibrating or self._counts:
            self.control.count(soft_T, slots_T, used_TK, valid_T)
        return RoutingDecision(
            gates_TE, map_TE, virtual_gate_T, importance_T.detach(), slots_T, fallback_TE, eligible_TE, broken_T
        )

    def _fuses(self, tensor: Tensor) -> bool:
        # With a load cap the gates that a slot would get elsewhere are needed too.
        here = has_kernels(self.config.anyexperts_kernels, tensor)
        return self.fusible and here and not self.needs_fallback

    def _decide_fused(self, logits: Tensor, padding_mask: Tensor | None, importance_T: Tensor) -> RoutingDecision:
        """`decide` with stages 2 to 4, and the sums that stage 5 needs, in one kernel."""
        config = self.config
        seq_length, batch = logits.shape[:2]
        logits_TC = logits.reshape(-1, logits.shape[-1])
        mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        learns = self.training and torch.is_grad_enabled()
        centred = config.anyexperts_importance_gradient == "centred" and importance_T.requires_grad
        fused = route(
            config,
            logits_TC,
            importance_T,
            mask_T,
            (self.control.slot_offset, self.control.virtual_bias),
            self.expert_bias,
            Learns(
                probs=learns and self.is_aux_loss_enabled(),
                z_loss=learns and config.moe_z_loss_coeff is not None,
                budget=self.training and config.anyexperts_budget_slack is not None,
                centred_over=self.tp_cp_group if centred else None,
            ),
        )
        sums = fused.sums.detach()
        self.tokens = TokenWeights(fused.weight_T, fused.valid_T, sums[8])
        gates_TE = fused.gates_TE
        if learns:
            gates_TE = self.attach_z_loss(gates_TE, fused.sums[9])
            if self.is_aux_loss_enabled():
                gates_TE = self.attach_balance_losses(gates_TE, fused.probs_TE, fused.map_TE, seq_length, batch)
            if self.has_importance_losses(importance_T):
                gates_TE = self.attach_importance_losses(gates_TE, fused.sums[:4], sums[4])
            self._apply_expert_bias(fused.map_TE)
        if self.control.calibrating or self._counts:
            self.control.add(sums[4:8])
        virtual_gate_T = fused.virtual_gate_T if config.anyexperts_max_virtual_slots else None
        return RoutingDecision(
            gates_TE, fused.map_TE, virtual_gate_T, fused.importance_T, fused.slots_T, None, None, fused.broken_T
        )

    def _slots(self, importance_T: Tensor, valid_T: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        soft_T = self._soft(importance_T)
        slots_T = integer_slots(soft_T, config.anyexperts_slot_gradient) * valid_T
        if config.anyexperts_budget_slack is not None and self.training:
            slots = config.anyexperts_budget_slack * config.anyexperts_target_slots
            budget = (slots * valid_T.sum(dtype=torch.float64)).floor().long()
            slots_T = trim_to_budget(slots_T, importance_T.detach(), config.anyexperts_k_min, budget)
        return soft_T, slots_T

    def _soft(self, importance_T: Tensor) -> Tensor:
        k_min, k_max = self.config.anyexperts_k_min, self.config.anyexperts_k_max
        return soft_slots(importance_T, self.control.slot_offset, k_min, k_max)

    @property
    def _counts(self) -> bool:
        # Without counts no controller moves: those of a frozen router stand still.
        return self.training and torch.is_grad_enabled() and self.weight.requires_grad

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # Megatron 0.19 forgets the expert dimension of the mask and counts in evaluation with gradients.
        if self.enable_expert_bias and self._counts:
            with torch.no_grad():
                self.local_tokens_per_expert += (routing_map & self.tokens.valid_T.unsqueeze(1)).sum(dim=0)
