"""One JSON array of records, as LLaVA's own files are: cut at its elements and never held whole.

Elements are found by their brackets alone and parsed one by one, so each has an offset to be read again from, a damaged
one costs only itself, and its size is limited before it is parsed; a parser of JSON events offers none of these.
"""

import re
from collections.abc import Iterator
from io import BufferedReader

from megatron_anyexperts.corpus.sample import Rejected
from megatron_anyexperts.corpus.sources.lines import Line

BLOCK = 2**20

_IN_STRING = re.compile(rb'["\\]')
_OUTSIDE = re.compile(rb'["\[\]{},]')


def skip_space(file: BufferedReader) -> int:
    """Pass over a byte order mark and white space; return the offset reached."""
    position = 0
    if file.peek(3).startswith(b"\xef\xbb\xbf"):
        position += len(file.read(3))
    while block := file.peek(1):
        rest = block.lstrip()
        position += len(file.read(len(block) - len(rest)))
        if rest:
            break
    return position


def elements(file: BufferedReader, position: int, max_bytes: int) -> Iterator[Line]:
    """Elements of an array with their offsets.

    Args:
        file: stands behind the opening bracket of the array or behind a comma between elements.
        position: offset of that place.
        max_bytes: longest element.
    """
    held, size, depth, quoted, start, last = bytearray(), 0, 0, False, 0, b""
    while block := file.read1(BLOCK):
        begin = 0
        while match := (_IN_STRING if quoted else _OUTSIDE).search(block, start):
            start, token = match.end(), match[0]
            if quoted:
                quoted = token != b'"'
                start += quoted  # what follows a backslash means nothing
            elif token == b'"':
                quoted = True
            elif token in b"[{":
                depth += 1
            elif depth:
                depth -= token != b","
            else:
                # A bracket that nothing opened is as good a border as a comma: damage stays with its element.
                held += block[begin : match.start()]
                size += match.start() - begin
                yield from _element(held, size, position, max_bytes)
                # Nothing may stand between two commas, and nothing behind the array.
                if token == b"}" or last == b"]" or token == last == b"," and not held.strip() and size <= max_bytes:
                    yield position + size, Rejected("damaged JSON", f"{token.decode()} is not expected here")
                position += size + 1
                held, size, begin, last = bytearray(), 0, start, token
        size += len(block) - begin
        if size <= max_bytes:
            held += block[begin:]
        start = max(0, start - len(block))
    if size > len(held) or held.strip():
        yield position, Rejected("damaged JSON", f"the array is not closed; its last {size} bytes are no element")
    elif last != b"]":
        yield position, Rejected("damaged JSON", "the array is not closed")


def _element(held: bytearray, size: int, position: int, max_bytes: int) -> Iterator[Line]:
    if size > max_bytes:
        yield position, Rejected("too many bytes", f"an element of {size} bytes, limit {max_bytes}")
    elif held.strip():
        yield position, bytes(held)
