"""When Triton's kernels take the place of torch's operators."""

import importlib.util

from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_kernels(wanted: str, tensor: Tensor) -> bool:
    """Whether to use them where a tensor lies; `wanted` is `anyexperts_kernels`."""
    return wanted == "on" or wanted == "auto" and tensor.is_cuda and HAS_TRITON
