"""What routing does, per layer and per modality: added up in the layers, reduced and logged once per log interval.

`token_modality` says which kinds of tokens a forward pass holds; layers record only inside it. Recomputation in the
backward pass runs outside, so nothing counts twice. `record_tokens` keeps single tokens, for pictures;
`trace_routing` keeps the experts of chosen ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from torch import Tensor

from megatron_anyexperts.moe.summary import console_line, scalars, write_histograms
from megatron_anyexperts.moe.tally import Tally

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig
    from megatron_anyexperts.moe.decision import RoutingDecision
    from megatron_anyexperts.moe.dispatcher import LoadReport
    from megatron_anyexperts.moe.trace import ForwardTrace

@dataclass
class TokenRecord:
    """What one mixture layer decided for each token of one forward pass, on the CPU.

    Attributes:
        importance_SB: fp32.
        slots_SB: int64, real and virtual slots.
        real_SB: int64, real slots.
    """

    importance_SB: Tensor
    slots_SB: Tensor
    real_SB: Tensor


@dataclass
class _Observers:
    kinds_BS: Tensor | None = None
    tokens: dict[int, list[TokenRecord]] | None = field(default=None)
    trace: ForwardTrace | None = None


_OBSERVERS = _Observers()


@contextmanager
def token_modality(kinds_BS: Tensor) -> Iterator[None]:
    """Record the routing of the forward passes inside, split by modality.

    Args:
        kinds_BS: int8 [B, S] of this context-parallel rank; index into the modalities of the tracker, -1 for padding.
    """
    before, _OBSERVERS.kinds_BS = _OBSERVERS.kinds_BS, kinds_BS
    try:
        yield
    finally:
        _OBSERVERS.kinds_BS = before


@contextmanager
def record_tokens() -> Iterator[dict[int, list[TokenRecord]]]:
    """Keep importance and slots of every token of the forward passes inside.

    Yields:
        One list per layer number, 1-based, with one `TokenRecord` per forward pass: the local sequence shard under
        sequence parallelism, the local stage's layers under pipeline parallelism.
    """
    before, _OBSERVERS.tokens = _OBSERVERS.tokens, {}
    try:
        yield _OBSERVERS.tokens
    finally:
        _OBSERVERS.tokens = before


@contextmanager
def trace_routing(trace: ForwardTrace) -> Iterator[None]:
    """Let the mixture layers of the forward pass inside add to `trace`; recomputation outside adds nothing."""
    before, _OBSERVERS.trace = _OBSERVERS.trace, trace
    try:
        yield
    finally:
        _OBSERVERS.trace = before


@torch.no_grad()
def observe(
    layer_number: int,
    decision: RoutingDecision,
    load: LoadReport,
    shape: tuple[int, int],
    tp_rank: int,
    training: bool,
) -> None:
    """Record one layer's decision if anyone asked for it.

    Args:
        layer_number: 1-based.
        decision: the router's decision on the local tokens.
        load: the dispatcher's report.
        shape: S, B of the local tokens.
        tp_rank: which part of the sequence this rank holds when it holds a part.
        training: which of the two tallies, training or evaluation, to add to.
    """
    if _OBSERVERS.tokens is not None:
        record = TokenRecord(
            decision.importance_T.view(shape).cpu(),
            decision.slots_T.view(shape).cpu(),
            decision.routing_map_TE.sum(1).view(shape).cpu(),
        )
        _OBSERVERS.tokens.setdefault(layer_number, []).append(record)
    if _OBSERVERS.trace is not None:
        _OBSERVERS.trace.add(layer_number, decision, shape, tp_rank)
    tracker = get_moe_metrics_tracker()
    if _OBSERVERS.kinds_BS is not None and isinstance(tracker, RoutingTracker):
        kinds_T = local_positions(_OBSERVERS.kinds_BS, shape[0], tp_rank).reshape(-1)
        tracker.tallies["train" if training else "eval"].add(layer_number, kinds_T, decision, load)


def local_positions(values_BS: Tensor, seq_length: int, tp_rank: int) -> Tensor:
    """Return the [S, B] values of this rank's part of the sequence, of per-token values [B, S or S * tp]."""
    values_SB = values_BS.transpose(0, 1)
    if values_SB.shape[0] == seq_length:
        return values_SB
    return values_SB[tp_rank * seq_length : (tp_rank + 1) * seq_length]


