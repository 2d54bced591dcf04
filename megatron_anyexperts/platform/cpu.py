"""Lets Megatron-Core 0.19 and its training loop run on CPU with gloo.

`bridge()` applies the table `BRIDGES` once and only where CUDA is absent: on a GPU machine it returns at once and
nothing below is reached. `torch.cuda.is_available()` stays false, because torch's own optimizers and dynamo would
look for a driver otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bridge:
    """One attribute that is replaced without CUDA.

    Args:
        module: dotted name of the module that holds the attribute.
        attribute: attribute path inside it, such as ``Tensor.cuda``.
        replace: gets the original (None if absent) and returns the replacement.
        reason: who needs it.
        training_only: needed by `megatron.training` alone, not by Megatron-Core.
    """

    module: str
    attribute: str
    replace: Callable[[Any], Any]
    reason: str
    training_only: bool = False

    def apply(self) -> None:
        """Replace the attribute in place."""
        *path, name = self.attribute.split(".")
        owner = functools.reduce(getattr, path, importlib.import_module(self.module))
        setattr(owner, name, self.replace(getattr(owner, name, None)))


class _Stream:
    """Stands for the one implicit stream of a CPU; every wait is already over."""

    cuda_stream = 0

    def __init__(self, *_, **__):
        self.device = CPU

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def wait_stream(self, _stream):
        """Nothing runs ahead on a CPU."""

    def wait_event(self, _event):
        """Nothing runs ahead on a CPU."""

    def synchronize(self):
        """Nothing runs ahead on a CPU."""

    def record_event(self, event=None):
        """Return an event that has already happened."""
        return event or _Event()


class _Event:
    """An event that has happened as soon as it is recorded."""

    def __init__(self, *_, **__):
        pass

    def record(self, _stream=None):
        """Nothing runs ahead on a CPU."""

    def wait(self, _stream=None):
        """Nothing runs ahead on a CPU."""

    def synchronize(self):
        """Nothing runs ahead on a CPU."""

    def query(self):
        """Always happened."""
        return True


def _value(result: Any) -> Callable[[Any], Any]:
    """Replace a function by one that ignores its arguments and returns `result`."""
    return lambda _original: lambda *_, **__: result


def _object(replacement: Any) -> Callable[[Any], Any]:
    return lambda _original: replacement


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _factory_on_cpu(original: Callable) -> Callable:
    """Send a tensor factory's ``device="cuda"`` to the CPU."""

    @functools.wraps(original)
    def factory(*args, **kwargs):
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(*args, **kwargs)

    return factory


