"""The language of the tables: which tensors over there make which tensor here, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_anyexperts.weights.families.architecture import Architecture

PREFIX = "language_model."


@dataclass(frozen=True)
class Row:
    """One tensor here and those over there with the same numbers.

    Attributes:
        ours: name here.
        theirs: names over there with their shapes in the letters of `Architecture.dims`; none for state that exists
            here alone and starts at zero.
        join: `stack` puts the tensors below each other. `groups` puts queries, key and value of each key-value group
            together, as Megatron has them; what comes as one tensor holds all queries, all keys, all values.
        when: the architectures that have it.
        dtype: type here; None for that of the source.
    """

    ours: str
    theirs: Mapping[str, str]
    join: Literal["stack", "groups"] = "stack"
    when: Callable[[Architecture], bool] = lambda model: True
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Table:
    """The tensors of a family. In names over there ``{layer}`` and ``{expert}`` are numbers.

    Attributes:
        ends: embedding, final norm, output layer.
        attention: of each block; names here are relative to the attention layer.
        dense, mixture: of each block with a dense FFN, or with experts; relative to the MLP layer.
        expert: of each expert; relative to the experts, where they are one tensor with a leading dimension.
        prediction: of each multi-token-prediction layer, beside its block.
        copies: tensors over there that repeat another one, for each prediction layer. They must be equal, have no
            place here, and are written again on export.
        bookkeeping: regular expression of tensors over there that say nothing, such as frequencies of positions.
    """

    ends: tuple[Row, ...]
    attention: tuple[Row, ...]
    dense: tuple[Row, ...]
    mixture: tuple[Row, ...] = ()
    expert: tuple[Row, ...] = ()
    prediction: tuple[Row, ...] = ()
    copies: Mapping[str, str] | None = None
    bookkeeping: str = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


@dataclass(frozen=True)
class Mapped:
    """One box of our checkpoint and the tensors over there with the same numbers.

    Attributes:
        key, whole, offset, shape: as in `checkpoint_stream.Chunk`.
        names: tensors over there, with their shapes; none for state that exists here only and starts at zero.
        join: makes the box from those tensors.
        split: makes those tensors from the box.
        dtype: type here; None for that of the source.
    """

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    names: Mapping[str, tuple[int, ...]]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]
    dtype: torch.dtype | None = None


def mapping(table: Table, model: Architecture) -> Iterator[Mapped]:
    """Yield every box of the language model's checkpoint, neighbours in a block together."""
    for row in table.ends:
        yield from _box(row, model)
    for layer in range(model.layers):
        yield from _block(table, model, f"decoder.layers.{2 * layer}.", f"decoder.layers.{2 * layer + 1}.", layer)
    for depth in range(model.predictions):
        ours, layer = f"mtp.layers.{depth}.", model.layers + depth
        for row in table.prediction:
            yield from _box(row, model, ours, layer=layer)
        inner = f"{ours}mtp_model_layer.layers."
        yield from _block(table, model, f"{inner}0.", f"{inner}1.", layer)


def copies(table: Table, model: Architecture) -> dict[str, str]:
    """Tensors over there that repeat another one, and which."""
    return {
        name.format(layer=model.layers + depth): original
        for depth in range(model.predictions)
        for name, original in (table.copies or {}).items()
    }


def _block(table: Table, model: Architecture, attention: str, mlp: str, layer: int) -> Iterator[Mapped]:
    for row in table.attention:
        yield from _box(row, model, attention, layer=layer)
    if model.dense(layer):
        for row in table.dense:
            yield from _box(row, model, mlp, layer=layer)
        return
    for row in table.mixture:
        yield from _box(row, model, mlp, layer=layer)
    for expert in range(model.mixture.experts):
        for row in table.expert:
            yield from _box(row, model, f"{mlp}mlp.experts.experts.", layer=layer, expert=expert)


def _box(row: Row, model: Architecture, prefix: str = "", **numbers: int) -> Iterator[Mapped]:
    if not row.when(model):
        return
    key, names = f"{PREFIX}{prefix}{row.ours}", {}
    for name, letters in row.theirs.items():
        names[name.format(**numbers)] = tuple(model.dims[letter] for letter in letters.split())
    if not names:
        yield Mapped(key, (1,), (0,), (1,), {}, lambda _: torch.zeros(1), lambda _: [], row.dtype)
        return
    sizes = list(names.values())
    shape = (sum(size[0] for size in sizes), *sizes[0][1:])
    join, split = _stacked(sizes) if row.join == "stack" else _grouped(model, sizes)
    if "expert" not in numbers:
        yield Mapped(key, shape, (0,) * len(shape), shape, names, join, split, row.dtype)
        return
    whole, offset = (model.mixture.experts, *shape), (numbers["expert"], *(0 for _ in shape))
    box = (1, *shape)
    yield Mapped(
        key, whole, offset, box, names, lambda tensors: join(tensors).view(box), lambda data: split(data[0]), row.dtype
    )


Join = Callable[[Sequence[Tensor]], Tensor]
Split = Callable[[Tensor], Sequence[Tensor]]


def _stacked(sizes: Sequence[tuple[int, ...]]) -> tuple[Join, Split]:
    rows = [size[0] for size in sizes]
    return (
        lambda tensors: tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors)),
        lambda data: data.split(rows),
    )


def _grouped(model: Architecture, sizes: Sequence[tuple[int, ...]]) -> tuple[Join, Split]:
    """Rows of queries, keys and values: each on its own over there, group by group here."""
    groups, rows = model.groups, [model.dims[letter] for letter in "QKK"]
    fused, rest = len(sizes) == 1, sizes[0][1:]

    def join(tensors: Sequence[Tensor]) -> Tensor:
        parts = tensors[0].split(rows) if fused else tensors
        return torch.cat([part.reshape(groups, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)

    def split(data: Tensor) -> Sequence[Tensor]:
        parts = data.view(groups, -1, *rest).split([size // groups for size in rows], dim=1)
        apart = [part.reshape(-1, *rest) for part in parts]
        return [torch.cat(apart)] if fused else apart

    return join, split
