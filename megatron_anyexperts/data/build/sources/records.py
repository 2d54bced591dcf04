"""Sources whose samples are records: text tables, tables of media with text, interleaved documents."""

from abc import abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_anyexperts.data.build.sample import TEXT_FIELD, Media, Rejected, Sample
from megatron_anyexperts.data.build.sources.base import Chunk, Item, Source
from megatron_anyexperts.data.build.sources.media_reference import media_from
from megatron_anyexperts.data.build.sources.record_files import SUFFIXES, read_records, record_chunks


class RecordSource(Source):
    """Records of a file, or of all record files below a folder."""

    language_field: str | None = None
    """Field that names the language of a record."""

    def chunks(self, seed: int, chunk_items: int, chunk_bytes: int) -> Iterator[Chunk]:
        if self.path.is_dir():
            files = [file for file in self.path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()]
        else:
            files = [self.path]
        for file in sorted(files):
            yield from record_chunks(file, self._name(file), chunk_bytes)

    def _name(self, file: Path) -> str:
        return str(file.relative_to(self.path)) if file != self.path else file.name

    def _file(self, chunk: Chunk) -> Path:
        return self.path / chunk["file"] if self.path.is_dir() else self.path

    def read(self, chunk: Chunk, wanted: Collection[int] | None, max_bytes: int) -> Iterator[Item]:
        for position, record in read_records(self._file(chunk), chunk, wanted, max_bytes):
            try:
                if isinstance(record, Rejected):
                    raise record
                item = self.sample(record, max_bytes)
            except Rejected as rejected:
                item = rejected
            item.origin = self.origin(chunk, position)
            yield position, item

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


def string(record: dict[str, Any], field: str) -> str:
    """A field of a record that must be text.

    Raises:
        Rejected: it is missing or something else.
    """
    value = record.get(field)
    if not isinstance(value, str):
        raise Rejected("no text in the record", f"field {field!r} is {type(value).__name__}")
    return value


class TextTable(RecordSource):
    """A text document per record."""

    type: ClassVar[str] = "text_table"
    text_field: str = "text"

    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        return Sample("text", self.with_language({"text": string(record, self.text_field)}, record))


class MediaSource(RecordSource):
    """Records that refer to media."""

    media_root: Path | None = None
    """Folder that media paths are relative to and may not leave; by default that of the records."""

    def located_at(self, root: Path) -> "MediaSource":
        located = super().located_at(root)
        folder = located.path if located.path.is_dir() else located.path.parent
        return located.model_copy(update={"media_root": root / self.media_root if self.media_root else folder})


class MediaTable(MediaSource):
    """A medium and its text per record."""

    type: ClassVar[str] = "media_table"
    kind: Literal["image", "audio", "video"] = "image"
    media_field: str
    """Field with a path, bytes, a data URL, or a mapping with one of them."""
    text_field: str

    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        fields = self.with_language({TEXT_FIELD[self.kind]: string(record, self.text_field).strip()}, record)
        return Sample(
            self.kind, fields, [media_from(record.get(self.media_field), self.kind, self.media_root, max_bytes)]
        )


class Interleaved(MediaSource):
    """Documents of text and images in reading order.

    A record has `segments` (items with `type` and `text` or `media`), or `texts` and `images` of equal length
    with null where the other has an entry (OBELICS), or `text_list` and `image_info` (MMC4).
    """

    type: ClassVar[str] = "interleaved"

    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        segments: list[dict[str, Any]] = []
        media: list[Media] = []
        for kind, value in _segments(record):
            if kind == "text":
                if value.strip():
                    segments.append({"type": "text", "text": value})
            else:
                segments.append({"type": kind, "media": len(media)})
                media.append(media_from(value, kind, self.media_root, max_bytes))
        return Sample("interleaved", self.with_language({"segments": segments}, record), media)


def _segments(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Kind and value of the segments of a document in any of the known forms."""
    if isinstance(record.get("segments"), list):
        for segment in record["segments"]:
            if not isinstance(segment, dict) or segment.get("type") not in ("text", "image", "audio", "video"):
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
        raise Rejected("no interleaved document", f"fields {sorted(map(str, record))}"[:200])
