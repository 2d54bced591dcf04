"""Every option of dynamic routing, declared once: the dataclass makes the command line, its help and its checks."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_anyexperts.moe.kernels import HAS_TRITON
from megatron_anyexperts.moe.slots import virtual_cap


@dataclass
class AnyExpertsConfig(TransformerConfig):
    """Dynamic expert slots, virtual experts and the dispatch budget of mixture-of-experts layers."""

    anyexperts_stock_moe: bool = False
    """Build Megatron's own MoELayer and TopKRouter instead of ours: the reference that exact reduction is tested
    against. Every other option of this group is then without effect."""

    anyexperts_k_min: int | None = None
    """Fewest expert slots of a token. None: --moe-router-topk. Can be changed on a trained checkpoint."""

    anyexperts_k_max: int | None = None
    """Most expert slots of a token. None: --moe-router-topk. Can be changed on a trained checkpoint."""

    anyexperts_target_slots: float | None = None
    """Mean slots per token that each layer's controller steers to by moving its slot offset, once per optimizer
    step. None: the offset stays as it is (0 in a new model). Must lie in [k_min, k_max]."""

    anyexperts_slot_rate: float = 0.5
    """Share of the measured deviation from --anyexperts-target-slots that one step corrects, in (0, 1]."""

    anyexperts_slot_gradient: Literal["fractional", "straight_through", "none"] = "fractional"
    """How the integer slot count passes a gradient. fractional: the last slot's gate is scaled by the fractional
    part, so the output is continuous; straight_through: rounded forward, scaled backward; none: no gradient."""

    anyexperts_importance_gradient: Literal["plain", "centred"] = "plain"
    """What of the slot count's gradient reaches importance. plain: each token's own; centred: that less its mean over
    the tokens of the microbatch, so that a token gains importance only where a slot helps it more than it helps
    others. Losses and fusion are not centred."""

    anyexperts_budget_slack: float | None = None
    """Hard budget on top of the controller, in training only: when a rank's microbatch would use more than
    slack * target_slots * tokens slots, the least important tokens lose slots, never below k_min. None: off;
    otherwise at least 1."""

    anyexperts_alpha: float = 0.1
    """Strength of importance fusion, h' = h + alpha * w * h. 0 switches it off (exact stock routing needs 0)."""

    anyexperts_learn_alpha: bool = False
    """Train alpha, one scalar per layer, starting at --anyexperts-alpha."""

    anyexperts_importance_hidden: int = 32
    """Width of the importance module's bottleneck."""

    anyexperts_rho_max: float = 0.0
    """Largest share of a token's slots that virtual experts may fill, in [0, 1): of k slots at most
    floor(rho_max * k). Can be changed on a trained checkpoint."""

    anyexperts_virtual_experts: int | None = None
    """Virtual columns the router owns. None: floor(rho_max * k_max). Name the trained number when changing the
    slot range or rho_max of a checkpoint, so that the shapes stay."""

    anyexperts_virtual_kind: Literal["identity", "zero", "constant"] = "identity"
    """What a virtual expert returns: its input, zero, or one learned vector per layer."""

    anyexperts_target_real: float | None = None
    """Mean real slots per token that each layer's controller steers to by moving the virtual columns' bias.
    None: the bias stays as it is (0 in a new model)."""

    anyexperts_virtual_bias_rate: float = 0.3
    """Change of the virtual columns' bias, in logits, per optimizer step and per slot of deviation."""

    anyexperts_expert_bias_update: Literal["auto", "zero_mean", "stock"] = "auto"
    """Update of the expert bias (--moe-router-enable-expert-bias). zero_mean: keeps the bias's mean at 0, so that
    real columns do not drift against virtual ones; stock: Megatron's; auto: zero_mean with virtual experts."""

    anyexperts_budget_loss_coeff: float = 0.0
    """Coefficient of the budget loss, the squared relative deviation of mean slots from the target."""

    anyexperts_spread_loss_coeff: float = 0.0
    """Coefficient of the spread loss, which keeps importance from collapsing to a constant."""

    anyexperts_spread_target: float = 0.15
    """Standard deviation of importance at which the spread loss vanishes, in (0, 0.5]."""

    anyexperts_kernels: Literal["auto", "off", "on"] = "auto"
    """Triton kernels for routing, for tokens to slots and back (without --moe-permute-fusion), and for figures. auto:
    on a GPU, where settings allow; off: torch operators, which define the result; on: on a CPU too, in Triton's
    interpreter (TRITON_INTERPRET=1)."""

    anyexperts_dispatch_eps: float | None = None
    """Cap on what an expert rank may receive: ceil((1 + eps) * real slots / ranks). None or inf: no cap (dropless)."""

    anyexperts_balance: Literal["reroute", "copies", "auto"] = "reroute"
    """What keeps expert ranks equally loaded. reroute: the cap of --anyexperts-dispatch-eps alone, if there is one;
    copies: hot experts are computed on idle ranks as well, with temporary copies of their weights, which changes no
    routing; the cap, if there is one, then acts on what copies cannot carry. auto: copies where they pay
    by the cost model of `anyexperts plan`, none on a GPU that it does not know; training says at its start which."""

    anyexperts_copies_eps: float = 0.05
    """Copies bring each expert rank to at most ceil((1 + eps) * real slots / ranks), wherever their number allows."""

    anyexperts_copies_per_rank: int = 1
    """Most experts of others that a rank holds at a time, one layer's for one microbatch."""

    anyexperts_copies_min_slots: int = 1
    """Fewest slots that a copy is made for: below a number that depends on GPU and network, sending the weights costs
    more time than is saved (see docs/dispatch.md). What a rank has over the goal below that it keeps."""

    anyexperts_copies_refresh: int = 0
    """Optimizer steps for which copies keep their places, chosen from the slots of as many steps before. Their weights
    then travel once a step, and stay in memory until it ends, those of all layers. 0: anew for each microbatch."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_moe_experts is None:
            return
        if self.anyexperts_k_min is None:
            self.anyexperts_k_min = self.moe_router_topk
        if self.anyexperts_k_max is None:
            self.anyexperts_k_max = self.moe_router_topk
        if self.anyexperts_stock_moe:
            return
        self._check_ranges()
        if self.anyexperts_virtual_experts is None:
            self.anyexperts_virtual_experts = self.anyexperts_max_virtual_slots
        self._check_targets()
        self._refuse_combinations()
        if not self.anyexperts_static and self.moe_router_dtype is None:
            self.moe_router_dtype = "fp32"

    @property
    def anyexperts_max_virtual_slots(self) -> int:
        """Most virtual slots that any token can have."""
        return virtual_cap(self.anyexperts_k_max, self.anyexperts_rho_max)

    @property
    def anyexperts_static(self) -> bool:
        """Whether routing is exactly Megatron's top-k (fusion apart)."""
        return (
            self.anyexperts_k_min == self.anyexperts_k_max == self.moe_router_topk
            and not self.anyexperts_virtual_experts
        )

    @property
    def anyexperts_needs_importance(self) -> bool:
        """Whether anything reads the importance of a token."""
        return self.anyexperts_fuses or self.anyexperts_k_min < self.anyexperts_k_max

    @property
    def anyexperts_fuses(self) -> bool:
        """Whether importance is fused back into the hidden state."""
        return self.anyexperts_alpha != 0 or self.anyexperts_learn_alpha

    @property
    def anyexperts_no_kernel(self) -> str | None:
        """Why the router's kernel cannot be used, whatever `anyexperts_kernels` says; None if it can."""
        reasons = {
            "Triton is not installed": not HAS_TRITON,
            "static routing is Megatron's own": self.anyexperts_static,
            "it computes in fp32": self.moe_router_dtype == "fp64",
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _check_ranges(self) -> None:
        k_min, k_max, experts = self.anyexperts_k_min, self.anyexperts_k_max, self.num_moe_experts
        if not 1 <= k_min <= k_max <= experts:
            raise ValueError(
                f"anyexperts_k_min={k_min}, anyexperts_k_max={k_max}: need 1 <= k_min <= k_max <= "
                f"num_moe_experts={experts}"
            )
        if self.moe_router_group_topk:
            reachable = self.moe_router_group_topk * experts // self.moe_router_num_groups
            if k_max > reachable:
                raise ValueError(
                    f"anyexperts_k_max={k_max} exceeds the {reachable} experts that "
                    f"moe_router_group_topk={self.moe_router_group_topk} groups hold; lower k_max or raise group_topk"
                )
        _inside("anyexperts_rho_max", self.anyexperts_rho_max, 0, 1, high_open=True)
        _inside("anyexperts_slot_rate", self.anyexperts_slot_rate, 0, 1, low_open=True)
        _inside("anyexperts_spread_target", self.anyexperts_spread_target, 0, 0.5, low_open=True)
        for name in ("virtual_bias_rate", "budget_loss_coeff", "spread_loss_coeff"):
            _inside(f"anyexperts_{name}", getattr(self, f"anyexperts_{name}"), 0, math.inf)
        _inside("anyexperts_importance_hidden", self.anyexperts_importance_hidden, 1, math.inf)
        if not math.isfinite(self.anyexperts_alpha):
            raise ValueError(f"anyexperts_alpha={self.anyexperts_alpha} must be a finite number")
        if self.anyexperts_dispatch_eps == math.inf:
            self.anyexperts_dispatch_eps = None
        if self.anyexperts_dispatch_eps is not None:
            _inside("anyexperts_dispatch_eps", self.anyexperts_dispatch_eps, 0, math.inf)
        _inside("anyexperts_copies_eps", self.anyexperts_copies_eps, 0, math.inf, high_open=True)
        _inside("anyexperts_copies_per_rank", self.anyexperts_copies_per_rank, 1, experts)
        _inside("anyexperts_copies_min_slots", self.anyexperts_copies_min_slots, 1, math.inf)
        _inside("anyexperts_copies_refresh", self.anyexperts_copies_refresh, 0, math.inf)
        if self.anyexperts_virtual_experts is not None and (
            self.anyexperts_virtual_experts < self.anyexperts_max_virtual_slots
        ):
            raise ValueError(
                f"anyexperts_virtual_experts={self.anyexperts_virtual_experts} is fewer than the "
                f"{self.anyexperts_max_virtual_slots} virtual slots that rho_max={self.anyexperts_rho_max} allows of "
                f"k_max={k_max}; lower rho_max or k_max"
            )

    def _check_targets(self) -> None:
        k_min, k_max = self.anyexperts_k_min, self.anyexperts_k_max
        if self.anyexperts_target_slots is not None:
            _inside("anyexperts_target_slots", self.anyexperts_target_slots, k_min, k_max)
        if self.anyexperts_target_real is not None:
            if self.anyexperts_max_virtual_slots == 0:
                raise ValueError(
                    f"anyexperts_target_real={self.anyexperts_target_real} needs virtual experts, but "
                    f"floor(rho_max * k_max) = 0; raise anyexperts_rho_max or leave the target out"
                )
            low = min(k - virtual_cap(k, self.anyexperts_rho_max) for k in range(k_min, k_max + 1))
            _inside("anyexperts_target_real", self.anyexperts_target_real, low, self.anyexperts_target_slots or k_max)
        if self.anyexperts_budget_slack is not None:
            _inside("anyexperts_budget_slack", self.anyexperts_budget_slack, 1, math.inf)
        for name in ("budget_slack", "budget_loss_coeff"):
            if getattr(self, f"anyexperts_{name}") and self.anyexperts_target_slots is None:
                raise ValueError(f"anyexperts_{name} is relative to anyexperts_target_slots: set that as well")

    def _refuse_combinations(self) -> None:
        balancing = self.moe_router_load_balancing_type
        refused = {
            "moe_token_dispatcher_type other than alltoall": (
                self.moe_token_dispatcher_type != "alltoall",
                "only the alltoall exchange carries a variable number of slots",
            ),
            "moe_expert_capacity_factor": (
                self.moe_expert_capacity_factor is not None,
                "it drops slots by a fixed top-k; anyexperts_dispatch_eps caps the load without dropping",
            ),
            "moe_shared_expert_overlap": (
                self.moe_shared_expert_overlap,
                "the stock dispatcher runs the shared expert between its stages, ours does not",
            ),
            "overlap_moe_expert_parallel_comm": (
                self.overlap_moe_expert_parallel_comm,
                "it calls the layer's stages one by one, and the routing decision is handed over inside forward",
            ),
            "overlap_dispatch_backward_with_experts_wgrad": (
                self.overlap_dispatch_backward_with_experts_wgrad,
                "it hooks into the stages of the stock dispatcher",
            ),
            "cuda_graph_impl": (
                self.cuda_graph_impl != "none" and not self._graphs_spare_moe(),
                "the number of slots changes from step to step, a graph needs fixed shapes (and Megatron's of the "
                "router hands on gates and map only): use cuda_graph_modules without moe, moe_router, moe_preprocess",
            ),
            "moe_router_fusion": (
                self.moe_router_fusion and not self.anyexperts_static,
                "the fused kernel takes a fixed top-k",
            ),
            "moe_router_load_balancing_type sinkhorn or quantile_balancing": (
                any(kind in balancing for kind in ("sinkhorn", "quantile_balancing")),
                "both assign a fixed top-k per token; use aux losses or moe_router_enable_expert_bias",
            ),
            "moe_enable_routing_replay": (self.moe_enable_routing_replay, "it records a fixed top-k per token"),
            "moe_apply_probs_on_input": (self.moe_apply_probs_on_input, "it is defined for top-1 only"),
            "inference_optimized transformer_impl": (
                self.transformer_impl == "inference_optimized",
                "its router and dispatchers take a fixed top-k",
            ),
        }
        for option, (present, reason) in refused.items():
            if present:
                raise ValueError(f"{option} does not combine with dynamic expert slots: {reason}")
        for option, reason in self.against_copies().items() if self.anyexperts_balance == "copies" else ():
            raise ValueError(
                f"{option} does not combine with anyexperts_balance=copies: {reason}; use anyexperts_balance=reroute "
                "with anyexperts_dispatch_eps"
            )
        if (
            self.moe_router_score_function == "softmax"
            and not self.moe_router_pre_softmax
            and self.anyexperts_k_max == 1
        ):
            raise ValueError(
                "anyexperts_k_max=1 with softmax after the top-k gives every token the constant gate 1, so the router "
                "learns nothing; use moe_router_pre_softmax, sigmoid scores or k_max >= 2"
            )

        if self.anyexperts_importance_gradient == "centred" and self.anyexperts_slot_gradient == "none":
            raise ValueError(
                "anyexperts_importance_gradient=centred centres the gradient of the slot count, and "
                "anyexperts_slot_gradient=none has none; use fractional or straight_through"
            )
        if self.anyexperts_kernels == "on" and not HAS_TRITON:
            raise ValueError("anyexperts_kernels=on, but Triton is not installed; use auto or off")
        taught = self.anyexperts_fuses or self.anyexperts_slot_gradient != "none"
        if self.anyexperts_needs_importance and not (
            taught or self.anyexperts_budget_loss_coeff or self.anyexperts_spread_loss_coeff
        ):
            raise ValueError(
                "anyexperts_slot_gradient=none and anyexperts_alpha=0 leave the importance module without a gradient; "
                "change one of them, or add a budget or spread loss"
            )

    def against_copies(self) -> dict[str, str]:
        """Options that stand against copies of hot experts, and why."""
        refused = {
            "fp8_recipe=delayed": (
                self.fp8 and self.fp8_recipe == "delayed",
                "its scales are of steps before, when a place held another expert; other recipes scale what is there",
            ),
            "fp8_param or fp4": (
                self.fp8_param or self.fp4,
                "weights travel in the parameter dtype, and these have scales or blocks beside them",
            ),
            "delay_wgrad_compute": (
                self.delay_wgrad_compute,
                "gradients of copies go home inside the backward pass of the layer, and would be late",
            ),
            "use_transformer_engine_op_fuser": (
                self.use_transformer_engine_op_fuser,
                "the fused experts hold their weights themselves, and a copy's are handed in",
            ),
        }
        return {option: reason for option, (present, reason) in refused.items() if present}

    def _graphs_spare_moe(self) -> bool:
        names = {getattr(module, "name", module) for module in self.cuda_graph_modules or ()}
        return bool(names) and not names & {"moe", "moe_router", "moe_preprocess"}


def _inside(name: str, value: float, low: float, high: float, low_open: bool = False, high_open: bool = False) -> None:
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open or high == math.inf else "]"
        raise ValueError(f"{name}={value} lies outside {left}{low}, {high}{right}")
