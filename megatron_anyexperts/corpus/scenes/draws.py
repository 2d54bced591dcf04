"""Draws of whole numbers that are the same with every version of Python, on every machine."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """A stream of draws named by a text: equal names give equal draws, and another name other ones.

    Args:
        name: says what is drawn, such as ``7/train/12``.
    """

    def __init__(self, name: str):
        self._name, self._count = name, 0

    def below(self, limit: int) -> int:
        """A whole number in [0, limit), each equally likely up to limit / 2**64."""
        self._count += 1
        digest = hashlib.blake2b(f"{self._name}/{self._count}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) % limit

    def one(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items, in the order in which they were drawn."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]
