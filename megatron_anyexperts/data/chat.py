"""The chat template: ChatML turns, with the loss on what the assistant says unless a turn says otherwise."""

from collections.abc import Callable
from typing import Any

from megatron_anyexperts.data.samples import Marker, Media, SampleError, Text

ROLES = ("system", "user", "assistant", "tool")


def chat_parts(messages: list[dict[str, Any]], media: Callable[[dict], Media]) -> list[Text | Marker | Media]:
    """Lay out a conversation as document parts.

    A turn is ``<|im_start|>role\\ncontent<|im_end|>\\n``. Assistant content and its closing token are targets, so that
    the model learns to stop; everything else is context. ``"loss": true`` or ``false`` in a message overrides that.

    Args:
        messages: ``{"role": ..., "content": str or list of {"type": "text", "text": ...} and media items}``.
        media: turns a media item into its `Media`.

    Raises:
        SampleError: no turn with content to learn, an unknown role or a malformed message.
    """
    parts: list[Text | Marker | Media] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise SampleError(f"chat role {role!r} is not one of {', '.join(ROLES)}")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise SampleError(f"content of a {role} message is neither text nor a list of items")
        target = message.get("loss", role == "assistant")
        if not isinstance(target, bool):
            raise SampleError(f"loss={target!r} of a {role} message is neither true nor false")
        parts += [Marker("<|im_start|>"), Text(f"{role}\n", False)]
        for item in items:
            if item.get("type") != "text":
                parts.append(media(item))
            elif isinstance(item.get("text"), str):
                parts.append(Text(item["text"], target))
            else:
                raise SampleError(f"text item of a {role} message has no text")
        parts += [Marker("<|im_end|>", target), Text("\n", False)]
    if not any(isinstance(part, Text) and part.target and part.text for part in parts):
        raise SampleError("chat without an assistant turn to learn")
    return parts
