"""What the router hands to the dispatcher and to the layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RoutingDecision:
    """Where the slots of T local tokens go among E real experts.

    Attributes:
        gates_TE: router dtype; combine weight of each real slot, 0 elsewhere; differentiable.
        routing_map_TE: bool; real slots.
        virtual_gate_T: router dtype; summed gates of the token's virtual slots; differentiable. None without virtual
            experts.
        importance_T: fp32 in (0, 1), detached; 0.5 for tokens that are not finite.
        slots_T: int64; real and virtual slots of the token; 0 for padding and for tokens that are not finite.
        fallback_gates_TE: gates that eligible real experts without a slot would get, 0 elsewhere; differentiable.
            None when the dispatch cap is off.
        eligible_TE: bool; real experts that a slot may move to, whatever its gate there. None when the cap is off.
        nonfinite_T: bool; tokens whose logits or importance are NaN or Inf. None: all are known to be finite.
    """

    gates_TE: Tensor
    routing_map_TE: Tensor
    virtual_gate_T: Tensor | None
    importance_T: Tensor
    slots_T: Tensor
    fallback_gates_TE: Tensor | None
    eligible_TE: Tensor | None = None
    nonfinite_T: Tensor | None = None
