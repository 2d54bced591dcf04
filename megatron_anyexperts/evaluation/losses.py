"""Held-out losses of a trained model, by kind of sample, with standard errors over documents."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from megatron.core import mpu

from megatron_anyexperts.data.microbatch import Microbatch
from megatron_anyexperts.evaluation.held_out import forward, held_out_loader
from megatron_anyexperts.evaluation.routing_trace import traced
from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.moe import install_metrics
from megatron_anyexperts.moe.metrics import token_modality
from megatron_anyexperts.training.pretrain import transformer_config
from megatron_anyexperts.training.trace import Tracer

DocumentLoss = tuple[str, int, float, float]
"""Key, kind of sample, sum of losses in nats, number of targets."""


@dataclass(frozen=True)
class Loss:
    """Loss in nats per target, and how certain it is."""

    mean: float
    error: float
    """Standard error over documents; NaN for a single one."""
    documents: int
    targets: int


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses by kind of sample ("all" first), and mean real slots a token and layer by kind of token."""

    losses: dict[str, Loss]
    real_slots: dict[str, float]


def loss_of(documents: list[tuple[float, float]]) -> Loss:
    """The ratio estimator of the loss per target: documents are independent, tokens of one are not.

    Args:
        documents: sum of losses and number of targets of each.
    """
    total, targets = (sum(values) for values in zip(*documents, strict=True))
    mean, count = total / targets, len(documents)
    residual = math.fsum((loss - mean * number) ** 2 for loss, number in documents)
    error = math.sqrt(residual * count / (count - 1)) / targets if count > 1 else math.nan
    return Loss(mean, error, count, int(targets))


def document_losses(batch: Microbatch, losses_BS: torch.Tensor) -> list[DocumentLoss]:
    """Add up the losses of a microbatch by document; documents without a target are left out."""
    found = []
    losses_BS = losses_BS.double() * batch["loss_mask"]
    for row, keys in enumerate(batch.sample_keys):
        segments = batch["segment_ids"][row].long()
        sums = torch.zeros(len(keys) + 1, 2, dtype=torch.float64, device=segments.device)
        sums[:, 0].index_add_(0, segments, losses_BS[row])
        sums[:, 1].index_add_(0, segments, batch["loss_mask"][row].double())
        first = [int((segments == segment).int().argmax()) for segment in range(1, len(keys) + 1)]
        kinds = batch["sample_modality"][row][first].tolist()
        values = zip(keys, kinds, sums[1:].tolist(), strict=True)
        found += [(key, kind, loss, targets) for key, kind, (loss, targets) in values if targets]
    return found


def held_out_losses(
    args: argparse.Namespace, model: torch.nn.Module, microbatches: int, tracer: Tracer | None = None
) -> HeldOutLosses:
    """Losses of the first rows of the held-out set; all ranks call it together.

    Args:
        args: from `trained_model.start`.
        model: in evaluation mode.
        microbatches: most microbatches of one rank; a smaller set is read once.
        tracer: traces the routing of what counts.
    """
    tracker = install_metrics(transformer_config(args), MODALITIES)
    loader = held_out_loader(args, microbatches)
    device = torch.device(torch.cuda.current_device())
    ranks, rows = mpu.get_data_parallel_world_size(), args.micro_batch_size
    found: list[DocumentLoss] = []
    for step in range(min(microbatches, -(-loader.rows // (rows * ranks)))):
        batch = next(loader).to(device)
        # The last step may begin to repeat the set.
        start = (step * ranks + mpu.get_data_parallel_rank()) * rows
        with token_modality(batch["token_modality"]), traced(tracer, batch, max(0, loader.rows - start)):
            losses_BS = forward(model, batch)
        new = Microbatch(batch.buffer, batch.shapes, batch.sample_keys[: max(0, loader.rows - start)], batch.sizes)
        found += document_losses(new, losses_BS)
    everything: list[list[DocumentLoss]] = [[]] * ranks
    torch.distributed.all_gather_object(everything, found, group=mpu.get_data_parallel_group())
    # The pieces of a long document are one document.
    documents: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for key, kind, loss, targets in (one for part in everything for one in part):
        documents[key, kind][0] += loss
        documents[key, kind][1] += targets
    groups = {"all": list(map(tuple, documents.values()))}
    for code, name in enumerate(MODALITIES):
        if of_kind := [(loss, targets) for (_, kind), (loss, targets) in documents.items() if kind == code]:
            groups[name] = of_kind
    routing = tracker.collect("eval")
    slots = {name: routing[name]["real"] for name in MODALITIES if name in routing}
    return HeldOutLosses({name: loss_of(values) for name, values in groups.items()}, slots)


def loss_table(result: HeldOutLosses) -> str:
    """The losses as text, a line for each kind."""
    lines = [f"{'held out':12s} {'documents':>9s} {'targets':>9s} {'loss':>8s} {'+-':>7s} {'real slots':>10s}"]
    for name, loss in result.losses.items():
        slots = f"{result.real_slots[name]:10.2f}" if name in result.real_slots else f"{'-':>10s}"
        lines.append(f"{name:12s} {loss.documents:9d} {loss.targets:9d} {loss.mean:8.4f} {loss.error:7.4f} {slots}")
    return "\n".join(lines)
