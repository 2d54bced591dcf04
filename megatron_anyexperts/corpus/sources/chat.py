"""Conversations with media, in the forms that people keep them in."""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

from megatron_anyexperts.corpus.sample import Media, Rejected, Sample
from megatron_anyexperts.corpus.sources.records import MediaSource, string
from megatron_anyexperts.corpus.sources.turns import FIELDS, Turn, turns_of

MEDIA_TYPES = ("image", "audio", "video")

TAG = re.compile("<(image|audio|video)>")


class Chat(MediaSource):
    """A conversation per record.

    LLaVA and ShareGPT: `conversations` of `from` and `value`; `<image>`, `<audio>` and `<video>` in the text stand
    for the media in `image`/`images`, `audio`/`audios`, `video`/`videos`. OpenAI, TRL and Hugging Face: `messages` of
    `role` and `content`, a text or a list of parts; parts without a medium of their own take the next one. Media that
    nothing refers to follow the last one of their kind that something does, or open the first user turn. Alpaca,
    prompt and completion: see `turns.PAIRS`.
    """

    type: ClassVar[str] = "chat"
    fields: ClassVar[frozenset[str]] = FIELDS | {f"{kind}{ending}" for kind in MEDIA_TYPES for ending in ("", "s")}

    def sample(self, record: dict[str, Any], max_bytes: int) -> Sample:
        turns = turns_of(record)
        waiting = {kind: _Waiting(_listed(record, kind)) for kind in MEDIA_TYPES}
        messages = [_message(turn, waiting) for turn in turns]
        _place_untagged(messages, waiting)
        media: list[Media] = []
        for message in messages:
            for part in message["content"]:
                if part["type"] != "text":
                    medium = self.medium(part["media"], part["type"], max_bytes)
                    part["media"] = len(media)
                    media.append(medium)
        _check_answers(messages)
        return Sample("chat", self.with_language({"messages": messages}, record), media)


class _Waiting:
    """The media of one kind of a record, which its turns take one by one."""

    def __init__(self, media: list[Any]):
        self.media, self._taken = media, [False] * len(media)

    def take(self, index: int | None = None) -> Any:
        """The next medium, or that of a number; None where there is none."""
        index = self._taken.index(False) if index is None and not all(self._taken) else index
        if index is None or not 0 <= index < len(self.media):
            return None
        self._taken[index] = True
        return self.media[index]

    def left(self) -> list[Any]:
        """Media that were not taken."""
        return [medium for medium, taken in zip(self.media, self._taken, strict=True) if not taken]


def _listed(record: dict[str, Any], kind: str) -> list[Any]:
    listed = record.get(kind) or record.get(f"{kind}s") or []
    return list(listed) if isinstance(listed, list) else [listed]


def _message(turn: Turn, waiting: dict[str, _Waiting]) -> dict[str, Any]:
    parts = list(_parts(turn.content, turn.role, waiting))
    if turn.calls:
        text = "\n" if parts and parts[-1]["type"] == "text" else ""
        parts.append({"type": "text", "text": text + turn.calls})
    # Said only where it is not what the role says.
    different = turn.loss is not None and turn.loss != (turn.role == "assistant")
    return {"role": turn.role, "content": parts} | ({"loss": turn.loss} if different else {})


def _parts(content: Any, role: str, waiting: dict[str, _Waiting]) -> Iterator[dict[str, Any]]:
    """Parts of one turn; tags, and parts that name no medium, take the next waiting medium of their kind."""
    if isinstance(content, str):
        yield from _tagged(content, role, waiting)
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            if not isinstance(part, dict):
                raise Rejected("unknown part of a message", repr(part)[:200])
            if part.get("type") in ("text", "input_text", "output_text"):
                text = string(part, "text")
                waits = any(waiting[kind].left() for kind in TAG.findall(text))
                yield from _tagged(text, role, waiting) if waits else [{"type": "text", "text": text}]
            else:
                yield _medium(part, waiting)
    elif content is not None:
        raise Rejected("turn without content", type(content).__name__)


def _tagged(text: str, role: str, waiting: dict[str, _Waiting]) -> Iterator[dict[str, Any]]:
    start, cut = 0, False
    for tag in TAG.finditer(text):
        medium = waiting[tag[1]].take()
        if medium is None:
            if not waiting[tag[1]].media and _is_html(text, tag, role):
                continue
            raise Rejected("tag without a medium", f"{tag[0]} in a {role} turn; the record names too few")
        yield from _text(text[start : tag.start()].strip("\n"))
        yield {"type": tag[1], "media": medium}
        start, cut = tag.end(), True
    yield from _text(text[start:].strip("\n") if cut else text)


def _text(text: str) -> Iterator[dict[str, Any]]:
    if text.strip():
        yield {"type": "text", "text": text}


def _is_html(text: str, tag: re.Match, role: str) -> bool:
    """Whether a tag is talk about HTML, which knows `<video>` and `<audio>`, rather than the place of a lost medium."""
    if tag[1] == "image":
        return False
    before, after = text[: tag.start()], text[tag.end() :]
    alone = before.rpartition("\n")[2].strip() == "" and after.partition("\n")[0].strip() == ""
    opens_or_ends = not before.strip() or not after.strip()
    return role != "user" or f"</{tag[1]}>" in after or not (alone or opens_or_ends)


def _medium(part: dict[str, Any], waiting: dict[str, _Waiting]) -> dict[str, Any]:
    name = str(part.get("type"))
    kind = name.removeprefix("input_").removesuffix("_url")
    if kind not in MEDIA_TYPES:
        known = "text, image, image_url, input_audio, audio, video, video_url"
        raise Rejected("unknown part of a message", f"{name[:100]}; known: {known}")
    # Tables give every part all keys, most of them null.
    own = [part[key] for key in (name, kind, "url", "path", "media") if part.get(key) is not None]
    if own:
        return {"type": kind, "media": own[0]}
    index = part.get("index")
    medium = waiting[kind].take(index if isinstance(index, int) else None)
    if medium is None:
        raise Rejected("part without a medium", f"{name} names none, the record has {len(waiting[kind].media)}")
    return {"type": kind, "media": medium}


def _check_answers(messages: list[dict[str, Any]]) -> None:
    learned = [message for message in messages if message.get("loss", message["role"] == "assistant")]
    if not any(map(_says_something, learned)):
        raise Rejected("no answer in the conversation", f"roles {[message['role'] for message in messages]}"[:200])
    if not all(map(_says_something, learned)):
        raise Rejected("empty answer", "a turn that is learned has no text: the model would learn to say nothing")


def _says_something(message: dict[str, Any]) -> bool:
    return any(part["type"] == "text" and part["text"].strip() for part in message["content"])


def _place_untagged(messages: list[dict[str, Any]], waiting: dict[str, _Waiting]) -> None:
    """Keep the order of the media of a kind: those left over come behind those that have a place."""
    opening = []
    for kind in MEDIA_TYPES:
        left = [{"type": kind, "media": medium} for medium in waiting[kind].left()]
        placed = [
            (message["content"], number)
            for message in messages
            for number, part in enumerate(message["content"])
            if part["type"] == kind
        ]
        if left and placed:
            content, number = placed[-1]
            content[number + 1 : number + 1] = left
        else:
            opening += left
    if opening:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise Rejected("media without a user turn")
        first["content"] = opening + first["content"]
