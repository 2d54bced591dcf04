"""Media inside of records: bytes, base64, data URLs, or paths below a folder."""

import base64
import binascii
from pathlib import Path
from typing import Any

from megatron_anyexperts.corpus.sample import Media, Rejected
from megatron_anyexperts.corpus.sources.base import read_referenced


def media_from(value: Any, kind: str, root: Path, max_bytes: int, follow_links: bool = False) -> Media:
    """The medium that a value of a record stands for.

    Args:
        value: bytes, a data URL, a path below `root`, or a mapping with `bytes` or `path` (as Hugging Face
            data sets have it), `url` or `data` (as OpenAI messages have it).
        kind: image, audio or video.
        root: folder that paths are relative to and may not leave.
        max_bytes: larger media are refused.
        follow_links: whether links may lead out of `root`.

    Raises:
        Rejected: nothing usable; remote media are not fetched.
    """
    if isinstance(value, dict):
        named = [value[name] for name in ("bytes", "data", "path", "url") if value.get(name)]
        if not named:
            raise Rejected("no media", str(sorted(map(str, value)))[:200])
        if value.get("data") is named[0] and isinstance(named[0], str):
            return Media(kind, _base64(named[0], max_bytes))
        value = named[0]
    if isinstance(value, bytes):
        if len(value) > max_bytes:
            raise Rejected("too many bytes", f"{len(value)} bytes, limit {max_bytes}")
        return Media(kind, value)
    if isinstance(value, str) and value.startswith("data:"):
        header, comma, content = value.partition(",")
        if not comma or not header.endswith(";base64"):
            raise Rejected("data URL is not base64", header[:100])
        return Media(kind, _base64(content, max_bytes))
    if isinstance(value, str) and "://" in value[:16]:
        raise Rejected("remote media are not fetched", value[:200])
    return Media(kind, read_referenced(root, value, max_bytes, follow_links))


def _base64(text: str, max_bytes: int) -> bytes:
    if len(text) > max_bytes * 4 // 3 + 4:
        raise Rejected("too many bytes", f"{len(text)} characters of base64, limit {max_bytes} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("damaged base64", str(error)[:200]) from None
