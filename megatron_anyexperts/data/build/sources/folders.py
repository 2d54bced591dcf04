"""Folders of files: text documents, and media with a caption or transcript beside each."""

import json
import os
from abc import abstractmethod
from collections.abc import Collection, Iterator
from itertools import batched
from typing import ClassVar

from megatron_anyexperts.data.build.sample import TEXT_FIELD, Media, Rejected, Sample
from megatron_anyexperts.data.build.sources.base import (
    Chunk,
    Item,
    Source,
    decode_text,
    read_bytes,
    shuffled,
    walk_files,
)

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
        for names in batched(shuffled(walk_files(self.path, self.suffixes), seed), chunk_items):
            yield {"files": list(names)}

    def read(self, chunk: Chunk, wanted: Collection[int] | None, max_bytes: int) -> Iterator[Item]:
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
            text = decode_text(read_bytes(self.path / name, max_bytes))
        except Rejected as rejected:
            yield rejected
            return
        fields = {"text": text} | ({"language": self.language} if self.language else {})
        yield Sample("text", fields)


class MediaFolder(FolderSource):
    """Media files, each with `NAME.txt` (its text) or `NAME.json` (texts by language) beside it.

    One sample per medium and language.
    """

    languages: list[str] | None = None
    """Languages to take, of those that a .json sidecar or the folder names offer; all by default."""
    language_from_folder: bool = False
    """Whether the first folder below `path` is named by the language (`speech/fr/...`)."""

    def chunks(self, seed: int, chunk_items: int, chunk_bytes: int) -> Iterator[Chunk]:
        names = walk_files(self.path, self.suffixes)
        if self.language_from_folder and self.languages is not None:
            names = (name for name in names if name.split(os.sep)[0] in self.languages)
        for files in batched(shuffled(names, seed), chunk_items):
            yield {"files": list(files)}

    def _items(self, name: str, max_bytes: int) -> Iterator[Sample | Rejected]:
        try:
            texts = self._texts(name)
            data = read_bytes(self.path / name, max_bytes)
        except Rejected as rejected:
            yield rejected
            return
        for language, text in texts:
            fields = {TEXT_FIELD[self.kind]: text} | ({"language": language} if language else {})
            yield Sample(self.kind, fields, [Media(self.kind, data)])

    def _texts(self, name: str) -> list[tuple[str | None, str]]:
        stem = self.path / os.path.splitext(name)[0]
        language = name.split(os.sep)[0] if self.language_from_folder else self.language
        if os.path.lexists(f"{stem}.json"):
            return self._by_language(decode_text(read_bytes(f"{stem}.json", MAX_SIDECAR_BYTES)))
        if os.path.lexists(f"{stem}.txt"):
            return [(language, decode_text(read_bytes(f"{stem}.txt", MAX_SIDECAR_BYTES)).strip())]
        raise Rejected(f"no {TEXT_FIELD[self.kind]} beside the file", "neither .txt nor .json")

    def _by_language(self, document: str) -> list[tuple[str | None, str]]:
        try:
            texts = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise Rejected("damaged JSON", str(error)[:200]) from None
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise Rejected("sidecar is no mapping from language to text")
        chosen = [(code, text) for code, text in texts.items() if self.languages is None or code in self.languages]
        if len(chosen) > ITEMS_PER_FILE:
            raise Rejected("too many languages in a sidecar", f"{len(chosen)}, limit {ITEMS_PER_FILE}")
        if not chosen:
            raise Rejected("no text in the chosen languages", f"has {sorted(texts)}"[:200])
        return chosen


class ImageFolder(MediaFolder):
    """Images with captions."""

    type: ClassVar[str] = "image_folder"
    kind: ClassVar[str] = "image"
    suffixes: ClassVar[frozenset[str]] = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


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
