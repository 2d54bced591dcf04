"""Energon's stream states as JSON: what a checkpoint holds can be read by anyone and runs no code when it is loaded.

Values that JSON lacks are objects with one key, which names their kind: `tuple`, `dict`, `flex` (Energon's open-ended
mapping), `bytes`, `tensor`, `array` and the four state classes of Energon 7.4. Nothing else is written or read.
"""

import base64
import dataclasses
import json
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

_CLASSES = {cls.__name__: cls for cls in (SavableDatasetCheckpoint, SavableDatasetState, SystemRngState, SliceState)}
_DTYPES = ("uint8", "int32", "uint32", "int64", "uint64", "float64")


def dumps(state: Any) -> bytes:
    """Return the JSON of a stream's state, ASCII.

    Raises:
        TypeError: it holds something that this module does not know, named with its place.
    """
    return json.dumps(_plain(state, "state"), separators=(",", ":")).encode("ascii")


def loads(text: bytes) -> Any:
    """Return the state that `dumps` wrote.

    Raises:
        ValueError: the text is not what `dumps` writes.
    """
    try:
        return _restored(json.loads(text))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"this is no stream state: {type(error).__name__}: {error}") from error


def _plain(value: Any, place: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": _plain(list(value), place)}
    if type(value) in (dict, FlexState):
        if odd := [key for key in value if type(key) is not str]:
            raise TypeError(f"{place} has the key {odd[0]!r}, which is no string")
        kind = "flex" if type(value) is FlexState else "dict"
        return {kind: {key: _plain(item, f"{place}.{key}") for key, item in value.items()}}
    if type(value) is bytes:
        return {"bytes": _base64(value)}
    if type(value) is torch.Tensor:
        return {"tensor": _array(value.numpy(), place)}
    if type(value) is np.ndarray:
        return {"array": _array(value, place)}
    if type(value) in _CLASSES.values():
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {type(value).__name__: {name: _plain(item, f"{place}.{name}") for name, item in fields.items()}}
    raise TypeError(f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which has no plain form")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    match kind:
        case "tuple":
            return tuple(_restored(content))
        case "dict":
            return {key: _restored(item) for key, item in content.items()}
        case "flex":
            return FlexState({key: _restored(item) for key, item in content.items()})
        case "bytes":
            return base64.b64decode(content, validate=True)
        case "tensor":
            return torch.from_numpy(_from_array(content))
        case "array":
            return _from_array(content)
    return _CLASSES[kind](**{name: _restored(item) for name, item in content.items()})


def _array(values: np.ndarray, place: str) -> dict[str, Any]:
    if values.dtype.name not in _DTYPES:
        raise TypeError(f"{place} is an array of {values.dtype}, which has no plain form")
    little = values.astype(values.dtype.newbyteorder("<"))
    return {"dtype": values.dtype.name, "shape": list(values.shape), "data": _base64(little.tobytes())}


def _from_array(content: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(_DTYPES[_DTYPES.index(content["dtype"])])
    flat = np.frombuffer(base64.b64decode(content["data"], validate=True), dtype.newbyteorder("<"))
    return flat.astype(dtype).reshape(content["shape"])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
