"""Hidden states around mixture layers, with the expert that each token goes to first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_anyexperts.data.microbatch import Microbatch
from megatron_anyexperts.evaluation.held_out import forward
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.metrics import trace_routing
from megatron_anyexperts.moe.trace import ForwardTrace


@dataclass
class LayerStates:
    """Of N tokens, fp32 on the host.

    Attributes:
        before_NH, behind_NH: the residual stream before and behind the transformer layer.
        routed_NH: what the mixture layer reads.
        expert_N: the real expert with the highest gate, -1 without any.
        document_N: number of the token's document.
        embeddings_EH: the router's row of each real expert.
    """

    before_NH: np.ndarray
    behind_NH: np.ndarray
    routed_NH: np.ndarray
    expert_N: np.ndarray
    document_N: np.ndarray
    embeddings_EH: np.ndarray


@dataclass
class _Seen:
    before: list[torch.Tensor] = field(default_factory=list)
    behind: list[torch.Tensor] = field(default_factory=list)
    routed: list[torch.Tensor] = field(default_factory=list)


def hidden_states(model: torch.nn.Module, batches: Iterable[Microbatch], most_tokens: int) -> dict[int, LayerStates]:
    """Read hidden states of all mixture layers, by layer number.

    Args:
        model: in evaluation mode, whole on this rank up to expert parallelism.
        batches: on the model's device.
        most_tokens: tokens that are kept, the first ones that are no padding; every batch is run.
    """
    parents = {
        module.mlp.layer_number: module
        for module in model.modules()
        if isinstance(getattr(module, "mlp", None), AnyExpertsMoELayer)
    }
    seen = {number: _Seen() for number in parents}
    experts: dict[int, list[np.ndarray]] = {number: [] for number in parents}
    documents: list[torch.Tensor] = []
    first = 0
    for batch in batches:
        length = batch["tokens"].shape[1]
        trace = ForwardTrace(torch.arange(length), length, 1)
        with _hooked(parents, seen), trace_routing(trace):
            forward(model, batch)
        kept_SB = batch["token_modality"].T.reshape(-1) >= 0
        rows_SB = torch.arange(batch["tokens"].shape[0], device=kept_SB.device) * (length + 1)
        numbers_SB = (batch["segment_ids"].T + rows_SB + first).reshape(-1)
        first += int(rows_SB[-1]) + length + 1
        documents.append(numbers_SB[kept_SB].cpu())
        for number, each in seen.items():
            gates_NK, experts_NK, *_ = trace.layers[number].split()
            top_N = torch.where(gates_NK[:, 0] >= 0, experts_NK[:, 0], -1)
            experts[number].append(top_N[kept_SB.cpu()].numpy())
            for name in ("before", "behind", "routed"):
                states = getattr(each, name)
                states[-1] = states[-1].flatten(0, 1)[kept_SB].float().cpu()
    return {
        number: LayerStates(
            *(torch.cat(getattr(each, name))[:most_tokens].numpy() for name in ("before", "behind", "routed")),
            np.concatenate(experts[number])[:most_tokens],
            np.unique(torch.cat(documents)[:most_tokens].numpy(), return_inverse=True)[1],
            parents[number].mlp.router.weight.detach().float().cpu().numpy(),
        )
        for number, each in seen.items()
    }


@contextlib.contextmanager
def _hooked(parents: dict[int, torch.nn.Module], seen: dict[int, _Seen]) -> Iterator[None]:
    """Let the layers add what they read and return."""

    def around(number: int):
        def hook(_: torch.nn.Module, words: tuple, named: dict[str, Any], output: Any) -> None:
            seen[number].before.append(named["hidden_states"] if "hidden_states" in named else words[0])
            seen[number].behind.append(output[0] if isinstance(output, tuple) else output)

        return hook

    def inside(number: int):
        def hook(_: torch.nn.Module, words: tuple, named: dict[str, Any]) -> None:
            seen[number].routed.append(words[0] if words else named["hidden_states"])

        return hook

    handles = []
    for number, parent in parents.items():
        handles.append(parent.register_forward_hook(around(number), with_kwargs=True))
        handles.append(parent.mlp.register_forward_pre_hook(inside(number), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
