"""The conversation of a record, in whichever form it has one, as turns."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_anyexperts.corpus.sample import Rejected
from megatron_anyexperts.corpus.sources.records import named
from megatron_anyexperts.data.tool_calls import tool_call_text, tools_text

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "bot": "assistant", "ai": "assistant",
    "system": "system", "developer": "system", "tool": "tool", "function": "tool", "observation": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip

TURN_LISTS = ("messages", "conversations", "conversation")

# Question, what it is about, answer.
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
)

FORMS = f"a record has {', '.join(TURN_LISTS[:2])}, or " + ", or ".join(
    "/".join(filter(None, pair)) for pair in PAIRS[:3]
)

FIELDS = frozenset({*TURN_LISTS, *(name for pair in PAIRS for name in pair if name), "system", "tools", "history"})

LOSS_FLAGS = ("weight", "loss", "train", "training")
"""Fields of a turn that say whether it is learned: OpenAI's, and those of other tools."""

UNSUPPORTED = (
    "reasoning_content", "reasoning", "thinking", "refusal", "audio", "prefix", "train_detail", "training_detail",
)  # fmt: skip
"""Fields of a turn that change what is said or learned and for which the chat template has no place."""


@dataclass
class Turn:
    """One turn of a conversation."""

    role: str
    content: Any
    """Text, a list of parts as the record has them, or None."""
    loss: bool | None = None
    """Whether it is learned; None where the record leaves it to the role."""
    calls: str = ""
    """Text of its tool calls."""


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """The turns of a record.

    Raises:
        Rejected: it has no conversation in a known form, or something in it that would be lost.
    """
    turns = list(_opening(record))
    listed = next((record[name] for name in TURN_LISTS if isinstance(record.get(name), list) and record[name]), None)
    turns += map(_turn, listed) if listed is not None else _pair(record)
    tools = _parsed(record.get("tools"))
    if tools:
        text = _template(tools_text, tools)
        if turns[0].role != "system":
            turns.insert(0, Turn("system", text))
        elif isinstance(turns[0].content, str):
            turns[0].content += "\n\n" + text
        else:
            raise Rejected("tools beside a system turn of parts")
    return turns


def _opening(record: dict[str, Any]) -> Iterator[Turn]:
    if isinstance(record.get("system"), str) and record["system"].strip():
        yield Turn("system", record["system"])


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict):
        raise Rejected("turn is not an object", repr(message)[:200])
    name = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise Rejected("unknown role", f"{name!r}; known: {', '.join(ROLES)}"[:300])
    if lost := [field for field in UNSUPPORTED if message.get(field)]:
        raise Rejected("field of a turn that cannot be kept", f"{lost[0]}={message[lost[0]]!r}"[:200])
    content = next((message[key] for key in ("content", "value") if message.get(key) is not None), None)
    calls = _parsed(message.get("tool_calls")) or _parsed(message.get("function_call"))
    if role == "call":
        role, content, calls = "assistant", None, _parsed(content)
    text = _template(_calls_text, calls) if calls else ""
    if text and role != "assistant":
        raise Rejected("tool calls outside of an assistant turn", role)
    if content is None and not text:
        raise Rejected("turn without content", f"a {role} turn of {sorted(map(str, message))}"[:200])
    return Turn(role, content, _loss(message), text)


def _loss(message: dict[str, Any]) -> bool | None:
    flags = {name: message[name] for name in LOSS_FLAGS if message.get(name) is not None}
    if wrong := [f"{name}={flag!r}" for name, flag in flags.items() if flag not in (0, 1) or isinstance(flag, str)]:
        raise Rejected("weight of a turn is neither 0 nor 1", wrong[0][:200])
    values = set(map(bool, flags.values()))
    if len(values) > 1:
        raise Rejected("flags of a turn disagree", str(flags)[:200])
    return values.pop() if values else None


def _calls_text(calls: Any) -> str:
    return "\n".join(map(tool_call_text, calls if isinstance(calls, list) else [calls]))


def _template(write: Any, value: Any) -> str:
    try:
        return write(value)
    except ValueError as error:
        raise Rejected("unusable tools or tool calls", str(error)[:200]) from None


def _parsed(value: Any) -> Any:
    """A value that may be written as JSON in a text."""
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Rejected("unusable tools or tool calls", f"{error}: {value}"[:200]) from None
    return value


def _pair(record: dict[str, Any]) -> Iterator[Turn]:
    """A question and an answer, either of which may be a list of turns; only the answer is learned then."""
    for ask, about, answer in PAIRS:
        if record.get(ask) is None or record.get(answer) is None:
            continue
        for said in _history(record.get("history")):
            yield from said
        if isinstance(record[ask], list) and isinstance(record[answer], list):
            for message in record[ask]:
                turn = _turn(message)
                turn.loss = False if turn.role == "assistant" else turn.loss
                yield turn
            yield from map(_turn, record[answer])
            return
        texts = [record[ask], record.get(about) if about else None, record[answer]]
        if wrong := [type(text).__name__ for text in texts if text is not None and not isinstance(text, str)]:
            raise Rejected("question or answer is not text", f"{ask}, {answer}: {wrong[0]}")
        yield Turn("user", "\n".join(text for text in texts[:2] if text and text.strip()))
        yield Turn("assistant", texts[2])
        return
    raise Rejected("no conversation", f"fields {named(record)}; {FORMS}"[:300])


def _history(history: Any) -> Iterator[tuple[Turn, Turn]]:
    if history and not isinstance(history, list):
        raise Rejected("history is not a list of questions and answers", repr(history)[:200])
    for said in history or ():
        if not isinstance(said, list) or len(said) != 2 or not all(isinstance(text, str) for text in said):
            raise Rejected("history is not a list of questions and answers", repr(said)[:200])
        yield Turn("user", said[0]), Turn("assistant", said[1])
