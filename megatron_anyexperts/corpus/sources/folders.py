"""Folders of files: text documents, and media with a caption or transcript beside each."""

import os
from abc import abstractmethod
from collections.abc import Collection, Iterator
from functools import partial
from itertools import batched
from typing import ClassVar

from megatron_anyexperts.corpus.sample import TEXT_FIELD, Media, Rejected, Sample
from megatron_anyexperts.corpus.sources.base import (
    Chunk,
    Item,
    Source,
    decode_text,
    lost_chunk,
    lost_item,
    read_below,
    shuffled,
    walk_files,
    with_suffix,
)
from megatron_anyexperts.corpus.sources.sidecars import Text, sidecar_texts
from megatron_anyexperts.corpus.sources.unread import is_unread, unread
from megatron_anyexperts.corpus.unforeseen import foreseen

MAX_SIDECAR_BYTES = 16 * 2**20

ITEMS_PER_FILE = 4096
"""Positions set aside for each file, so that reading one item does not need the other files of its chunk."""


class FolderSource(Source):
    """Files below a folder; a chunk is a list of them."""

    kind: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]

    def origin(self, chunk: Chunk, position: int) -> str:
        return f"{self.label}:{chunk['files'][position // ITEMS_PER_FILE]}"

    def chunks(self, seed: int, chunk_items: int, chunk_bytes: int) -> Iterator[Chunk]:
        wanted = with_suffix(self.suffixes)
        walked = walk_files(self.path, lambda name: wanted(name) or is_unread(self.kind, name), self.follow_links)
        found = unread(walked, self.kind, self.type, self.forms())
        names = (name for name in found if isinstance(name, str) and self._chosen(name))
        for files in batched(shuffled(names, seed), chunk_items):
            yield {"files": list(files)}
        yield from (lost_chunk(lost) for lost in found if isinstance(lost, Rejected))

    def _chosen(self, name: str) -> bool:
        return True

    def read(self, chunk: Chunk, wanted: Collection[int] | None, max_bytes: int) -> Iterator[Item]:
        if "lost" in chunk:
            yield lost_item(self.label, chunk)
            return
        wanted_files = None if wanted is None else {position // ITEMS_PER_FILE for position in wanted}
        for number, name in enumerate(chunk["files"]):
            if wanted_files is not None and number not in wanted_files:
                continue
            for position, item in enumerate(self._items(name, max_bytes), number * ITEMS_PER_FILE):
                if wanted is None or position in wanted:
                    item.origin = self.origin(chunk, position)
                    yield position, item

    @abstractmethod
    def _items(self, name: str, max_bytes: int) -> Iterator[Sample | Rejected]:
        """The samples of one file."""


class TextFolder(FolderSource):
    """A document per file."""

    type: ClassVar[str] = "text_folder"
    kind: ClassVar[str] = "text"
    suffixes: ClassVar[frozenset[str]] = frozenset({".txt", ".md", ".rst"})

    def _items(self, name: str, max_bytes: int) -> Iterator[Sample | Rejected]:
        try:
            with foreseen():
                text = decode_text(read_below(self.path, name, max_bytes, self.follow_links))
        except Rejected as rejected:
            yield rejected
            return
        fields = {"text": text} | ({"language": self.language} if self.language else {})
        yield Sample("text", fields)


class MediaFolder(FolderSource):
    """Media files, each with `NAME.txt` (its text) or `NAME.json` (texts by language, or metadata) beside it.

    One sample per medium and language.
    """

    languages: list[str] | None = None
    """Languages to take, of those that a .json sidecar or the folder names offer; all by default."""
    language_from_folder: bool = False
    """Whether the first folder below `path` is named by the language (`speech/fr/...`)."""

    def _chosen(self, name: str) -> bool:
        listed = self.language_from_folder and self.languages is not None
        return not listed or name.split(os.sep)[0] in self.languages

    def _items(self, name: str, max_bytes: int) -> Iterator[Sample | Rejected]:
        try:
            with foreseen():
                texts = self._texts(name)
                data = read_below(self.path, name, max_bytes, self.follow_links)
        except Rejected as rejected:
            yield rejected
            return
        for language, text in texts:
            fields = {TEXT_FIELD[self.kind]: text} | ({"language": language} if language else {})
            yield Sample(self.kind, fields, [Media(self.kind, data)])

    def _texts(self, name: str) -> list[Text]:
        language = name.split(os.sep)[0] if self.language_from_folder else self.language
        sidecar = partial(self._sidecar, os.path.splitext(name)[0])
        texts = sidecar_texts(sidecar, TEXT_FIELD[self.kind], language, self.languages)
        if len(texts) > ITEMS_PER_FILE:
            raise Rejected("too many languages in a sidecar", f"{len(texts)}, limit {ITEMS_PER_FILE}")
        return texts

    def _sidecar(self, stem: str, extension: str) -> bytes | None:
        if not os.path.lexists(self.path / f"{stem}{extension}"):
            return None
        return read_below(self.path, f"{stem}{extension}", MAX_SIDECAR_BYTES, self.follow_links)


class ImageFolder(MediaFolder):
    """Images with captions."""

    type: ClassVar[str] = "image_folder"
    kind: ClassVar[str] = "image"
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    )


class AudioFolder(MediaFolder):
    """Sound with transcripts."""

    type: ClassVar[str] = "audio_folder"
    kind: ClassVar[str] = "audio"
    suffixes: ClassVar[frozenset[str]] = frozenset({".ogg", ".oga", ".opus", ".wav", ".flac", ".mp3", ".m4a", ".aac"})


class VideoFolder(MediaFolder):
    """Videos with captions."""

    type: ClassVar[str] = "video_folder"
    kind: ClassVar[str] = "video"
    suffixes: ClassVar[frozenset[str]] = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"})
