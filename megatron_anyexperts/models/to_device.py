"""Numbers that the host knows, where the model computes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Copy a host tensor, or whole numbers as int64, to a device; a GPU's host does not wait for the copy."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
