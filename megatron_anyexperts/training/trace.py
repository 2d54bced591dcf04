"""Routing traces: which experts a fixed sample of tokens gets, at chosen steps, written aside from the step."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu

from megatron_anyexperts import trace_file
from megatron_anyexperts.data.microbatch import Microbatch
from megatron_anyexperts.media import MODALITIES, PAD
from megatron_anyexperts.moe.metrics import trace_routing
from megatron_anyexperts.moe.trace import ForwardTrace, LayerTrace
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.trace_writer import Tables, TraceWriter

_FACTS = ("tokens", "position_ids", "segment_ids", "token_modality")


def fixed_positions(seq_length: int, count: int | None) -> torch.Tensor:
    """`count` positions of a row, ascending: one at random, but always the same, from each of `count` equal parts.

    None, and a count of at least the row's length, are all positions.
    """
    if count is None or count >= seq_length:
        return torch.arange(seq_length)
    borders = np.linspace(0, seq_length, count + 1).astype(np.int64)
    return torch.from_numpy(np.random.default_rng(0).integers(borders[:-1], borders[1:]))


@dataclass
class _Pass:
    """What one microbatch left, on the device: facts [4, B, P] of the tokens, and layers."""

    positions: torch.Tensor
    facts: torch.Tensor
    layers: dict[int, LayerTrace] = field(default_factory=dict)
    keys: Sequence[Sequence[str]] = ()
    tasks: Sequence[Sequence[str]] | None = None


class Tracer:
    """Traces the forward passes of this rank.

    Args:
        writer: writes what a step left.
        every: traces the steps that this divides.
        positions: positions of each row, see `fixed_positions`.
        most_slots: real slots that a token can have.
        data_rank: data-parallel rank.
        writes_tokens: whether this rank writes the table of tokens: one of those that share its microbatches.
        step: the step that comes next.
    """

    def __init__(
        self,
        writer: TraceWriter,
        every: int,
        positions: int | None,
        most_slots: int,
        data_rank: int,
        writes_tokens: bool,
        step: int,
    ):
        self.writer, self.every, self.positions, self.most_slots = writer, every, positions, most_slots
        self.data_rank, self.writes_tokens, self.step = data_rank, writes_tokens, step
        self._fixed: dict[int, torch.Tensor] = {}
        self._passes: dict[int, _Pass] = {}
        self._begun: dict[Any, int] = {}
        self._sequences, self._parts = 0, 0

    @property
    def active(self) -> bool:
        """Whether the step under way is traced."""
        return self.step % self.every == 0 and not self.writer.full

    @property
    def waiting_tokens(self) -> int:
        """Tokens that no `end_step` or `end_part` has handed over yet."""
        return sum(each.facts[0].numel() for each in self._passes.values())

    @contextlib.contextmanager
    def microbatch(
        self,
        batch: Microbatch,
        chunk: Any = None,
        microbatches: int | None = None,
        tasks: Sequence[Sequence[str]] | None = None,
        rows: int | None = None,
    ) -> Iterator[None]:
        """Trace one microbatch's forward pass through one model chunk, which runs inside.

        Args:
            batch: what the pass reads.
            chunk: which of this rank's model chunks it is; each sees all microbatches of a step in the same order.
            microbatches: of a step. A step that is run again, as Megatron's rerun machine does, replaces what the first
                try left. None: as many as come, each run once.
            tasks: of the documents of each row. None: the folder part of their keys.
            rows: the first rows that are traced; None: all.
        """
        if not self.active:
            yield
            return
        number = self._begun.get(chunk, 0)
        self._begun[chunk] = number + 1
        number %= microbatches or number + 1
        length = batch["tokens"].shape[1]
        positions = self._fixed.setdefault(length, fixed_positions(length, self.positions))
        trace = ForwardTrace(positions, length, self.most_slots)
        with trace_routing(trace):
            yield
        if number not in self._passes:
            columns = positions.to(batch.buffer.device, non_blocking=True)
            facts = torch.stack([batch[name][:, columns].long() for name in _FACTS])
            if rows is not None:
                facts[3, rows:] = PAD
            self._passes[number] = _Pass(positions, facts, {}, batch.sample_keys, tasks)
        self._passes[number].layers |= trace.layers

    def end_step(self, iteration: int) -> None:
        """Hand over what the step that is over left; the next one begins."""
        self._hand_over(iteration, 0, None)
        self.step, self._begun = iteration + 1, {}

    def end_part(self) -> None:
        """Hand over what the microbatches since the last call left, and wait for the writer if it is behind."""
        self._sequences += self._hand_over(self.step, self._sequences, self._parts)
        self._parts += 1

    def _hand_over(self, step: int, first: int, part: int | None) -> int:
        passes, self._passes = self._passes, {}
        if passes:
            self.writer.submit(step, _tables(passes, step, self.data_rank, self.writes_tokens, first), part)
        return sum(each.facts.shape[1] for each in passes.values())


def _tables(
    passes: dict[int, _Pass], step: int, data_rank: int, with_tokens: bool, first: int
) -> Callable[[], Tables]:
    """A function that brings the tensors to the host and makes the columns of each table: for the writer's thread."""
    ready = torch.cuda.Event() if torch.cuda.is_available() else None
    if ready is not None:
        ready.record()

    def tables() -> Tables:
        if ready is not None:
            ready.synchronize()
        tokens, routing, sequence = [], [], first
        for _, each in sorted(passes.items()):
            facts = each.facts.cpu().numpy()
            if with_tokens:
                tokens.append(_token_columns(each, facts, sequence))
            routing += [_routing_columns(each, facts, sequence, *layer) for layer in sorted(each.layers.items())]
            sequence += facts.shape[1]
        both = (("tokens", tokens), ("routing", routing))
        return {name: _joined(parts, step, data_rank) for name, parts in both if parts}

    return tables


