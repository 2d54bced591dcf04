"""The text beside a medium: `NAME.txt`, or a `NAME.json` of texts by language or of metadata with a caption."""

import json
import re
from collections.abc import Callable
from typing import Any

from megatron_anyexperts.corpus.sample import Rejected
from megatron_anyexperts.corpus.sources.base import decode_text

TEXT_NAMES = ("text", "caption", "transcript")
"""Fields of a record about one medium that hold its text, in the order in which they are looked for."""

LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*")

METADATA = frozenset({"url", "uri", "src", "sha", "md", "key", "uid", "ext", "alt", "tag", "pid", "crc"})
"""Names of metadata that look like codes of languages."""

Text = tuple[str | None, str]
"""Language, where it is known, and text."""


def sidecar_texts(
    read: Callable[[str], bytes | None], field: str, language: str | None, languages: list[str] | None
) -> list[Text]:
    """The texts of a medium.

    A `.json` from language to text gives a text per language. Any other `.json` is metadata, such as img2dataset
    writes: then the text is that of the `.txt`, or the metadata's own text, caption or transcript.

    Args:
        read: content of the file beside the medium with an extension; None where there is none.
        field: what the text is called.
        language: of a text that does not say its own.
        languages: which ones to take of several; None takes all.

    Raises:
        Rejected: there is no text, or none in the chosen languages.
    """
    document = read(".json")
    meta = None if document is None else _parse(decode_text(document))
    if (by_language := _by_language(meta, languages)) is not None:
        return by_language
    if (text := read(".txt")) is not None:
        return [(language, decode_text(text).strip())]
    if isinstance(meta, dict):
        for name in TEXT_NAMES:
            if isinstance(meta.get(name), str):
                own = meta.get("language")
                return [(own if isinstance(own, str) and 0 < len(own) <= 35 else language, meta[name].strip())]
    if document is None:
        raise Rejected(f"no {field} beside the file", "neither .txt nor .json")
    found = f"fields {sorted(meta)}" if isinstance(meta, dict) else type(meta).__name__
    accepted = f'{{"en": "text", ...}} or one of the fields {", ".join(TEXT_NAMES)}, or a .txt'
    raise Rejected("no text in the sidecar", f"{found[:150]}; wanted: {accepted}")


def _parse(document: str) -> Any:
    try:
        return json.loads(document)
    except (ValueError, RecursionError) as error:
        raise Rejected("damaged JSON", str(error)[:200]) from None


def _by_language(meta: Any, languages: list[str] | None) -> list[Text] | None:
    """The chosen texts of a mapping from language to text; None for anything else."""
    if not isinstance(meta, dict) or not meta:
        return None
    if languages is not None and (chosen := [(code, meta[code]) for code in meta if code in languages]):
        if wrong := [code for code, text in chosen if not isinstance(text, str)]:
            found = type(meta[wrong[0]]).__name__
            raise Rejected("sidecar is no mapping from language to text", f"{wrong[0]} is {found}")
        return chosen
    if not all(isinstance(text, str) and LANGUAGE.fullmatch(code) for code, text in meta.items()):
        return None
    if METADATA & meta.keys():
        return None
    if languages is not None:
        raise Rejected("no text in the chosen languages", f"has {sorted(meta)}"[:200])
    return list(meta.items())
