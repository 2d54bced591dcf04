"""Texts that are what a server said instead of a document: error pages that were saved under its name."""

import re
from http import HTTPStatus

_ERRORS = {status.value: status.phrase.lower() for status in HTTPStatus if status >= 400}
_PHRASES = "|".join(sorted(map(re.escape, {*_ERRORS.values(), "page not found", "file not found", "access denied"})))
_CODES = "|".join(map(str, _ERRORS))

# The whole of a short text: "404: Not Found", "HTTP/1.1 502 Bad Gateway", "Error 403 - Forbidden".
_LINE = re.compile(rf"(http/[\d.]+\s+|https?\s+|error\W+)*({_CODES})\W*(error\W*)?({_PHRASES})\W*", re.IGNORECASE)

_HTML = re.compile(r"(<\?xml[^>]*>|<!--.*?-->|\s)*<(!doctype\s+html|html|error)\b", re.IGNORECASE | re.DOTALL)
_HEADING = re.compile(r"<(title|h1|code|message)\b[^>]*>(.*?)</\1", re.IGNORECASE | re.DOTALL)
_SAYS_ERROR = re.compile(
    rf"\b({_CODES})\b.*({_PHRASES}|error)|^\W*({_PHRASES}|nosuchkey)\b|^(\W|error)*({_CODES})\W*$", re.I
)

_LOOKED_AT = 4096
"""Characters of a page in which its headings are looked for."""


def failed_download(text: str) -> str | None:
    """What shows that a text is an error page, None for documents.

    Args:
        text: the whole text of a sample.
    """
    text = text.strip()
    if len(text) < 100 and _LINE.fullmatch(text):
        return text
    if _HTML.match(text := text[:_LOOKED_AT]):
        for heading in _HEADING.finditer(text):
            said = " ".join(heading[2].split())[:200]
            if _SAYS_ERROR.search(said):
                return said
    return None
