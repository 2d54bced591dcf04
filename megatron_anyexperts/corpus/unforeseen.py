"""What no code here expected of an item costs that item alone: it is rejected with the exception, and counted apart."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_anyexperts.corpus.sample import Rejected

if TYPE_CHECKING:  # the sources import this module
    from megatron_anyexperts.corpus.sources.base import Item

UNFORESEEN = "unforeseen error"
"""The reason of such a rejection."""


def rejection(error: Exception, origin: str = "") -> Rejected:
    """The rejection that an unexpected exception becomes; its detail says what was raised and where in the code."""
    place = getattr(error, "place", "")  # in the decoder process
    if not place and (frames := traceback.extract_tb(error.__traceback__)):
        place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}"
    return Rejected(UNFORESEEN, f"{type(error).__name__}: {error}".split("\n")[0][:200] + f" ({place})", origin)


@contextmanager
def foreseen() -> Iterator[None]:
    """Let nothing but `Rejected` out of the handling of one item.

    Raises:
        Rejected: whatever was raised inside.
    """
    try:
        yield
    except Rejected:
        raise
    except Exception as error:  # whatever an item provokes: a build does not end because of one
        raise rejection(error) from error


def guarded(items: "Iterator[Item]", origin: str) -> "Iterator[Item]":
    """The items of a chunk; a source that fails in between ends the chunk with a rejection instead of the build.

    Args:
        items: of `Source.read`.
        origin: names the chunk.
    """
    position = -1
    try:
        for position, item in items:
            yield position, item
    except Exception as error:
        after = f"{origin}, after item {position}" if position >= 0 else origin
        yield position + 1, rejection(error, after)
