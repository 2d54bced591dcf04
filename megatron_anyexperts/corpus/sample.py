"""What a source hands over: a sample with its media, or the reason why there is none."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS = ("text", "image", "audio", "video", "interleaved", "chat")
"""Kinds of samples; each gets a dataset folder of its own."""

DOCUMENT_KIND = {"text": "text", "image": "image_text", "audio": "audio_text", "video": "video_text"}
"""What the `kind` field of a sample's JSON says; a kind that is not listed says its own name."""

TEXT_FIELD = {"text": "text", "image": "caption", "audio": "transcript", "video": "caption"}
"""The JSON field that holds the text of a sample of one text or one medium with its text."""


class Rejected(Exception):
    """A sample that cannot be used.

    Args:
        reason: a short constant phrase, used for counting.
        detail: the values and limits of this case.
        origin: where the sample came from; filled in by whoever knows.
    """

    def __init__(self, reason: str, detail: str = "", origin: str = ""):
        super().__init__(reason, detail, origin)
        self.reason, self.detail, self.origin = reason, detail, origin


@dataclass
class Media:
    """One image, audio clip or video as the bytes of its file."""

    type: str
    """image, audio or video."""
    data: bytes


@dataclass
class Sample:
    """One training sample before it is checked.

    Media are referred to by position: `{"type": "image", "media": 0}` in segments and message contents.
    """

    kind: str
    fields: dict[str, Any]
    media: list[Media] = field(default_factory=list)
    origin: str = ""

    def texts(self) -> Iterator[str]:
        """All text of the sample, in order."""
        if self.kind in TEXT_FIELD:
            yield self.fields[TEXT_FIELD[self.kind]]
        elif self.kind == "interleaved":
            yield from (segment["text"] for segment in self.fields["segments"] if "text" in segment)
        else:
            for message in self.fields["messages"]:
                yield from (part["text"] for part in message["content"] if part["type"] == "text")

    def content_hash(self) -> bytes:
        """16 bytes that identify text and media, wherever they were found."""
        document = json.dumps([self.kind, self.fields], sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=16)
        for media in self.media:
            digest.update(len(media.data).to_bytes(8, "little"))
            digest.update(media.data)
        return digest.digest()

    def group_hash(self) -> bytes:
        """8 bytes equal for samples that must not be divided between training and validation.

        Samples that share their first medium (one picture, captions in several languages) are one group.
        """
        if self.media:
            return hashlib.blake2b(self.media[0].data, digest_size=8).digest()
        return hashlib.blake2b(self.content_hash(), digest_size=8).digest()

    def byte_count(self) -> int:
        """Bytes of text and media together."""
        text = sum(len(text.encode("utf-8", "surrogatepass")) for text in self.texts())
        return text + sum(len(media.data) for media in self.media)
