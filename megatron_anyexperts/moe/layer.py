"""The mixture-of-experts layer with importance, dynamic slots and virtual experts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules, te_checkpoint
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.typed_torch import apply_module
from torch import Tensor

from megatron_anyexperts.moe.controllers import with_controllers
from megatron_anyexperts.moe.dispatcher import Dispatched, SlotDispatcher
from megatron_anyexperts.moe.expert_copies import ExpertCopies
from megatron_anyexperts.moe.importance import Importance
from megatron_anyexperts.moe.metrics import local_positions, observe
from megatron_anyexperts.moe.virtual import VirtualExpert

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig
    from megatron_anyexperts.moe.decision import RoutingDecision


class AnyExpertsMoELayer(MoELayer):
    """Megatron's MoE layer with another way to the experts; experts and shared experts stay Megatron's.

    Shapes: S sequence, B batch, H hidden, T = S * B local tokens, N slots that arrive here.

    Stages:
        1. Importance w [T] of the input [S, B, H]; fusion h' = h + alpha * w * h.
        2. Shared experts of h'.
        3. Route: h', w -> `RoutingDecision`.
        4. Dispatch [T, H] -> experts [N, H] -> combine [T, H].
        5. Add virtual slots: their gates, and those the dispatch cap displaced, times Virtual(h').
    """

    config: AnyExpertsConfig

    def __init__(
        self,
        config: AnyExpertsConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ):
        pg_collection = pg_collection or get_default_pg_collection()
        # For models built without `moe_spec`, which does it on pipeline stages without mixture layers as well.
        config.finalize_model_grads_func = with_controllers(config.finalize_model_grads_func)
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.token_dispatcher = None
        self.dispatcher = SlotDispatcher(config, self.num_local_experts, self.local_expert_indices, pg_collection)
        self.copies = None
        if self.dispatcher.balance.copies:
            self.copies = ExpertCopies(
                self.experts, partial(self.submodules.experts, pg_collection=pg_collection), config, pg_collection.ep
            )
        self.router.needs_fallback = self.dispatcher.eps is not None
        self.importance = Importance(config) if config.anyexperts_needs_importance else None
        has_virtual = config.anyexperts_max_virtual_slots > 0 or self.dispatcher.eps is not None
        self.virtual = VirtualExpert(config) if has_virtual else None
        # Megatron marks expert parameters as dense at EP = 1: then optimizer states of EP = 1 and EP > 1 differ in
        # structure, and a checkpoint of one does not load into the other (Megatron-Core 0.19).
        for parameter in self.experts.parameters():
            parameter.allreduce = False

    def forward(
        self, hidden_states: Tensor, intermediate_tensors=None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Apply the layer.

        Args:
            hidden_states: [S, B, H], a sequence shard under sequence parallelism.
            intermediate_tensors: must be None; Megatron passes it to run single stages.
            padding_mask: [B, S]; bool, True for padding, or the weights of `losses.token_weights`, fp32, 0 for padding.
                With a bool mask the router's losses weigh as if every other token were a target.

        Returns:
            [S, B, H] and None, for the bias that experts of this layer do not have. Padding gets no routed experts. A
            token whose logits or importance are NaN or Inf gets none either, and its output is NaN.
        """
        if intermediate_tensors is not None:
            raise ValueError("the stages of a dynamic-slot layer cannot run one by one; see AnyExpertsConfig")
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError(
                f"tensor_model_parallel_size={self.attn_tp_group.size()} without sequence_parallel would route every "
                "token once per tensor rank; add --sequence-parallel"
            )
        if padding_mask is not None:
            padding_mask = local_positions(padding_mask, hidden_states.shape[0], self.attn_tp_group.rank())
        if not (self.moe_layer_recompute and self.training):
            return self._forward(hidden_states, padding_mask), None
        if self.config.fp8 or self.config.fp4:
            tracker = tensor_parallel.random.get_cuda_rng_tracker
            return te_checkpoint(self._forward, False, tracker, self.tp_group, hidden_states, padding_mask), None
        return tensor_parallel.checkpoint(self._forward, False, hidden_states, padding_mask), None

    def _forward(self, hidden_SBH: Tensor, padding_SB: Tensor | None) -> Tensor:
        importance_T = None
        if self.importance is not None:
            importance_T, hidden_SBH = self.importance(hidden_SBH)
        shared_SBH = self.shared_experts_compute(hidden_SBH)
        decision = self.router(hidden_SBH, padding_SB, importance_T)

        hidden_TH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        routed_TH = hidden_TH
        if self.config.moe_latent_size:
            routed_TH, _ = self.fc1_latent_proj(routed_TH)
        dispatched = self.dispatcher.dispatch(routed_TH, decision)
        output_TH = self.combine(self._compute(dispatched), dispatched, hidden_TH, decision)
        if self.layer_number is not None:  # as Megatron's tracker: a layer without a number has no figures
            observe(
                self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0),
                decision,
                dispatched.load,
                hidden_SBH.shape[:2],
                self.attn_tp_group.rank(),
                self.training,
            )
        output_SBH = output_TH.view_as(hidden_SBH)
        return output_SBH if shared_SBH is None else output_SBH + shared_SBH

    def end_step(self) -> None:
        """Before the optimizer changes weights: give back those of other ranks' experts that were kept."""
        if self.dispatcher.kept is not None:
            self.copies.forget()
            self.dispatcher.kept.end_step()

    def _compute(self, dispatched: Dispatched) -> Tensor:
        """[N, H], the experts' outputs; those of copies stand last."""
        copied = dispatched.plan is not None
        kept = self.training and self.dispatcher.kept is not None and self.dispatcher.kept.placed
        fetched = self.copies.fetch(dispatched.plan, kept) if copied else None
        slots_NH, gates_N, tokens_per_expert = (
            dispatched.expert_input,
            dispatched.expert_probs,
            dispatched.tokens_per_expert,
        )
        own, split = self.num_local_experts, int(tokens_per_expert[: self.num_local_experts].sum())
        own_NH, copied_MH = slots_NH[:split], slots_NH[split:]
        if self.copies is not None:
            own_NH, copied_MH = self.copies.lend(fetched, own_NH, copied_MH)
        output, bias = apply_module(self.experts)(own_NH, tokens_per_expert[:own], gates_N[:split])
        assert bias is None, "experts with a separate bias are not supported"
        if not copied:
            return output
        guests = self.copies(fetched, copied_MH, tokens_per_expert[own:], gates_N[split:])
        return torch.cat((output, guests))

    def combine(
        self, expert_output_NH: Tensor, dispatched: Dispatched, hidden_TH: Tensor, decision: RoutingDecision
    ) -> Tensor:
        """Bring expert outputs back, [N, H] -> [T, H], and add the virtual slots of h' [T, H]; stages 4 and 5."""
        gates = [gate for gate in (decision.virtual_gate_T, dispatched.displaced_gate_T) if gate is not None]
        gate_T = sum(gates[1:], gates[0]) if gates else None
        if self.dispatcher.has_kernels(hidden_TH) and not self.config.moe_latent_size:
            here = gate_T is not None and self.virtual.kind == "identity"
            added = (hidden_TH, gate_T) if here else (None, None)
            output_TH = self.dispatcher.combine(expert_output_NH, dispatched, (*added, decision.nonfinite_T))
            # NaN stays NaN whatever is added to it.
            return output_TH if here or gate_T is None else self.virtual(output_TH, hidden_TH, gate_T)
        output_TH = self.dispatcher.combine(expert_output_NH, dispatched)
        if self.config.moe_latent_size:
            output_TH, _ = self.fc2_latent_proj(output_TH)
        if gate_T is not None:
            output_TH = self.virtual(output_TH, hidden_TH, gate_T)
        return output_TH.masked_fill(decision.nonfinite_T.unsqueeze(1), float("nan"))
