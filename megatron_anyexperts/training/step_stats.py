"""What training steps leave for the logs: losses, time, work done, waiting time and sample keys."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_anyexperts.data.faults import FaultLedger
from megatron_anyexperts.files import atomic_file
from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.training.flops import WORK
from megatron_anyexperts.training.trace import Tracer


def modality_sums(losses: torch.Tensor, loss_mask: torch.Tensor, sample_modality: torch.Tensor) -> torch.Tensor:
    """Add up losses by the kind of sample that a target belongs to.

    Args:
        losses: [B, S] fp32 loss of each position.
        loss_mask: [B, S] fp32, 1 for targets.
        sample_modality: [B, S] int8 index into `MODALITIES`, -1 for padding.

    Returns:
        [len(MODALITIES), 2] fp32: sum of losses, number of targets.
    """
    counted = (sample_modality >= 0) & (loss_mask > 0)
    # What does not count goes to one more row instead of being left out, for which the host would wait.
    kinds = sample_modality.long().masked_fill(~counted, len(MODALITIES)).flatten()
    values = torch.stack((losses.float() * loss_mask, loss_mask.float()), dim=-1).view(-1, 2)
    return losses.new_zeros(len(MODALITIES) + 1, 2, dtype=torch.float32).index_add_(0, kinds, values)[:-1]


class SampleLog:
    """Writes the keys of each step's samples, so that two runs' data order can be compared.

    Args:
        folder: directory of the log files.
        dp_rank: data-parallel rank, which names the file ``rankNNNN.jsonl``.
    """

    def __init__(self, folder: Path, dp_rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank{dp_rank:04d}.jsonl"
        self._pending: list[str] = []

    def add(self, rows: list[list[str]]) -> None:
        """Note the samples of one microbatch, by row."""
        self._pending += [key for row in rows for key in row]

    def flush(self, iteration: int) -> None:
        """Write one line for the step that is over; a full disk loses the line, not the run."""
        runlog.append(self._path, {"iteration": iteration, "keys": self._pending})
        self._pending = []


@dataclass(frozen=True)
class Interval:
    """What the steps of one log interval left, over all ranks.

    Attributes:
        losses: ``loss`` and ``loss_<modality>``, per target, where there were targets (on the last pipeline stage).
        step_losses: means over steps of what `StepStats.add_step` was given.
        seconds: time of the steps that count for throughput, on the slowest rank; 0 if none does.
        data_wait: seconds of it that the slowest rank waited for the loader.
        work: counts of `flops.WORK` in these steps.
        first_step_s: seconds of the first step after a start; None in all later intervals.
        feed: `samples_read` and `samples_lost` by the loaders, ahead of the steps.
    """

    losses: dict[str, float]
    step_losses: dict[str, float]
    seconds: float
    data_wait: float
    work: dict[str, float]
    first_step_s: float | None
    feed: dict[str, int] = field(default_factory=dict)


@dataclass
class _Sums:
    modality_loss: torch.Tensor | None = None
    step_losses: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0
    work: torch.Tensor | None = None
    first_step_s: float | None = None


@dataclass
class StepStats:
    """Accumulates over the microbatches and steps of one log interval, on one rank.

    The clock runs from a step's first microbatch to its end, not while the loop starts, evaluates or saves. The first
    step after a start fills the loader's buffers and the device's caches: it counts for losses, but not for throughput.

    Attributes:
        sample_log: takes the keys of training samples; None switches the log off.
        tracer: takes the routing of traced steps, or None.
        held_out_modalities: kinds of samples that the validation set holds, the same on all data-parallel ranks.
        ledger: counts of the training loader, on one of the ranks that read the same; None on the others.
    """

    sample_log: SampleLog | None = None
    tracer: Tracer | None = None
    held_out_modalities: tuple[str, ...] = MODALITIES
    ledger: FaultLedger | None = None
    _sums: _Sums = field(default_factory=_Sums)
    _began: float | None = None
    _warm: bool = False
    _fed: tuple[int, int] = (0, 0)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for the loader; a step's first microbatch starts its clock."""
        start = time.monotonic()
        if self._began is None:
            self._began = start
        yield
        self._sums.data_wait += time.monotonic() - start

    def add_losses(self, sums: torch.Tensor) -> None:
        """Add one microbatch's `modality_sums`."""
        before = self._sums.modality_loss
        self._sums.modality_loss = sums if before is None else before + sums

    def add_work(self, counts: torch.Tensor) -> None:
        """Add one microbatch's `flops.measure_work`."""
        before = self._sums.work
        self._sums.work = counts if before is None else before + counts

    def stop_clock(self) -> None:
        """End the step's time; called before anything that follows a step."""
        seconds = 0.0 if self._began is None else time.monotonic() - self._began
        self._began = None
        if self._warm:
            self._sums.seconds += seconds
        else:
            self._warm, self._sums.first_step_s, self._sums.data_wait, self._sums.work = True, seconds, 0.0, None

    def add_step(self, losses: dict[str, torch.Tensor]) -> None:
        """Add one step's scalar losses, which are averaged over steps and over data-parallel ranks."""
        self._sums.steps += 1
        for name, value in losses.items():
            self._sums.step_losses[name] = self._sums.step_losses.get(name, 0) + value.detach()

    def drain(self, loss_group: torch.distributed.ProcessGroup, device: torch.device) -> Interval:
        """Return the interval's figures and start the next one; a collective call over all ranks.

        Args:
            loss_group: data-parallel group over which losses and work add up.
            device: where the reduced tensors live.
        """
        sums, self._sums = self._sums, _Sums()
        modality_loss = torch.zeros(len(MODALITIES), 2) if sums.modality_loss is None else sums.modality_loss
        work = torch.zeros(len(WORK)) if sums.work is None else sums.work
        parts = [modality_loss, work, *sums.step_losses.values()]
        flat = torch.cat([part.to(device, torch.float64).flatten() for part in parts])
        torch.distributed.all_reduce(flat, group=loss_group)
        slowest = flat.new_tensor([sums.seconds, sums.data_wait])
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
        seconds, data_wait = slowest.tolist()

        fed = (self.ledger.seen, self.ledger.lost) if self.ledger else (0, 0)
        news = flat.new_tensor([now - before for now, before in zip(fed, self._fed, strict=True)])
        torch.distributed.all_reduce(news)
        self._fed = fed

        by_modality, counts, steps = flat.split([2 * len(MODALITIES), len(WORK), len(sums.step_losses)])
        totals = by_modality.view(-1, 2)
        rows = [("loss", totals.sum(0).tolist())]
        rows += [(f"loss_{name}", total) for name, total in zip(MODALITIES, totals.tolist(), strict=True)]
        summed = max(1, sums.steps) * loss_group.size()
        return Interval(
            {name: total / targets for name, (total, targets) in rows if targets},
            {name: total / summed for name, total in zip(sums.step_losses, steps.tolist(), strict=True)},
            seconds,
            data_wait,
            dict(zip(WORK, counts.tolist(), strict=True)),
            sums.first_step_s,
            dict(zip(("samples_read", "samples_lost"), map(int, news.tolist()), strict=True)),
        )


