"""Turns crude WebDataset samples (JSON plus encoded media) into documents, one cooker per kind."""

import json
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from megatron.energon import Cooker, basic_sample_keys, stateless

from megatron_anyexperts.data.chat import chat_parts
from megatron_anyexperts.data.media_forms import AUDIO_DEMUXERS, IMAGE_EXTENSIONS, VIDEO_DEMUXERS
from megatron_anyexperts.data.samples import Document, Marker, Media, SampleError, Text
from megatron_anyexperts.data.shard_reader import DAMAGE
from megatron_anyexperts.media import MODALITY_CODES

Part = Text | Marker | Media

EXTENSIONS = {"image": IMAGE_EXTENSIONS, "audio": tuple(AUDIO_DEMUXERS), "video": tuple(VIDEO_DEMUXERS)}


def _media_member(sample: dict, modality: str) -> Media:
    for extension in EXTENSIONS[modality]:
        if extension in sample:
            return Media(modality, sample[extension], extension)
    raise SampleError(f"no {modality} member; the sample holds {sorted(k for k in sample if not k.startswith('__'))}")


def _media_item(sample: dict, item: dict[str, Any]) -> Media:
    """The medium that a segment or a chat item refers to: ``{"type": "image", "media": "<member extension>"}``."""
    modality, member = item.get("type"), item.get("media")
    if modality not in EXTENSIONS:
        raise SampleError(f"item type {modality!r} is not text, image, audio or video")
    if member not in sample:
        raise SampleError(f"{modality} item refers to the missing member {member!r}")
    extension = member.rpartition(".")[2]
    if extension not in EXTENSIONS[modality]:
        raise SampleError(f"member {member!r} has no known {modality} extension")
    return Media(modality, sample[member], extension)


def _text(meta: dict, field: str) -> str:
    value = meta.get(field)
    if not isinstance(value, str) or not value.strip():
        raise SampleError(f"field {field!r} is missing or empty")
    return value


def _text_parts(sample: dict, meta: dict) -> list[Part]:
    return [Text(_text(meta, "text"), True)]


def _captioned(modality: str, field: str, sample: dict, meta: dict) -> list[Part]:
    return [_media_member(sample, modality), Text(_text(meta, field), True)]


def _interleaved_parts(sample: dict, meta: dict) -> list[Part]:
    segments = meta.get("segments")
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise SampleError("field 'segments' is not a list of items")
    return [
        Text(_text(segment, "text"), True) if segment.get("type") == "text" else _media_item(sample, segment)
        for segment in segments
    ]


def _chat(sample: dict, meta: dict) -> list[Part]:
    messages = meta.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise SampleError("field 'messages' is not a list of messages")
    return chat_parts(messages, partial(_media_item, sample))


PARTS: dict[str, Callable[[dict, dict], list[Part]]] = {
    "text": _text_parts,
    "image_text": partial(_captioned, "image", "caption"),
    "audio_text": partial(_captioned, "audio", "transcript"),
    "video_text": partial(_captioned, "video", "caption"),
    "interleaved": _interleaved_parts,
    "chat": _chat,
}


def cook(kind: str, sample: dict) -> Document:
    """Cook one crude sample of a `kind`.

    Raises:
        SampleError: its shard is damaged, its JSON is unreadable or does not have what the kind needs.
    """
    if DAMAGE in sample:
        raise SampleError(sample[DAMAGE])
    try:
        meta = json.loads(sample["json"])
    except (KeyError, ValueError, RecursionError) as error:
        raise SampleError(f"unreadable JSON member: {error!r}") from error
    if not isinstance(meta, dict):
        raise SampleError("the JSON member is not an object")
    return Document(**basic_sample_keys(sample), kind=kind, parts=PARTS[kind](sample, meta))


def _cooker(kind: str) -> Cooker:
    @stateless
    @wraps(cook)
    def cook_kind(sample: dict) -> Document:
        return cook(kind, sample)

    return Cooker(cook_kind, has_subflavors={"kind": kind})


COOKERS = [_cooker(kind) for kind in PARTS]


def sample_modality(parts: list[Part]) -> int:
    """The code a sample counts under: that of its first medium, text without one."""
    return next((MODALITY_CODES[part.modality] for part in parts if isinstance(part, Media)), MODALITY_CODES["text"])
