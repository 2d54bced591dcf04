"""Logs on a full disk: what cannot be written is counted and said in one line, and training goes on."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import Any, TextIO


class LostWrites:
    """Counts the writes that one log loses, and says so at the first, at each tenfold, and when it writes again.

    Args:
        what: the log's name in these lines.
    """

    def __init__(self, what: str):
        self._what, self._count, self._say_at, self._saying = what, 0, 1, False

    @property
    def count(self) -> int:
        """Writes lost since the last one that succeeded."""
        return self._count

    def lost(self, error: BaseException) -> None:
        """Count one write."""
        self._count += 1
        if self._count == self._say_at:
            self._say_at *= 10
            self._say(f"{self._count} write(s) lost, training goes on: {error}")

    def wrote(self) -> None:
        """Note that a write succeeded."""
        if self._count and not self._saying:
            self._say(f"writes again, after {self._count} lost write(s)")
            self._count, self._say_at = 0, 1

    def _say(self, text: str) -> None:
        if self._saying:  # of standard error itself, which is lost too
            return
        self._saying = True
        with contextlib.suppress(OSError):
            print(f"WARNING: {self._what}: {text}", file=sys.stderr, flush=True)
        self._saying = False


class _Stream:
    """A text stream that counts the writes it loses instead of raising."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._losses = stream, LostWrites(name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._losses.lost(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._losses.lost(error)
        else:
            self._losses.wrote()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def give_up(self) -> None:
        """Drop what still cannot be written: Python flushes at its exit, and a failure there changes the exit code."""
        try:
            self._stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def tolerate_full_disk() -> None:
    """Keep `print` from ending this process when standard output or error goes to a file on a full disk."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Stream):
            tolerant = _Stream(stream, f"standard {'output' if name == 'stdout' else 'error'}")
            setattr(sys, name, tolerant)
            atexit.register(tolerant.give_up)
