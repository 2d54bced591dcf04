"""A routing trace as arrays: which experts each token uses in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_anyexperts import trace_file


class NoTrace(ValueError):
    """A folder holds no routing trace."""


@dataclass(frozen=True)
class RoutingTable:
    """N tokens that are known in all of L layers.

    Attributes:
        layers: numbers of the mixture layers.
        active_LNE: bool, the experts of each token.
        top_LN: int, the expert with the highest gate, -1 without any.
        slots_LN, importance_LN: all slots, and importance.
        sample_N: number of the token's sample in `samples`.
        samples, tasks: key and task of each of P samples.
        modality_N, token_N, step_N, place_N: kind of token, its id, its step and its place in its document.
        left_out: tokens that lack a layer.
        of_tokens: tokens of the trace, those left out and those not drawn among them.
    """

    layers: tuple[int, ...]
    active_LNE: np.ndarray
    top_LN: np.ndarray
    slots_LN: np.ndarray
    importance_LN: np.ndarray
    sample_N: np.ndarray
    samples: np.ndarray
    tasks: np.ndarray
    modality_N: np.ndarray
    token_N: np.ndarray
    step_N: np.ndarray
    place_N: np.ndarray
    left_out: int = 0
    of_tokens: int = 0

    @property
    def experts(self) -> int:
        """E."""
        return self.active_LNE.shape[2]

    @cached_property
    def real_LN(self) -> np.ndarray:
        """Real slots."""
        return self.active_LNE.sum(2)

    @property
    def task_N(self) -> np.ndarray:
        """Task of each token."""
        return self.tasks[self.sample_N]

    def take(self, chosen_N: np.ndarray) -> RoutingTable:
        """Some of the tokens, by number or by mask; samples without a token left go."""
        kept, sample_N = np.unique(self.sample_N[chosen_N], return_inverse=True)
        by_token = {name: getattr(self, name)[chosen_N] for name in ("modality_N", "token_N", "step_N", "place_N")}
        by_layer = {
            name: getattr(self, name)[:, chosen_N] for name in ("active_LNE", "top_LN", "slots_LN", "importance_LN")
        }
        samples = {"sample_N": sample_N, "samples": self.samples[kept], "tasks": self.tasks[kept]}
        return replace(self, **by_token, **by_layer, **samples)


def read_trace(folder: Path, most_tokens: int = 50_000, seed: int = 0, step: int | None = None) -> RoutingTable:
    """Read a trace.

    Args:
        folder: with `tokens` and `routing` below it.
        most_tokens: of a larger trace whole samples are drawn at random, as many as have about so many tokens.
        seed: of that.
        step: read this one only.

    Raises:
        NoTrace: there is none, or it has no token.
    """
    if not trace_file.is_trace(folder):
        raise NoTrace(f"{folder} holds no routing trace; make one with anyexperts evaluate --trace")
    tokens, routing = (_read(folder, name, step) for name in ("tokens", "routing"))
    code_N, code_R = _codes(tokens, routing)
    first = np.unique(code_N, return_index=True)[1]
    code_N, tokens = code_N[first], tokens.take(pyarrow.array(first))
    names = np.array(tokens["sample"].cast(pyarrow.string()).to_pylist(), dtype=object)
    steps, of_tokens = tokens["step"].to_numpy(), len(code_N)
    if len(code_N) > most_tokens:
        kept = _draw(names, most_tokens, seed)
        code_N, tokens, names, steps = code_N[kept], tokens.filter(pyarrow.array(kept)), names[kept], steps[kept]
    whole, left_out = _layers(code_N, code_R, routing)
    if not whole.active_LNE.size:
        raise NoTrace(f"{folder}: none of {len(code_N)} tokens has a decision in every layer")
    here_N = whole.sample_N  # see `_layers`
    # The same sample at another step is read by another model.
    labels = np.array([f"{name}\0{step}" for name, step in zip(names[here_N], steps[here_N], strict=True)])
    _, one, sample_N = np.unique(labels, return_index=True, return_inverse=True)
    task_N = np.array(tokens["task"].cast(pyarrow.string()).to_pylist(), dtype=object)[here_N]
    return replace(
        whole,
        sample_N=sample_N,
        samples=names[here_N][one],
        tasks=task_N[one].astype(str),
        modality_N=np.array(tokens["modality"].cast(pyarrow.string()).to_pylist())[here_N],
        token_N=tokens["token"].to_numpy()[here_N],
        step_N=steps[here_N],
        place_N=tokens["offset"].to_numpy()[here_N],
        left_out=left_out,
        of_tokens=of_tokens,
    )


def _read(folder: Path, name: str, step: int | None) -> pyarrow.Table:
    paths = [path for path in trace_file.files_of(folder, name) if step in (None, trace_file.step_of(path))]
    parts = [pyarrow.parquet.read_table(path).cast(trace_file.TABLES[name]) for path in paths]
    return pyarrow.concat_tables(parts) if parts else trace_file.TABLES[name].empty_table()


def _codes(*tables: pyarrow.Table) -> list[np.ndarray]:
    """One number for each row, the same where `KEYS` are."""
    columns = [[table[name].to_numpy().astype(np.int64) for name in trace_file.KEYS] for table in tables]
    sizes = [max((int(column.max(initial=0)) for column in kind), default=0) + 1 for kind in zip(*columns, strict=True)]
    return [np.ravel_multi_index(each, sizes) for each in columns]


def _draw(names: np.ndarray, most_tokens: int, seed: int) -> np.ndarray:
    """Which tokens to keep: those of samples drawn at random, until there are enough."""
    _, sample_N, counts_P = np.unique(names.astype(str), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(counts_P))
    enough = np.searchsorted(np.cumsum(counts_P[order]), most_tokens) + 1
    return np.isin(sample_N, order[:enough])


def _layers(code_N: np.ndarray, code_R: np.ndarray, routing: pyarrow.Table) -> tuple[RoutingTable, int]:
    """The layers' arrays for the tokens that all layers know, whose numbers stand in `sample_N`; and how many lack."""
    place_R = np.searchsorted(code_N, code_R)
    known_R = (place_R < len(code_N)) & (code_N[np.minimum(place_R, len(code_N) - 1)] == code_R)
    layer_R = routing["layer"].to_numpy()
    numbers = np.unique(layer_R)
    experts = pyarrow.concat_arrays(routing["experts"].chunks) if routing.num_rows else None
    border_R = np.concatenate(([0], np.cumsum(routing["real"].to_numpy())))
    flat = experts.flatten().to_numpy() if experts is not None else np.zeros(0, np.int64)
    row_F = np.repeat(np.arange(len(layer_R)), np.diff(border_R))
    width = int(flat.max(initial=-1)) + 1
    shape = (len(numbers), len(code_N))
    seen_LN, active_LNE = np.zeros(shape, bool), np.zeros((*shape, width), bool)
    top_LN, slots_LN, importance_LN = np.full(shape, -1), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    index_R = np.searchsorted(numbers, layer_R)
    rows = np.flatnonzero(known_R)
    at = (index_R[rows], place_R[rows])
    seen_LN[at] = True
    slots_LN[at], importance_LN[at] = routing["slots"].to_numpy()[rows], routing["importance"].to_numpy()[rows]
    some = rows[border_R[rows + 1] > border_R[rows]]
    top_LN[index_R[some], place_R[some]] = flat[border_R[some]]
    kept_F = known_R[row_F]
    active_LNE[index_R[row_F[kept_F]], place_R[row_F[kept_F]], flat[kept_F]] = True
    whole_N = np.flatnonzero(seen_LN.all(0)) if len(numbers) else np.zeros(0, int)
    nothing = np.zeros(0)
    table = RoutingTable(
        tuple(numbers.tolist()), active_LNE[:, whole_N], top_LN[:, whole_N], slots_LN[:, whole_N],
        importance_LN[:, whole_N], whole_N, *[nothing] * 6,
    )  # fmt: skip
    return table, len(code_N) - len(whole_N)


def shared_tokens(tables: Sequence[RoutingTable]) -> list[RoutingTable]:
    """The tokens that all tables have, in one order: those of one sample, place and id.

    Raises:
        NoTrace: there is none, or the tables have other layers or experts.
    """
    if len({(table.layers, table.experts) for table in tables}) > 1:
        raise NoTrace("the traces are of models with other mixture layers or experts")
    names = [
        np.array([f"{table.samples[sample]}\0{place}\0{token}" for sample, place, token in zip(
            table.sample_N, table.place_N, table.token_N, strict=True)])
        for table in tables
    ]  # fmt: skip
    common = set(names[0]).intersection(*names[1:])
    if not common:
        raise NoTrace("the traces have no token in common; evaluate the same data with each checkpoint")
    result = []
    for table, name_N in zip(tables, names, strict=True):
        unique, first = np.unique(name_N, return_index=True)
        result.append(table.take(first[np.isin(unique, list(common))]))
    return result
