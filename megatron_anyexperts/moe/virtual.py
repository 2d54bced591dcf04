"""What stands behind a virtual slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig


class VirtualExpert(MegatronModule):
    """Adds a token's virtual slots, computed where the token is: they never cross the network.

    Kinds: "identity" returns the layer's input, "zero" nothing, "constant" one learned vector per layer. The paper
    says only that no FFN is behind a virtual slot; the kinds are those of MoE++ (arXiv 2410.07348).
    """

    def __init__(self, config: AnyExpertsConfig):
        super().__init__(config)
        self.kind = config.anyexperts_virtual_kind
        if self.kind == "constant":
            self.vector = torch.nn.Parameter(
                torch.zeros(config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            self.vector.sequence_parallel = config.sequence_parallel

    def forward(self, output_TH: Tensor, hidden_TH: Tensor, gate_T: Tensor) -> Tensor:
        """Return output + gate * Virtual(hidden).

        Args:
            output_TH: sum over the real slots.
            hidden_TH: the layer's fused input h'.
            gate_T: summed gates of the virtual slots, any float dtype.
        """
        if self.kind == "zero":
            return output_TH
        gate_T1 = gate_T.to(output_TH.dtype).unsqueeze(1)
        return torch.addcmul(output_TH, gate_T1, hidden_TH if self.kind == "identity" else self.vector)
