"""Sources whose samples are records: text tables, tables of media with text, interleaved documents."""

from abc import abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_anyexperts.corpus.sample import TEXT_FIELD, Media, Rejected, Sample
from megatron_anyexperts.corpus.sources.base import (
    Chunk,
    Item,
    Source,
    check_file,
    lost_chunk,
    lost_item,
    walk_files,
)
from megatron_anyexperts.corpus.sources.media_reference import media_from
from megatron_anyexperts.corpus.sources.record_files import FORMS, form_of, read_records, record_chunks
from megatron_anyexperts.corpus.sources.tables import Quotes
from megatron_anyexperts.corpus.sources.unread import is_unread, refusal, unread
from megatron_anyexperts.corpus.unforeseen import foreseen
from megatron_anyexperts.media import MODALITIES


class RecordSource(Source):
    """Records of a file, or of all record files below a folder."""

    language_field: str | None = None
    """Field that names the language of a record."""

    quotes: Quotes = "auto"
    """What a double quote means in .csv and .tsv, see `tables.table_rows`."""
    fields: ClassVar[frozenset[str] | None] = None
    """Fields of a record that a sample can be made of; None for all."""

    def forms(self) -> str:
        return FORMS

    def chunks(self, seed: int, chunk_items: int, chunk_bytes: int) -> Iterator[Chunk]:
        if not self.path.is_dir():
            if is_unread("records", self.path.name):
                yield lost_chunk(refusal(self.path.name, self.type, FORMS))
                return
            yield from record_chunks(self.path, self.path.name, chunk_bytes)
            return
        walked = walk_files(self.path, lambda name: form_of(name) or is_unread("records", name), self.follow_links)
        found = unread(walked, "records", self.type, FORMS)
        for name in sorted(name for name in found if isinstance(name, str)):
            yield from self._chunks_of(name, chunk_bytes)
        yield from (lost_chunk(lost) for lost in found if isinstance(lost, Rejected))

    def _chunks_of(self, name: str, chunk_bytes: int) -> Iterator[Chunk]:
        try:
            check_file(self.path, name, self.follow_links)
            yield from record_chunks(self.path / name, name, chunk_bytes)
        except Rejected as rejected:
            yield lost_chunk(Rejected(rejected.reason, rejected.detail, name))
        except OSError as error:
            yield lost_chunk(Rejected("unreadable file", str(error)[:200], name))

    def read(self, chunk: Chunk, wanted: Collection[int] | None, max_bytes: int) -> Iterator[Item]:
        if "lost" in chunk:
            yield lost_item(self.label, chunk)
            return
        file = self.path / chunk["file"] if self.path.is_dir() else self.path
        for position, record in read_records(file, chunk, wanted, max_bytes, self._needed(), self.quotes):
            try:
                if isinstance(record, Rejected):
                    raise record
                with foreseen():
                    item = self.sample(record, max_bytes)
            except Rejected as rejected:
                item = rejected
            item.origin = self.origin(chunk, position)
            yield position, item

    def _needed(self) -> frozenset[str] | None:
        return self.fields and self.fields | {self.language_field or "language"}

    @abstractmethod
    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        """Turn a record into a sample.

        Raises:
            Rejected: it has not got what a sample needs.
        """

    def with_language(self, fields: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        """Fields and the language of the record, where it is known."""
        language = record.get(self.language_field) if self.language_field else self.language
        if isinstance(language, str) and 0 < len(language) <= 35:
            return fields | {"language": language}
        return fields


def string(record: dict[str, Any], field: str, way_out: str = "") -> str:
    """A field of a record that must be text.

    Raises:
        Rejected: it is missing or something else.
    """
    value = record.get(field)
    if not isinstance(value, str):
        found = f"is {type(value).__name__}" if value is not None else "is null" if field in record else "is missing"
        raise Rejected("no text in the record", f"field {field!r} {found}; fields {named(record)}{way_out}"[:300])
    return value


def named(record: dict[str, Any]) -> list[str]:
    """The fields of a record, for messages; of a Parquet file all, also those that were not read."""
    return sorted(map(str, getattr(record, "columns", None) or record))[:20]


class TextTable(RecordSource):
    """A text document per record."""

    type: ClassVar[str] = "text_table"
    text_field: str = "text"

    def _needed(self) -> frozenset[str]:
        return frozenset({self.text_field, self.language_field or self.text_field})

    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        text = string(record, self.text_field, "; name another as text_field, or use type chat for conversations")
        return Sample("text", self.with_language({"text": text}, record))


class MediaSource(RecordSource):
    """Records that refer to media."""

    media_root: Path | None = None
    """Folder that media paths are relative to and may not leave; by default that of the records."""

    def located_at(self, root: Path) -> "MediaSource":
        located = super().located_at(root)
        folder = located.path if located.path.is_dir() else located.path.parent
        return located.model_copy(update={"media_root": root / self.media_root if self.media_root else folder})

    def medium(self, value: Any, kind: str, max_bytes: int) -> Media:
        """The medium that a value of a record stands for, see `media_from`."""
        return media_from(value, kind, self.media_root, max_bytes, self.follow_links)


class MediaTable(MediaSource):
    """A medium and its text per record."""

    type: ClassVar[str] = "media_table"
    kind: Literal["image", "audio", "video"] = "image"
    media_field: str
    """Field with a path, bytes, a data URL, or a mapping with one of them."""
    text_field: str

    def _needed(self) -> frozenset[str]:
        return frozenset({self.media_field, self.text_field, self.language_field or self.text_field})

    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        fields = self.with_language({TEXT_FIELD[self.kind]: string(record, self.text_field).strip()}, record)
        return Sample(self.kind, fields, [self.medium(record.get(self.media_field), self.kind, max_bytes)])


class Interleaved(MediaSource):
    """Documents of text and images in reading order.

    A record has `segments` (items with `type` and `text` or `media`), or `texts` and `images` of equal length
    with null where the other has an entry (OBELICS), or `text_list` and `image_info` (MMC4).
    """

    type: ClassVar[str] = "interleaved"
    fields: ClassVar[frozenset[str]] = frozenset({"segments", "texts", "images", "text_list", "image_info"})

    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        segments: list[dict[str, Any]] = []
        media: list[Media] = []
        for kind, value in _segments(record):
            if kind == "text":
                if value.strip():
                    segments.append({"type": "text", "text": value})
            else:
                segments.append({"type": kind, "media": len(media)})
                media.append(self.medium(value, kind, max_bytes))
        return Sample("interleaved", self.with_language({"segments": segments}, record), media)


def _segments(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Kind and value of the segments of a document in any of the known forms."""
    if isinstance(record.get("segments"), list):
        for segment in record["segments"]:
            if not isinstance(segment, dict) or segment.get("type") not in MODALITIES:
                raise Rejected("unknown segment", repr(segment)[:200])
            kind = segment["type"]
            yield kind, string(segment, "text") if kind == "text" else segment.get("media", segment.get(kind))
    elif isinstance(record.get("texts"), list) and isinstance(record.get("images"), list):
        if len(record["texts"]) != len(record["images"]):
            raise Rejected("texts and images differ in length", f"{len(record['texts'])}, {len(record['images'])}")
        for text, image in zip(record["texts"], record["images"], strict=True):
            if image is not None:
                yield "image", image
            if text is not None:
                yield "text", string({"text": text}, "text")
    elif isinstance(record.get("text_list"), list) and isinstance(record.get("image_info"), list):
        images: dict[int, list[Any]] = {}
        for image in record["image_info"]:
            if not isinstance(image, dict) or not isinstance(image.get("matched_text_index"), int):
                raise Rejected("image without matched_text_index", repr(image)[:200])
            images.setdefault(image["matched_text_index"], []).append(image.get("image_name"))
        if not set(images) <= set(range(len(record["text_list"]))):
            raise Rejected("matched_text_index outside of text_list", str(sorted(images))[:200])
        for number, text in enumerate(record["text_list"]):
            yield from (("image", name) for name in images.get(number, []))
            yield "text", string({"text": text}, "text")
    else:
        forms = "a document has segments, or texts and images, or text_list and image_info"
        raise Rejected("no interleaved document", f"fields {named(record)}; {forms}"[:300])
