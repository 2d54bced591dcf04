"""Mixture layer with importance, dynamic slots and virtual experts, in inference."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_anyexperts import AnyExpertsConfig
from .scores import Scores
from .slots import entry_slots, integer_slots, last_slot_weight, slot_weights, soft_slots

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate above up in one matrix."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_up_proj(x)))


def gated(x: Tensor) -> Tensor:
    """silu of the first half of the last dimension times the second."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


class Importance(nn.Module):
    """w in (0, 1) of each token, in fp32 whatever the model has, and h' = h + alpha * w * h."""

    def __init__(self, config: AnyExpertsConfig):
        super().__init__()
        width = config.anyexperts_importance_hidden
        self.config = config
        self.down = nn.Parameter(torch.zeros(width, config.hidden_size, dtype=torch.float32))
        self.down_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.up_bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.zeros(1, dtype=torch.float32)) if config.anyexperts_learn_alpha else None

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return w, fp32 [T], and h' [T, H]."""
        inner_TD = torch.addmm(self.down_bias, hidden_TH.to(self.down.dtype), self.down.t())
        importance_T = torch.addmv(self.up_bias.expand(len(inner_TD)), functional.silu(inner_TD), self.up).sigmoid()
        if not self.config.fuses:
            return importance_T, hidden_TH
        alpha = self.config.anyexperts_alpha if self.alpha is None else self.alpha
        scale_T1 = (alpha * importance_T).to(hidden_TH.dtype).unsqueeze(1)
        return importance_T, torch.addcmul(hidden_TH, hidden_TH, scale_T1)


class Router(nn.Module):
    """Gates of real experts [T, E], which of them are in use, summed gates of virtual ones [T], and slots [T]."""

    def __init__(self, config: AnyExpertsConfig):
        super().__init__()
        self.config = config
        experts, virtual = config.num_moe_experts, config.anyexperts_virtual_experts
        self.weight = nn.Parameter(torch.zeros(experts, config.hidden_size))
        self.virtual_weight = nn.Parameter(torch.zeros(virtual, config.hidden_size)) if virtual else None
        bias = torch.zeros(experts, dtype=torch.float32) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.register_buffer("slot_offset", torch.zeros(1, dtype=torch.float32))
        self.register_buffer("virtual_bias", torch.zeros(1, dtype=torch.float32))

    def forward(self, hidden_TH: Tensor, importance_T: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Route tokens by their logits [T, E + V] and importance, fp32 [T]."""
        config = self.config
        weight = self.weight if self.virtual_weight is None else torch.cat((self.weight, self.virtual_weight))
        dtype = _DTYPES.get(config.moe_router_dtype, hidden_TH.dtype)
        logits_TC = torch.mm(hidden_TH.to(dtype), weight.to(dtype).t())

        k_min, k_max, gradient = config.anyexperts_k_min, config.anyexperts_k_max, config.anyexperts_slot_gradient
        soft_T = soft_slots(importance_T, self.slot_offset, k_min, k_max)
        slots_T = integer_slots(soft_T, gradient).clamp(k_min, k_max)  # NaN has no integer
        scores = Scores.of(logits_TC, config)
        real = scores.best_real(k_max, self.expert_bias)
        virtual = scores.best_virtual(config.max_virtual_slots, self.virtual_bias)
        columns_TC = real.columns if virtual is None else torch.cat((real.columns, virtual.columns), dim=1)
        rivals_TV = None if virtual is None else virtual.selection
        entry_TC = entry_slots(real.selection, rivals_TV, config.anyexperts_rho_max)
        last_T = last_slot_weight(soft_T, slots_T, gradient)
        used_TC, weight_TC = slot_weights(entry_TC, slots_T, last_T, log=scores.log_weights)
        gates_TC = scores.gates(scores.scores_TC.gather(1, columns_TC), weight_TC)

        gates_TE = gates_TC.new_zeros(len(gates_TC), config.num_moe_experts)
        gates_TE = gates_TE.scatter(1, real.columns, gates_TC[:, :k_max])
        map_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter(1, real.columns, used_TC[:, :k_max])
        return gates_TE, map_TE, None if virtual is None else gates_TC[:, k_max:].sum(1), slots_T


class Experts(nn.Module):
    """Gated MLPs of the same shape, each for the tokens that have a slot with it."""

    def __init__(self, config: AnyExpertsConfig):
        super().__init__()
        experts, hidden, inner = config.num_moe_experts, config.hidden_size, config.moe_ffn_hidden_size
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.zeros(experts, hidden, inner))

    def forward(self, hidden_TH: Tensor, gates_TE: Tensor, map_TE: Tensor) -> Tensor:
        """Sum over the experts of each token, [T, H]."""
        output_TH = torch.zeros_like(hidden_TH)
        for expert in map_TE.any(0).nonzero().flatten().tolist():
            tokens_N = map_TE[:, expert].nonzero().squeeze(1)
            inner_NI = gated(functional.linear(hidden_TH[tokens_N], self.gate_up_proj[expert]))
            inner_NI = (inner_NI * gates_TE[tokens_N, expert].unsqueeze(1)).to(hidden_TH.dtype)
            output_TH.index_add_(0, tokens_N, functional.linear(inner_NI, self.down_proj[expert]))
        return output_TH


class VirtualExpert(nn.Module):
    """What stands behind a virtual slot: the input ("identity"), nothing ("zero") or a learned vector ("constant")."""

    def __init__(self, config: AnyExpertsConfig):
        super().__init__()
        self.kind = config.anyexperts_virtual_kind
        if self.kind == "constant":
            self.vector = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, output_TH: Tensor, hidden_TH: Tensor, gate_T: Tensor) -> Tensor:
        """Return output + gate * virtual."""
        if self.kind == "zero":
            return output_TH
        gate_T1 = gate_T.to(output_TH.dtype).unsqueeze(1)
        return torch.addcmul(output_TH, gate_T1, hidden_TH if self.kind == "identity" else self.vector)


class MixtureOfExperts(nn.Module):
    """Importance, routing, experts, virtual slots and the shared expert."""

    def __init__(self, config: AnyExpertsConfig):
        super().__init__()
        shared = config.moe_shared_expert_intermediate_size
        self.importance = Importance(config) if config.anyexperts_importance else None
        self.router = Router(config)
        self.experts = Experts(config)
        self.virtual = VirtualExpert(config) if config.anyexperts_virtual_experts else None
        self.shared_experts = GatedMLP(config.hidden_size, shared) if shared else None

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output [B, S, H], importance, fp32 [B, S], and slots, int64 [B, S]."""
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        importance_T = hidden_TH.new_full((len(hidden_TH),), 0.5, dtype=torch.float32)
        if self.importance is not None:
            importance_T, hidden_TH = self.importance(hidden_TH)
        gates_TE, map_TE, virtual_gate_T, slots_T = self.router(hidden_TH, importance_T)
        output_TH = self.experts(hidden_TH, gates_TE, map_TE)
        if virtual_gate_T is not None:
            output_TH = self.virtual(output_TH, hidden_TH, virtual_gate_T)
        if self.shared_experts is not None:
            output_TH = output_TH + self.shared_experts(hidden_TH)
        shape = hidden_BSH.shape[:2]
        return output_TH.view_as(hidden_BSH), importance_T.view(shape), slots_T.view(shape)
