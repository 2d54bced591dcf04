"""The files of a routing trace: two tables in parquet, one of tokens and one of what each layer decided for them.

    TRACE/tokens/step-00000100-rank0000.parquet
    TRACE/routing/step-00000100-rank0000.parquet

Evaluation writes a file of each kind for every few microbatches, numbered behind the rank.

Rows of both belong together where their `KEYS` are equal: tensor- and pipeline-parallel ranks each write the layers and
positions that they hold, and one of them the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_anyexperts.files import atomic_file

_NAME = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
KEYS = {
    "step": pyarrow.int32(),
    "data_rank": pyarrow.int16(),
    "sequence": pyarrow.int32(),
    "position": pyarrow.int32(),
}
"""Optimizer steps done or under way; data-parallel rank; number of the packed row within the step; place in it."""

TABLES = {
    "tokens": pyarrow.schema(
        KEYS | {
            "sample": _NAME,  # key of the sample
            "task": _NAME,  # of an answered question; else the folder of the sample's shards
            "offset": pyarrow.int32(),  # place in its document
            "modality": _NAME,
            "token": pyarrow.int32(),
        }
    ),
    "routing": pyarrow.schema(
        KEYS | {
            "layer": pyarrow.int16(),  # from 1; layers of multi-token prediction follow those of the decoder
            "slots": pyarrow.int16(),  # real and virtual; 0 where logits or importance are not finite
            "real": pyarrow.int16(),
            "importance": pyarrow.float32(),
            "virtual_gate": pyarrow.float32(),  # summed over virtual slots
            "experts": pyarrow.list_(pyarrow.int16()),  # real ones, by descending gate
            "gates": pyarrow.list_(pyarrow.float32()),
        }
    ),
}  # fmt: skip


def path_of(folder: Path, table: str, step: int, rank: int, part: int | None = None) -> Path:
    """The file of one table, step and global rank, or a part of it."""
    name = f"step-{step:08d}-rank{rank:04d}" + ("" if part is None else f"-{part:06d}")
    return folder / table / f"{name}.parquet"


def step_of(path: Path) -> int | None:
    """The step that a file of a trace is of; None for other files."""
    found = re.fullmatch(r"step-(\d{8,})-rank\d{4,}(-\d{6,})?\.parquet", path.name)
    return int(found[1]) if found else None


def files_of(folder: Path, table: str) -> list[Path]:
    """Files of one table, by step and rank."""
    return sorted(path for path in (folder / table).glob("*.parquet") if step_of(path) is not None)


def is_trace(folder: Path) -> bool:
    """Whether there is a whole trace in a folder."""
    return all(files_of(folder, table) for table in TABLES)


def write(path: Path, table: str, columns: Mapping[str, np.ndarray]) -> int:
    """Write one file, whole or not at all; returns its bytes.

    Args:
        path: from `path_of`.
        table: one of `TABLES`.
        columns: arrays by name, of one length; lists are given as all their values in order, `real` of each row.
    """
    borders = np.concatenate(([0], np.cumsum(columns["real"]))) if "real" in columns else None
    data = pyarrow.table([_array(columns[field.name], field.type, borders) for field in TABLES[table]], TABLES[table])
    with atomic_file(path) as file:
        pyarrow.parquet.write_table(data, file, compression="zstd")
    return path.stat().st_size


def _array(values: np.ndarray, kind: pyarrow.DataType, borders: np.ndarray | None) -> pyarrow.Array:
    if pyarrow.types.is_list(kind):
        values = _array(values, kind.value_type, None)
        return pyarrow.ListArray.from_arrays(pyarrow.array(borders, pyarrow.int32()), values)
    if pyarrow.types.is_dictionary(kind):
        return pyarrow.array(values, pyarrow.string()).dictionary_encode()
    return pyarrow.array(values, kind)
