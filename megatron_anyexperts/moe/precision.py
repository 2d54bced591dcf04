"""Keeps state in its own precision when the model around it is cast to bf16 or fp16."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class KeepsPrecision(torch.nn.Module):
    """A module of which some tensors move between devices but never change their dtype.

    Megatron's `Float16Module` casts every floating tensor it reaches. Counts then round (bf16 holds all integers up to
    256 only), and what moves by small steps stands still.
    """

    def kept(self) -> Iterable[Tensor]:
        """The module's own tensors that keep their dtype: its buffers, unless a subclass says otherwise."""
        return self.buffers(recurse=False)

    def _apply(self, fn, recurse=True):
        kept = {id(tensor) for tensor in self.kept()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)
