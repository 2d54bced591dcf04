"""What one training step leaves for the logs: loss per modality, tokens, waiting time and sample keys."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_anyexperts.files import atomic_file
from megatron_anyexperts.moe.metrics import MODALITIES
from megatron_anyexperts.survival import runlog


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
    kinds = sample_modality[counted].long()
    sums = losses.new_zeros(len(MODALITIES), 2, dtype=torch.float32)
    sums[:, 0].index_add_(0, kinds, (losses.float() * loss_mask)[counted])
    sums[:, 1].index_add_(0, kinds, loss_mask[counted].float())
    return sums


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


@dataclass
class StepStats:
    """Accumulates over the microbatches and steps of one log interval, on one rank.

    Attributes:
        sample_log: takes the keys of training samples; None switches the log off.
        held_out_modalities: kinds of samples that the validation set holds, the same on all data-parallel ranks.
    """

    sample_log: SampleLog | None = None
    held_out_modalities: tuple[str, ...] = MODALITIES
    modality_loss: torch.Tensor | None = None
    tokens: int = 0
    data_wait: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for the loader."""
        start = time.monotonic()
        yield
        self.data_wait += time.monotonic() - start

    def add_losses(self, sums: torch.Tensor) -> None:
        """Add one microbatch's `modality_sums`."""
        self.modality_loss = sums if self.modality_loss is None else self.modality_loss + sums

    def drain(self, loss_group: torch.distributed.ProcessGroup, device: torch.device) -> dict[str, float]:
        """Return the interval's figures and start the next one; a collective call over all ranks.

        Args:
            loss_group: data-parallel group over which losses and tokens add up.
            device: where the reduced tensors live.

        Returns:
            ``loss`` and ``loss_<modality>``, per target, where the interval had targets (on the last pipeline stage),
            ``tokens_per_s`` over all data-parallel ranks, and ``data_wait_share`` of the slowest rank, 0 to 1.
        """
        elapsed = max(time.monotonic() - self.started, 1e-9)
        sums = torch.zeros(len(MODALITIES), 2, device=device) if self.modality_loss is None else self.modality_loss
        flat = torch.cat([sums.reshape(-1), sums.new_tensor([self.tokens])])
        torch.distributed.all_reduce(flat, group=loss_group)
        wait = flat.new_tensor([self.data_wait / elapsed])
        torch.distributed.all_reduce(wait, op=torch.distributed.ReduceOp.MAX)
        totals = flat[:-1].reshape(-1, 2).tolist()
        self.modality_loss, self.tokens, self.data_wait, self.started = None, 0, 0.0, time.monotonic()
        rows = [("loss", [sum(column) for column in zip(*totals, strict=True)])]
        rows += [(f"loss_{name}", total) for name, total in zip(MODALITIES, totals, strict=True)]
        losses = {name: total / targets for name, (total, targets) in rows if targets}
        return {**losses, "tokens_per_s": flat[-1].item() / elapsed, "data_wait_share": wait.item()}


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
