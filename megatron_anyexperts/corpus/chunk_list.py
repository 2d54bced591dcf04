"""The list of all units of work, on disk: a corpus of a billion samples has millions of them."""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.corpus import Corpus, CorpusError
from megatron_anyexperts.corpus.sources.base import Chunk
from megatron_anyexperts.files import atomic_file


@dataclass(frozen=True)
class ChunkList:
    """Chunks by number; they are read when they are asked for.

    Args:
        path: file of a JSON line per chunk.
    """

    path: Path

    @property
    def index(self) -> Path:
        """File of int64 [C + 2]: where each of C lines starts, the end, and the time of the list that this is about."""
        return self.path.with_suffix(".idx")

    def __len__(self) -> int:
        return self.index.stat().st_size // 8 - 2

    def __getitem__(self, number: int) -> Chunk:
        start, stop = np.fromfile(self.index, "<i8", 2, offset=8 * number).tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(stop - start))

    def is_indexed(self) -> bool:
        """Whether the index is that of this very list."""
        status = os.stat(self.path)
        size = self.index.stat().st_size if self.index.is_file() else 0
        if size < 16:
            return False
        return np.fromfile(self.index, "<i8", 2, offset=size - 16).tolist() == [status.st_size, status.st_mtime_ns]

    def make_index(self, scratch: Path) -> None:
        """Find the lines."""
        with open(self.path, "rb") as file:
            lengths = np.fromiter((len(line) for line in file), "<i8")
            time = os.fstat(file.fileno()).st_mtime_ns
        with atomic_file(self.index, scratch) as file:
            file.write(np.array([0, *np.cumsum(lengths), time], dtype="<i8").tobytes())

    def forget(self) -> None:
        """Remove the list."""
        self.index.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def chunk_list(work: Path) -> ChunkList:
    """Where the list is kept."""
    return ChunkList(work / "chunks.jsonl")


def list_chunks(corpus: Corpus, work: Path) -> ChunkList:
    """All units of work; listed once, so that a continued build sees the same input.

    Raises:
        CorpusError: a source that is not optional is missing or empty.
    """
    chunks = chunk_list(work)
    if not chunks.path.is_file():
        with atomic_file(chunks.path, work / "tmp", first_wins=True) as file:
            for number, source in enumerate(corpus.sources):
                if source.missing():
                    if source.optional:
                        continue
                    raise CorpusError(
                        f"source {source.label!r}: {source.path} does not exist; point --root at the folder that "
                        "holds it, or mark the source `optional: true`"
                    )
                found = iter(source.chunks(corpus.seed, corpus.chunk_items, corpus.chunk_bytes))
                first = next(found, None)
                if first is None and not source.optional:
                    raise CorpusError(
                        f"source {source.label!r}: {source.path} holds nothing that a {source.type} can read: "
                        f"{source.forms()}"
                    )
                for chunk in itertools.chain([first] if first else [], found):
                    # Names of files need not be Unicode: ASCII JSON carries every byte of them.
                    file.write(json.dumps({"source": number, **chunk}).encode() + b"\n")
    if not chunks.is_indexed():
        chunks.make_index(work / "tmp")
    return chunks
