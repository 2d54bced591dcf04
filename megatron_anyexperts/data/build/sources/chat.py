"""Conversations in the LLaVA/ShareGPT and OpenAI forms, with references to media."""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

from megatron_anyexperts.data.build.sample import Media, Rejected, Sample
from megatron_anyexperts.data.build.sources.media_reference import media_from
from megatron_anyexperts.data.build.sources.records import MediaSource, string

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "developer": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip

MEDIA_TYPES = ("image", "audio", "video")

TAG = re.compile("<(image|audio|video)>")


class Chat(MediaSource):
    """A conversation per record.

    LLaVA and ShareGPT: `conversations` of `from` and `value`; `<image>`, `<audio>` and `<video>` in the text stand
    for the media in `image`/`images`, `audio`/`audios`, `video`/`videos`; media without a tag open the first user
    turn. OpenAI: `messages` of `role` and `content`, a text or a list of parts.
    """

    type: ClassVar[str] = "chat"

    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        turns = list(_turns(record))
        waiting = {kind: _listed(record, kind) for kind in MEDIA_TYPES}
        messages = [{"role": role, "content": list(_parts(content, waiting))} for role, content in turns]
        _place_untagged(messages, waiting)
        media: list[Media] = []
        for message in messages:
            for part in message["content"]:
                if part["type"] != "text":
                    medium = media_from(part["media"], part["type"], self.media_root, max_bytes)
                    part["media"] = len(media)
                    media.append(medium)
        if not any(
            part["type"] == "text" and part["text"].strip()
            for message in messages
            if message["role"] == "assistant"
            for part in message["content"]
        ):
            raise Rejected("no answer in the conversation", f"roles {[role for role, _ in turns]}"[:200])
        return Sample("chat", self.with_language({"messages": messages}, record), media)


def _turns(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    messages = record.get("messages", record.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise Rejected("no conversation", f"fields {sorted(map(str, record))}"[:200])
    if isinstance(record.get("system"), str) and record["system"].strip():
        yield "system", record["system"]
    for message in messages:
        if not isinstance(message, dict):
            raise Rejected("turn is not an object", repr(message)[:200])
        name = message.get("role", message.get("from"))
        if not isinstance(name, str) or name not in ROLES:
            raise Rejected("unknown role", repr(name)[:200])
        yield ROLES[name], message.get("content", message.get("value"))


def _listed(record: dict[str, Any], kind: str) -> list[Any]:
    listed = record.get(kind) or record.get(f"{kind}s") or []
    return list(listed) if isinstance(listed, list) else [listed]


def _parts(content: Any, waiting: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Parts of one turn; tags take the next waiting medium of their kind."""
    if isinstance(content, str):
        # Splitting by a pattern with one group alternates text and kind.
        for number, piece in enumerate(TAG.split(content)):
            if number % 2:
                if not waiting[piece]:
                    raise Rejected("tag without a medium", f"<{piece}>")
                yield {"type": piece, "media": waiting[piece].pop(0)}
            elif piece.strip():
                yield {"type": "text", "text": piece.strip("\n") if TAG.search(content) else piece}
    elif isinstance(content, list):
        for part in content:
            if not isinstance(part, dict):
                raise Rejected("unknown part of a message", repr(part)[:200])
            yield _part(part)
    else:
        raise Rejected("turn without content", type(content).__name__)


def _part(part: dict[str, Any]) -> dict[str, Any]:
    name = str(part.get("type"))
    if name in ("text", "input_text", "output_text"):
        return {"type": "text", "text": string(part, "text")}
    kind = name.removeprefix("input_").removesuffix("_url")
    if kind not in MEDIA_TYPES:
        raise Rejected("unknown part of a message", name[:100])
    return {"type": kind, "media": part.get(name, part.get(kind, part.get("url", part.get("path"))))}


def _place_untagged(messages: list[dict[str, Any]], waiting: dict[str, list[Any]]) -> None:
    untagged = [{"type": kind, "media": value} for kind in MEDIA_TYPES for value in waiting[kind]]
    if untagged:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise Rejected("media without a user turn")
        first["content"] = untagged + first["content"]