def read_sample_log(folder: Path) -> dict[int, list[str]]:
    """Return the sample keys of each iteration over all ranks, sorted, so that runs of any layout compare equal."""
    steps: dict[int, list[str]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for record in runlog.read(path):
            steps.setdefault(record["iteration"], []).extend(record["keys"])
    return {iteration: sorted(keys) for iteration, keys in sorted(steps.items())}


def forget_after(folder: Path, iteration: int) -> None:
    """Drop what the files say of steps after `iteration`: a resumed run trains them again, maybe on other ranks.

    What a crash or a full disk left unreadable is dropped too, which is said; a file that cannot be replaced keeps its
    lines, which is said as well.
    """
    for path in sorted(folder.glob("rank*.jsonl")):
        try:
            lines = path.read_bytes().splitlines()
            steps = [_step_of(line) for line in lines]
            kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= iteration]
            if len(kept) < len(lines):
                with atomic_file(path) as file:
                    file.writelines(line + b"\n" for line in kept)
        except OSError as error:
            print(f"WARNING: {path} keeps lines of steps that are trained again: {error}", file=sys.stderr)
            continue
        if torn := steps.count(None):
            print(f"WARNING: {path}: {torn} unreadable line(s) dropped", file=sys.stderr)


def _step_of(line: bytes) -> int | None:
    """Iteration of a line of a sample log; None for a line that is not whole."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, TypeError, KeyError):
        return None