class RoutingTracker(MoEMetricsTracker):
    """Megatron's tracker of router losses, plus the breakdown of slots, importance and load.

    Megatron's loop calls `report` after every step on all ranks. Router losses go to TensorBoard and W&B each time, as
    in Megatron; the breakdown goes there and to the console once per log interval, over all steps of the interval.

    Args:
        config: sizes are taken from it, so that ranks without mixture layers reduce the same shapes.
        modalities: names of the kinds of tokens, in the order of their codes in `token_modality`.
        log_interval: steps over which the breakdown is added up.
    """

    def __init__(self, config: AnyExpertsConfig, modalities: tuple[str, ...] = ("text",), log_interval: int = 1):
        super().__init__()
        self.log_interval = log_interval
        self.num_layers = config.num_layers + (config.mtp_num_layers or 0)
        device = torch.cuda.current_device()
        sizes = (modalities, self.num_layers, config.anyexperts_k_max or 0, config.num_moe_experts or 0, device)
        kernels = config.anyexperts_kernels
        self.tallies = {"train": Tally(*sizes, kernels), "eval": Tally(*sizes, kernels)}
        self.extra_losses = [
            name
            for name, coeff in (
                ("slot_budget_loss", config.anyexperts_budget_loss_coeff),
                ("importance_spread_loss", config.anyexperts_spread_loss_coeff),
            )
            if coeff
        ]
        self._last: dict[str, Any] | None = None

    def ensure_initialized(self, name: str, num_layers: int, device=None) -> None:
        """Create a metric with one entry per layer of the model.

        Megatron 0.19 passes the number of mixture layers of a hybrid model here but records by layer number, so a
        pipeline stage without mixture layers would reduce another shape.
        """
        super().ensure_initialized(name, self.num_layers, device)

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer=None,
        wandb_writer=None,
        per_layer_logging: bool = False,
        force_initialize: bool = False,
        track_names: str | list[str] | None = None,
        **others: Any,
    ) -> str:
        """Log and clear router losses and, where an interval ends, the breakdown; collective.

        See `MoEMetricsTracker.report`; an interval ends where `log_interval` divides `iteration`.
        """
        if track_names is not None:
            names = [track_names] if isinstance(track_names, str) else track_names
            track_names = [*names, *self.extra_losses]
        line = super().report(
            loss_scale, iteration, writer, wandb_writer, per_layer_logging, force_initialize, track_names, **others
        )
        if iteration % self.log_interval:
            return line
        self._last = self.collect("train")
        for name, value in scalars(self._last, per_layer_logging).items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
            if wandb_writer is not None:
                wandb_writer.log({name: value}, iteration)
        if writer is not None:
            write_histograms(writer, self._last, iteration)
        return line + console_line(self._last)

    def collect(self, tally: str) -> dict[str, Any]:
        """Return the summary of "train" or "eval" since the last call, over all ranks, and clear it; collective."""
        groups = [parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            groups.append(parallel_state.get_pipeline_model_parallel_group())
        return self.tallies[tally].drain(groups)

    def snapshot(self) -> dict[str, Any] | None:
        """Return the training breakdown that the last `report` logged, as plain numbers for JSON; None before it."""
        return self._last


def install_metrics(
    config: AnyExpertsConfig, modalities: tuple[str, ...] = ("text",), log_interval: int = 1
) -> RoutingTracker:
    """Make a `RoutingTracker` the tracker that Megatron's loop reports; call on every rank before training.

    Args:
        config, modalities, log_interval: see `RoutingTracker`.
    """
    tracker = RoutingTracker(config, modalities, log_interval)
    set_moe_metrics_tracker(tracker)
    return tracker