def _to_on_cpu(original: Callable) -> Callable:
    @functools.wraps(original)
    def to(self, *args, **kwargs):
        args = tuple(CPU if _names_cuda(arg) else arg for arg in args)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _cuda_type_names(original: Callable) -> Callable:
    @functools.wraps(original)
    def type_(self, dtype=None, **kwargs):
        result = original(self, dtype, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if dtype is None else result

    return type_


def _quiet_rng_fork(original: Callable) -> Callable:
    """Drop one warning that is always true, and harmless, where both generators are the same one."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    return original


def _splits_as_lists(original: Callable) -> Callable:
    @functools.wraps(original)
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        splits = (s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes))
        return original(output, input, *splits, **kwargs)

    return all_to_all_single


def _no_dynamo(_original: Any) -> bool:
    return True


def _barrier_only(_original: Callable) -> Callable:
    return lambda: torch.distributed.barrier()


_RNG = "random numbers: CPU and 'device' share torch's one CPU generator"
_STREAMS = "streams and events order GPU work; a CPU runs in program order"
_MEMORY = "device memory accounting is logged and freed unconditionally"
_FACTORY = "Megatron names device='cuda' in factory calls"
_FACTORIES = [
    "arange",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
]

BRIDGES: tuple[Bridge, ...] = (
    Bridge("torch.cuda", "current_device", _value(CPU), "used as device= in factories and .to()"),
    Bridge("torch.cuda", "set_device", _value(None), "selects the local rank's GPU"),
    Bridge(
        "torch.cuda",
        "get_device_properties",
        _value(SimpleNamespace(major=0, minor=0, name="cpu")),
        "tensor parallelism looks up the device's architecture",
    ),
    Bridge("torch.cuda", "synchronize", _value(None), _STREAMS),
    Bridge("torch.cuda", "Stream", _object(_Stream), _STREAMS),
    Bridge("torch.cuda", "Event", _object(_Event), _STREAMS),
    Bridge("torch.cuda", "current_stream", _value(_Stream()), _STREAMS),
    Bridge("torch.cuda", "default_stream", _value(_Stream()), _STREAMS),
    Bridge("torch.cuda", "set_stream", _value(None), _STREAMS),
    Bridge("torch.cuda", "stream", _object(lambda _stream: contextlib.nullcontext()), _STREAMS),
    Bridge(
        "torch.cuda",
        "is_current_stream_capturing",
        _value(False),
        "CUDA graph capture is asked for in the schedules",
    ),
    Bridge("torch.cuda.nvtx", "range_push", _value(0), "profiler ranges"),
    Bridge("torch.cuda.nvtx", "range_pop", _value(0), "profiler ranges"),
    Bridge("torch.cuda", "empty_cache", _value(None), _MEMORY),
    Bridge("torch.cuda", "memory_allocated", _value(0), _MEMORY),
    Bridge("torch.cuda", "memory_reserved", _value(0), _MEMORY),
    Bridge("torch.cuda", "max_memory_allocated", _value(0), _MEMORY),
    Bridge("torch.cuda", "max_memory_reserved", _value(0), _MEMORY),
    Bridge("torch.cuda", "reset_peak_memory_stats", _value(None), _MEMORY),
    Bridge("torch.cuda", "memory_stats", _object(lambda *_: {"allocation.all.current": 0}), _MEMORY),
    Bridge("torch.cuda", "device_memory_used", _value(0), _MEMORY),
    Bridge("torch.cuda", "manual_seed", _object(torch.manual_seed), _RNG),
    Bridge("torch.cuda", "manual_seed_all", _value(None), _RNG),
    Bridge("torch.cuda", "get_rng_state", _object(lambda *_, **__: torch.get_rng_state()), _RNG),
    Bridge("torch.cuda", "set_rng_state", _object(lambda state, *_, **__: torch.set_rng_state(state)), _RNG),
    Bridge("torch.cuda.random", "get_rng_state", _object(lambda *_, **__: torch.get_rng_state()), _RNG),
    Bridge(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _object(lambda state, *_, **__: torch.set_rng_state(state)),
        _RNG + "; the original defers the call until CUDA starts, which is never",
    ),
    Bridge("megatron.core.tensor_parallel.random", "CudaRNGStatesTracker.fork", _quiet_rng_fork, _RNG),
    Bridge(
        "torch",
        "Tensor.cuda",
        _object(lambda self, *_, **__: self),
        "batches and parameters are moved by .cuda()",
    ),
    Bridge("torch", "nn.Module.cuda", _object(lambda self, *_, **__: self), "model chunks are moved by .cuda()"),
    Bridge("torch", "Tensor.pin_memory", _object(lambda self, *_, **__: self), "pinning needs a CUDA driver"),
    Bridge("torch", "Tensor.to", _to_on_cpu, "tensors are moved by .to('cuda')"),
    Bridge(
        "torch",
        "Tensor.type",
        _cuda_type_names,
        "the optimizers and gradient clipping compare type() with names such as 'torch.cuda.FloatTensor'",
    ),
    Bridge(
        "torch._dynamo.config",
        "disable",
        _no_dynamo,
        "fused functions would be compiled by a C++ compiler at first use",
    ),
    Bridge(
        "torch.distributed",
        "all_to_all_single",
        _splits_as_lists,
        "stock Megatron turns splits into lists only on their way from the device to the host",
    ),
    *(Bridge("torch", name, _factory_on_cpu, _FACTORY) for name in _FACTORIES),
    Bridge(
        "megatron.training.training",
        "initialize_megatron",
        lambda original: functools.partial(original, allow_no_cuda=True),
        "pretrain() has no way to pass allow_no_cuda",
        training_only=True,
    ),
    Bridge(
        "torch.cuda",
        "device_count",
        _value(1),
        "process groups and the random number trackers are set up only where there is a device",
        training_only=True,
    ),
    Bridge(
        "megatron.training.initialize",
        "_compile_dependencies",
        _barrier_only,
        "runs make in site-packages; the wheel ships the compiled helper, and our loader does not use it",
        training_only=True,
    ),
)

_applied: set[Bridge] = set()


def bridge(training: bool = False) -> bool:
    """Make Megatron run on CPU; does nothing where CUDA is available. Repeated calls are harmless.

    Args:
        training: also bridge `megatron.training` (importing it takes seconds).

    Returns:
        Whether the bridge is active.
    """
    if torch.cuda.is_available():
        return False
    for entry in BRIDGES:
        if entry not in _applied and (training or not entry.training_only):
            entry.apply()
            _applied.add(entry)
    return True
