"""Which boxes of a tensor a range of its flattened elements consists of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A box of a strided tensor.

    Attributes:
        offsets, lengths: where it lies in the tensor, per dimension.
        first: place of its first element in the flat storage.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    first: int


def boxes_of_range(shape: Sequence[int], strides: Sequence[int], first: int, start: int, stop: int) -> list[Box]:
    """Cut what lies in a range of the flat storage out of a tensor, as few boxes.

    Args:
        shape, strides: of the tensor, in elements; row-major, so that no row reaches into the next.
        first: place of its first element in the storage.
        start, stop: the range of the storage.

    Returns:
        disjoint boxes that hold exactly the elements of the range: at most `2 * len(shape) - 1`, all rows that lie
        within the range in one, and those of the two rows at its ends.
    """
    if 0 in shape:
        return []
    if not shape:
        return [Box((), (), first)] if start <= first < stop else []
    rows, *row_shape = shape
    stride, *row_strides = strides
    extent = 1 + sum((size - 1) * step for size, step in zip(row_shape, row_strides, strict=True))
    if rows == 1:
        stride = extent  # torch leaves the stride of a single row open
    if stride < extent:
        raise ValueError(f"shape {tuple(shape)} with strides {tuple(strides)} is not row-major")
    touched = range(max(0, -((first + extent - 1 - start) // stride)), min(rows, (stop - 1 - first) // stride + 1))
    whole = range(max(0, -((first - start) // stride)), min(rows, (stop - extent - first) // stride + 1))
    boxes = []
    if whole:
        origin = (whole.start, *(0 for _ in row_shape))
        boxes.append(Box(origin, (len(whole), *row_shape), first + whole.start * stride))
    for row in sorted({*touched[:1], *touched[-1:]} - {*whole[:1], *whole[-1:]}):
        inner = boxes_of_range(row_shape, row_strides, first + row * stride, start, stop)
        boxes += [Box((row, *box.offsets), (1, *box.lengths), box.first) for box in inner]
    return boxes
