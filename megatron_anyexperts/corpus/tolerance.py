"""Ends a build in which too many items end in an error that nobody foresaw."""

from megatron_anyexperts.corpus.corpus import CorpusError, Tolerance
from megatron_anyexperts.corpus.unforeseen import UNFORESEEN


class Unforeseen:
    """Counts items and unforeseen errors, and ends a build in which there are too many.

    Args:
        tolerance: how many are too many.
    """

    def __init__(self, tolerance: Tolerance):
        self._tolerance, self._items, self._errors, self._example = tolerance, 0, 0, ""

    def add(self, items: int, rejected: list[dict]) -> None:
        """Count the items of a task, and those of its rejections that are unforeseen errors.

        Raises:
            CorpusError: too many in all.
        """
        errors = [line for line in rejected if line["reason"] == UNFORESEEN]
        self.count(items, len(errors), errors[-1] if errors else None)

    def count(self, items: int, errors: int, example: dict | None) -> None:
        """Count items, how many of them are unforeseen errors, and the rejection of the last of these.

        Raises:
            CorpusError: too many in all.
        """
        self._items += items
        self._errors += errors
        if example is not None:
            self._example = f"{example['origin']}: {example['detail']}"
        limit, share = self._tolerance.unforeseen_items, self._tolerance.unforeseen_share
        if self._errors > max(limit, share * self._items):
            raise CorpusError(
                f"{self._errors} of {self._items} items ended in an unforeseen error, more than both "
                f"tolerance.unforeseen_items={limit} and tolerance.unforeseen_share={share}; the last one: "
                f"{self._example}. Mend or leave out what causes them, or raise both and give the command again"
            )
