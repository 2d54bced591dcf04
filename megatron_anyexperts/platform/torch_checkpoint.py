"""Makes torch's reading of distributed checkpoints run no code of theirs, on CPU and on GPU alike.

torch 2.15 unpickles a checkpoint's `.metadata`, and the objects that lie beside its tensors, without a restriction, and
Megatron-Core 0.19 reads through torch.
"""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint._nested_dict import set_element

from megatron_anyexperts.platform.seams import replace

_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "StorageMeta", "MetadataIndex", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path"},
    "pathlib._local": {"PosixPath", "Path"},
}
"""All that torch and Megatron write into `.metadata`, dtypes apart; none of it does anything when it is made."""


class UntrustedCheckpoint(pickle.UnpicklingError):
    """A checkpoint would run code when it is loaded; the message names what it asks for."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise UntrustedCheckpoint(
            f"the checkpoint's .metadata asks for {module}.{name}, which none needs: it is not what torch and Megatron "
            "write, and is not loaded"
        )


def load_metadata(file: io.BufferedIOBase) -> Any:
    """Unpickle a `.metadata`.

    Raises:
        UntrustedCheckpoint: it asks for anything that torch and Megatron do not put there.
    """
    return _MetadataUnpickler(file).load()


def _load_bytes(self: default_planner.DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
    # Plain data, tensors and the classes that Megatron registers as safe.
    loaded = torch.load(value, weights_only=True)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)
    else:
        self.state_dict[read_item.dest_index.fqn] = loaded


def install() -> None:
    """Restrict what a checkpoint may ask for; repeated calls are harmless."""
    replace(filesystem.__name__, "pickle", SimpleNamespace(load=load_metadata, dump=pickle.dump))
    replace(default_planner.__name__, "DefaultLoadPlanner.load_bytes", _load_bytes)