def _token_columns(each: _Pass, facts: np.ndarray, first: int) -> dict[str, np.ndarray]:
    rows, columns = np.nonzero(facts[3] != PAD)
    token, offset, segment, kind = facts[:, rows, columns]
    before = np.cumsum([0, *map(len, each.keys)])
    document = before[rows] + segment - 1
    keys = [key for row in each.keys for key in row]
    tasks = [key.partition("#")[0].rpartition("/")[0] for key in keys]  # pieces of long texts end in #part/parts
    if each.tasks is not None:
        tasks = [task for row in each.tasks for task in row]
    return {
        "sequence": first + rows,
        "position": each.positions.numpy()[columns],
        "sample": np.array(keys, dtype=object)[document],
        "task": np.array(tasks, dtype=object)[document],
        "offset": offset,
        "modality": np.array(MODALITIES, dtype=object)[kind],
        "token": token,
    }


def _routing_columns(
    each: _Pass, facts: np.ndarray, first: int, layer: int, trace: LayerTrace
) -> dict[str, np.ndarray]:
    gates, experts, virtual, importance, slots = (part.numpy() for part in trace.split())
    row, position = trace.place_N2.numpy().T
    kept = facts[3][row, np.searchsorted(each.positions.numpy(), position)] != PAD
    gates, experts = gates[kept], experts[kept]
    used = gates >= 0
    return {
        "sequence": first + row[kept],
        "position": position[kept],
        "layer": np.full(kept.sum(), layer),
        "slots": slots[kept].astype(np.int64),
        "real": used.sum(1),
        "importance": importance[kept],
        "virtual_gate": virtual[kept],
        "experts": experts[used],
        "gates": gates[used],
    }


def _joined(parts: list[dict[str, np.ndarray]], step: int, data_rank: int) -> dict[str, np.ndarray]:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    same = {"step": step, "data_rank": data_rank}
    return {name: np.full(len(columns["position"]), value) for name, value in same.items()} | columns


def open_tracer(args: argparse.Namespace, most_slots: int) -> Tracer | None:
    """The tracer of a training, which forgets what its folder says of steps that come again; collective.

    Args:
        args: Megatron's arguments, after loading.
        most_slots: see `Tracer`.
    """
    if not args.anyexperts_trace_every:
        return None
    folder = Run(Path(args.run_dir)).traces / "training"
    if args.rank == 0:
        for table in trace_file.TABLES:
            for path in trace_file.files_of(folder, table):
                if trace_file.step_of(path) > args.iteration:
                    path.unlink()
    torch.distributed.barrier()
    return Tracer(
        TraceWriter(folder, args.rank, args.anyexperts_trace_megabytes << 20),
        args.anyexperts_trace_every,
        args.anyexperts_trace_positions,
        most_slots,
        mpu.get_data_parallel_rank(),
        mpu.get_tensor_model_parallel_rank() == 0 and mpu.is_pipeline_first_stage(ignore_virtual=True),
        args.iteration + 1,
    )
