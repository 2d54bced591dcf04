"""Writes and reads distributed checkpoints one tensor at a time, in one process and without a model.

The files are torch.distributed.checkpoint's, with the state that Megatron keeps beside the tensors; Megatron loads them
in any parallel layout, because a chunk says where it lies in the whole tensor.
"""

from __future__ import annotations

import io
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_anyexperts.platform import torch_checkpoint
from megatron_anyexperts.survival.manifest import RELEASE, TRACKER, seal, tracked_checkpoint, verify
from megatron_anyexperts.survival.signing import UnusableKey, signing_key
from megatron_anyexperts.training import identity
from megatron_anyexperts.training.arguments import UsageError

_COMMON = ShardedObject("common_state", None, (1,), (0,)).unique_key
"""Where Megatron-Core 0.19 keeps what is not a tensor."""


@dataclass(frozen=True)
class Chunk:
    """A box of one tensor of a checkpoint.

    Attributes:
        key: name of the tensor.
        whole: shape of the tensor.
        offset: where the box begins, per dimension.
        shape: size of the box.
        dtype: stored type.
        make: returns the data; called once, when it is written.
    """

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def module_states(key: str, whole: tuple[int, ...], offset: tuple[int, ...]) -> list[str]:
    """Names of the states that the module of a weight has beside it: FP8 scaling factors, empty without FP8.

    Megatron refuses a checkpoint that lacks one of them; spare ones are ignored, so the names of both specs, local and
    Transformer Engine, are listed.
    """
    module, _, name = key.rpartition(".")
    if module.endswith(".embedding.word_embeddings"):  # a tied output layer has no weight, but a state
        module = f"{module.removesuffix('embedding.word_embeddings')}output_layer"
        return [ShardedObject(f"{module}._extra_state", None, (1,), (0,)).unique_key]
    if name not in ("weight", "layer_norm_weight") or module.endswith(".router"):
        return []
    modules = [module]
    parent, _, last = module.rpartition(".")
    if last in ("linear_qkv", "linear_kv_up_proj"):
        modules.append(f"{parent}.core_attention")
    stacked = len(whole) == 3  # experts
    box = ((whole[0],), (offset[0],)) if stacked else ((1,), (0,))
    return [ShardedObject(f"{module}._extra_state", None, *box).unique_key for module in modules]


class _Planner(dcp.DefaultSavePlanner):
    """Plans from shapes alone and makes each chunk when its turn to be written has come."""

    def __init__(self, chunks: Iterable[Chunk], args: Namespace):
        super().__init__(flatten_state_dict=False)
        self._common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
        self._chunks = {(chunk.key, torch.Size(chunk.offset)): chunk for chunk in chunks}

    def create_local_plan(self) -> SavePlan:
        names = {_COMMON: None} | dict.fromkeys(
            name for chunk in self._chunks.values() for name in module_states(chunk.key, chunk.whole, chunk.offset)
        )
        objects = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in names]
        self.plan = SavePlan([*objects, *map(self._item, self._chunks.values())])
        return self.plan

    @staticmethod
    def _item(chunk: Chunk) -> WriteItem:
        offset = torch.Size(chunk.offset)
        box = ChunkStorageMetadata(offset, torch.Size(chunk.shape))
        data = TensorWriteData(box, TensorProperties(dtype=chunk.dtype), torch.Size(chunk.whole))
        return WriteItem(MetadataIndex(chunk.key, offset), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            common = write_item.index.fqn == _COMMON
            stream = io.BytesIO()
            torch.save([self._common if common else None], stream)
            return stream
        chunk = self._chunks[write_item.index.fqn, write_item.index.offset]
        data = chunk.make()
        if data.shape != torch.Size(chunk.shape) or data.dtype != chunk.dtype:
            raise ValueError(
                f"{chunk.key}: made {data.dtype} {tuple(data.shape)}, planned {chunk.dtype} {tuple(chunk.shape)}"
            )
        return data.detach().contiguous()


def write_release(
    folder: Path,
    chunks: Iterable[Chunk],
    pattern: str,
    hidden: int,
    heads: int,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a sealed checkpoint of weights without training state, and Megatron's pointer to it.

    Args:
        folder: what `--load` will name; must hold no checkpoint yet.
        chunks: cover each tensor exactly once.
        pattern: `--hybrid-layer-pattern` of the model.
        hidden: its hidden size.
        heads: its attention heads.
        settings: what it says of the flags that the weights belong to, see `identity`; None: nothing.

    Returns:
        the directory with the tensors.

    Raises:
        UsageError: there is a checkpoint already.
    """
    tracker = folder / TRACKER
    if tracker.exists() or (folder / RELEASE).exists():
        raise UsageError(f"{folder} holds a checkpoint already; name a new directory with --save")
    target = folder / RELEASE
    target.mkdir(parents=True)
    # What Megatron compares with the model it loads into; without a pattern it takes the checkpoint for a GPTModel's.
    layers = len(pattern.split("/")[0].replace("|", ""))
    args = Namespace(hybrid_layer_pattern=pattern, num_layers=layers, hidden_size=hidden, num_attention_heads=heads)
    writer = dcp.FileSystemWriter(target, thread_count=1)
    dcp.save({}, storage_writer=writer, planner=_Planner(chunks, args), no_dist=True)
    (target / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    if settings is not None:
        identity.write(target, settings)
    seal(target)
    tracker.write_text(RELEASE)
    return target


class _Into:
    """The part of a load planner that receives tensors: copies them into one destination."""

    def __init__(self, destination: Tensor):
        self._destination = destination

    def resolve_tensor(self, read_item) -> Tensor:
        view = self._destination
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item, tensor: Tensor) -> None:
        """Nothing to do: the view wrote through."""


class CheckpointReader:
    """Tensors of the newest checkpoint of a directory; only what is asked for is read.

    Args:
        folder: what `--load` names.

    Attributes:
        tensors: shape and dtype by key; optimizer states are left out.

    Raises:
        UsageError: there is no distributed checkpoint.
    """

    def __init__(self, folder: Path):
        try:
            path = tracked_checkpoint(folder)
        except OSError as error:
            raise UsageError(f"no checkpoint in {folder}: {TRACKER} cannot be read") from error
        if not (path / ".metadata").exists():
            raise UsageError(f"{path} is no torch_dist checkpoint; save with --ckpt-format torch_dist")
        torch_checkpoint.install()
        try:
            if signing_key() is not None and (problems := verify(path)):
                raise UsageError(f"{folder}: {path.name} may not be loaded: {problems[0]}")
        except UnusableKey as error:
            raise UsageError(str(error)) from error
        self._reader = dcp.FileSystemReader(path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(("optimizer.", "chained_"))
        }

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored type of a tensor."""
        return self.tensors[key].properties.dtype

    def read(self, key: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read a box of a tensor, or all of it."""
        entry = self.tensors[key]
        offset = torch.Size(offset or [0] * len(entry.size))
        box = ChunkStorageMetadata(offset, torch.Size(shape or entry.size))
        result = torch.empty(box.sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(key, entry, [box])
        self._reader.read_data(LoadPlan(items), _Into(result)).wait()
        return result
