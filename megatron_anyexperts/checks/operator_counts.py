"""Counts what a GPU would be asked to do, on any device: operators launched, and times that the host waits.

A tensor is of the *host* when it is made without a device or on "cpu" by that name, copied there, or computed from such
tensors only, inside `count_operators`; any other stands for one on a GPU, wherever it lies. An operator on a GPU counts
as one launch unless it only makes a view; it may need more than one kernel, so the numbers are for comparison.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_NO_LAUNCH = {
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size", "_has_compatible_shallow_copy_type", "detach"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "alias"),
    *("view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "as_strided", "split"),
    *("split_with_sizes", "unbind", "unfold", "chunk", "diagonal", "view_as_complex", "view_as_real", "set"),
}
_WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "unique_dim", "unique_dim_consecutive"),
    *("_unique", "_unique2", "bincount", "equal", "is_nonzero", "masked_scatter_backward"),
}
_TO_HOST = {"cpu", "tolist", "numpy", "__array__"}
_MAKERS = {
    *("tensor", "as_tensor", "from_numpy", "frombuffer", "zeros", "ones", "full", "empty", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "randperm", "scalar_tensor"),
}


@dataclass
class OperatorCounts:
    """What was counted.

    Attributes:
        launches: number of launches by operator.
        waits: number of waits by operator and place, ``file:line`` of the innermost frame in Megatron or here.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)

    def waits_in(self, package: str) -> int:
        """Waits whose place begins with a package's name."""
        return sum(number for (_, place), number in self.waits.items() if place.startswith(package))


@contextmanager
def count_operators() -> Iterator[OperatorCounts]:
    """Count what happens inside, backward passes among it."""
    counts = OperatorCounts()
    with _Functions(counts, _HOST), _Operators(counts, _HOST):
        yield counts


class _HostTensors:
    """Tensors of the host."""

    def __init__(self) -> None:
        self._tensors = WeakTensorKeyDictionary()
        self.making = False

    def add(self, values: Any) -> None:
        self._tensors.update((tensor, True) for tensor in _tensors(values))

    def remove(self, tensor: torch.Tensor) -> None:
        self._tensors.pop(tensor, None)

    def own(self, values: Any) -> bool:
        """Whether there are tensors among the values, and all of them are the host's."""
        tensors = _tensors(values)
        return bool(tensors) and all(tensor in self._tensors for tensor in tensors)


_HOST = _HostTensors()


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class _Functions(TorchFunctionMode):
    """Sees what reaches no operator on a CPU: copies between host and device, and what is made without a device."""

    def __init__(self, counts: OperatorCounts, host: _HostTensors) -> None:
        super().__init__()
        self.counts, self.host = counts, host

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        on_host = self.host.own((args, kwargs))
        if name == "to" and (target := _device_of(args[1:], kwargs)) is not None:
            return self._move(function(*args, **kwargs), target, on_host, kwargs.get("non_blocking", False))
        if name in _TO_HOST and not on_host:
            self.counts.waits[(name, _place())] += 1
        new = name in _MAKERS and not _tensors((args, kwargs))
        made = new and kwargs.get("device") in (None, "cpu")
        if name == "new_tensor" or new and not made and name.endswith("tensor"):
            self.counts.waits[(name, _place())] += 1  # values of the host, copied while it waits
        before, self.host.making = self.host.making, self.host.making or made
        try:
            result = function(*args, **kwargs)
        finally:
            self.host.making = before
        if name == "cpu" and not on_host:
            result = result.view_as(result)
        if made or on_host or name == "cpu":
            self.host.add(result)
        return result

    def _move(self, result: torch.Tensor, target: Any, on_host: bool, without_waiting: bool) -> torch.Tensor:
        # A copy to "cpu", by that name, is a copy to the host; one to a device object is a copy to the GPU.
        to_host = target == "cpu" and isinstance(target, str)
        if to_host != on_host and (to_host or not without_waiting):
            self.counts.waits[("to", _place())] += 1
        result = result.view_as(result)  # on a CPU both ends are one tensor
        (self.host.add if to_host else self.host.remove)(result)
        return result


def _device_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    for value in (*args[:1], kwargs.get("device")):
        if isinstance(value, torch.device | str):
            return value
    return None


class _Operators(TorchDispatchMode):
    """Sees every operator, those of backward passes too."""

    def __init__(self, counts: OperatorCounts, host: _HostTensors) -> None:
        super().__init__()
        self.counts, self.host = counts, host

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self.host.making or self.host.own((args, kwargs)):
            self.host.add(result)
            return result
        name = function._schema.name.split("::")[1]
        base = name if name.startswith("_") else name.rstrip("_")
        if _waits(base, function._overloadname, args, kwargs):
            self.counts.waits[(base, _place())] += 1
        if base not in _NO_LAUNCH:
            self.counts.launches[base] += 1
        return result


def _waits(name: str, overload: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "_index_put_impl"):
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    if name == "repeat_interleave":
        return overload == "Tensor" and kwargs.get("output_size") is None
    return name in _WAITS


def _place() -> str:
    """``file:line`` from ``megatron...`` on of the innermost frame there; autograd where there is none."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename.replace("\\", "/")
        if path == __file__ or path.endswith("platform/cpu.py"):
            continue
        for package in ("/megatron_anyexperts/", "/megatron/"):
            if package in path:
                return f"{package[1:-1]}/{path.rsplit(package, 1)[1]}:{frame.lineno}"
    return "autograd"
