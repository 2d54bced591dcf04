"""What every source of samples has in common."""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from megatron_anyexperts.corpus.sample import Rejected, Sample

Chunk = dict[str, Any]
"""A unit of work of a source: small, JSON, enough to find the same items again."""

Item = tuple[int, Sample | Rejected]
"""Position of an item in its chunk, and the sample or why there is none."""


class Source(BaseModel, ABC):
    """A place samples come from. Its fields are the options of its entry in the corpus YAML.

    A source says what there is (`chunks`) and reads a chunk (`read`). Reading the same chunk twice must give
    the same items at the same positions, since shards are planned after a first reading and written in a second.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: ClassVar[str]

    path: Path
    """Folder or file, relative to the root of the corpus."""
    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]{0,64}$")
    """Name in manifests; the path by default."""
    language: str | None = Field(None, max_length=35)
    """Language of the text, where the data does not say it."""
    optional: bool = False
    """Whether the source may be missing."""
    follow_links: bool = False
    """Whether symbolic links may lead out of the source's folder, or out of the corpus' root."""

    @property
    def label(self) -> str:
        """Name of the source in manifests and lists."""
        return self.name or self.path.name

    def located_at(self, root: Path) -> "Source":
        """The same source with absolute paths and its name settled."""
        return self.model_copy(update={"path": root / self.path, "name": self.label})

    def missing(self) -> bool:
        """Whether there is nothing at the path."""
        return not self.path.exists()

    def forms(self) -> str:
        """Names of files that it reads, for messages."""
        return ", ".join(sorted(getattr(self, "suffixes", ())))

    def origin(self, chunk: Chunk, position: int) -> str:
        """Where an item came from, for a person to find it."""
        place = f"{self.label}:{chunk['file']}"
        return f"{place}#{position}" if position >= 0 else place

    @abstractmethod
    def chunks(self, seed: int, chunk_items: int, chunk_bytes: int) -> Iterator[Chunk]:
        """Cut the source into units of work, in an order that depends on nothing but content and seed."""

    @abstractmethod
    def read(self, chunk: Chunk, wanted: Collection[int] | None, max_bytes: int) -> Iterator[Item]:
        """Items of a chunk.

        Args:
            chunk: one of `chunks()`.
            wanted: positions to hand over; None means all.
            max_bytes: files above this size are rejected unread.
        """


def walk_files(root: Path, accepts: Callable[[str], bool], follow_links: bool) -> Iterator[str | Rejected]:
    """Relative paths of the files below `root` whose names are accepted; at the end what could not be listed.

    Args:
        root: folder.
        accepts: whether a file name is wanted.
        follow_links: whether linked folders are listed. Else one inside of `root` is listed at its real place only,
            and one that leads out is a rejection.
    """
    lost: list[Rejected] = []

    def on_error(error: OSError) -> None:
        lost.append(Rejected("unreadable folder", str(error)[:200], os.path.relpath(error.filename, root)))

    real_root, seen = os.path.realpath(root), set()
    for folder, folders, names in os.walk(root, onerror=on_error, followlinks=follow_links):
        folders.sort()
        for name in list(folders):
            path = os.path.join(folder, name)
            if follow_links:
                # A link to a folder above would never end.
                real = os.path.realpath(path)
                if real in seen or Path(real_root).is_relative_to(real):
                    folders.remove(name)
                seen.add(real)
            elif os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(real_root):
                lost.append(leaves(os.path.relpath(path, root)))
        for name in names:
            if accepts(name):
                yield os.path.relpath(os.path.join(folder, name), root)
    yield from lost


def with_suffix(suffixes: Collection[str]) -> Callable[[str], bool]:
    """Whether a file name has one of the suffixes, in small or capital letters."""
    return lambda name: os.path.splitext(name)[1].lower() in suffixes


def leaves(name: str) -> Rejected:
    """The rejection of a link that leads out of its folder."""
    detail = f"{name}: put the data there, or set `follow_links: true` for the source"
    return Rejected("link leads out of its folder", detail[:300], name)


def lost_chunk(lost: Rejected) -> Chunk:
    """A unit of work that stands for something that could not be listed, so that it is counted."""
    return {"lost": [lost.origin, lost.reason, lost.detail]}


def lost_item(label: str, chunk: Chunk) -> Item:
    """What reading a `lost_chunk` gives."""
    name, reason, detail = chunk["lost"]
    # Positions of items are never negative, so this one cannot be mistaken for one of them.
    return -1, Rejected(reason, detail, f"{label}:{name}")


def shuffled(names: Iterator[str], seed: int) -> list[str]:
    """Names in an order that looks random but depends on nothing but names and seed."""
    salt = seed.to_bytes(8, "little", signed=True)
    return sorted(names, key=lambda name: (hashlib.blake2b(os.fsencode(name), key=salt).digest(), name))


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Content of a regular file.

    Raises:
        Rejected: missing, no regular file, unreadable, or larger than `max_bytes`.
    """
    try:
        # Opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("not a regular file")
            if status.st_size > max_bytes:
                raise Rejected("too many bytes", f"{status.st_size} bytes, limit {max_bytes}")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(max_bytes)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
        raise Rejected(reason, str(error)[:200]) from None


def check_file(root: Path, name: str, follow_links: bool) -> Path:
    """The path of a regular file that was found below `root`.

    Raises:
        Rejected: no regular file, or a link leads out of `root` and may not.
    """
    path = root / name
    try:
        inside = follow_links or path.resolve().is_relative_to(root.resolve())
        regular = path.is_file() or not path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise Rejected("unreadable file", f"{type(error).__name__}: {error}"[:200]) from None
    if not inside:
        raise leaves(name)
    if not regular:
        raise Rejected("not a regular file")
    return path


def read_below(root: Path, name: str, max_bytes: int, follow_links: bool) -> bytes:
    """Content of a file that was found below `root`.

    Raises:
        Rejected: as `check_file` or `read_bytes`.
    """
    return read_bytes(check_file(root, name, follow_links), max_bytes)


def read_referenced(root: Path, reference: Any, max_bytes: int, follow_links: bool = False) -> bytes:
    """Content of a file that data refers to; it must lie below `root`.

    Raises:
        Rejected: no usable path, one that leads out of `root`, or as `read_bytes`.
    """
    if not isinstance(reference, str) or not reference:
        raise Rejected("no media path", repr(reference)[:200])
    try:
        # Links may be allowed; a path that itself leads elsewhere never is.
        place = os.path.normpath if follow_links else os.path.realpath
        inside = Path(place(root / reference)).is_relative_to(place(root))
    except (OSError, ValueError, RuntimeError) as error:
        raise Rejected("unusable media path", f"{type(error).__name__}: {error}"[:200]) from None
    if not inside:
        raise Rejected("media path leaves its folder", reference[:200])
    return read_bytes(root / reference, max_bytes)


def decode_text(data: bytes) -> str:
    """UTF-8 text without a byte order mark.

    Raises:
        Rejected: not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("text is not UTF-8", str(error)[:200]) from None
