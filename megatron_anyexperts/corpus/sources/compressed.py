"""Compressed files as streams that notice damage, truncation and bombs."""

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_anyexperts.corpus.sample import Rejected

SUFFIXES = (".gz", ".zst", ".zstd")

DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What reading a damaged or truncated file raises."""

MAX_EXPANSION = 200
"""How many times its size a compressed file may unfold to, beyond a first 64 MiB."""


def open_unpacked(path: Path) -> io.BufferedReader:
    """A file as it is, or unpacked while it is read.

    Raises:
        Rejected: while reading, when a compressed file unfolds to more than `MAX_EXPANSION` allows.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return open(path, "rb")
    packed = gzip.GzipFile(path) if suffix == ".gz" else io.BufferedReader(_Zstd(path.open("rb")))
    return io.BufferedReader(_Bounded(packed, path.stat().st_size), 2**20)


class _Bounded(io.RawIOBase):
    """Ends a stream of which far too much comes."""

    def __init__(self, inner: io.BufferedIOBase, packed_size: int):
        self._inner, self._size = inner, packed_size
        self._left = self._most = MAX_EXPANSION * packed_size + 64 * 2**20

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        # As much as there is before damage, not as much as was asked for.
        piece = self._inner.read1(len(buffer))
        buffer[: len(piece)] = piece
        self._left -= len(piece)
        if self._left < 0:
            raise Rejected("decompression bomb", f"more than {self._most} bytes from {self._size}")
        return len(piece)

    def close(self) -> None:
        self._inner.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Zstandard frames one after the other, of any window (`zstd --long=31`).

    The library's own reader takes a truncated file for one that ends.
    """

    # A block of 4 bytes can stand for 128 KiB: a small piece of a bomb is all that is ever unfolded at once.
    PIECE = 1024

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame = None
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._unpacked:
            left = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            piece = left or self._file.read(self.PIECE)
            if not piece:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the file ends within a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._unpacked = memoryview(self._frame.decompress(piece))
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
