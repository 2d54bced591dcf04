"""Counts on their way from a GPU to the host."""

import torch
from torch import Tensor


class HostCopy:
    """A copy to the host that is started here and waited for where its values are needed.

    On a GPU the copy goes to pinned memory behind what is queued already. Whatever is launched until `wait` runs while
    the host waits. Elsewhere it is a plain copy.

    Args:
        values: any shape and dtype; may be overwritten as soon as this returns.
    """

    def __init__(self, values: Tensor) -> None:
        # torch takes pinned memory for a copy that does not block.
        self._host = values.detach().to("cpu", non_blocking=True)
        self._arrived = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Tensor:
        """Return the values on the host; this is the synchronisation."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
