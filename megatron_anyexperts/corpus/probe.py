"""Find out what media bytes are, and refuse what is unreadable or outside the limits.

What is read here is what the loader reads, with the same functions, in a process that may die of it.
"""

from dataclasses import fields

from megatron_anyexperts.corpus.corpus import Limits
from megatron_anyexperts.corpus.facts import PROBES, Bounds, Facts
from megatron_anyexperts.corpus.sample import Media, Rejected
from megatron_anyexperts.data.decoder_process import DecoderProcess
from megatron_anyexperts.data.media_forms import MediaError

_DECODER = DecoderProcess(seconds=1800)  # a long video is decoded completely


def in_decoder[T](function, *arguments) -> T:
    """Call a function in the decoder process of this one.

    Raises:
        Rejected: the medium cannot be used, or killed the decoder.
    """
    try:
        return _DECODER.run(function, *arguments)
    except MediaError as error:
        raise Rejected(error.reason, error.detail) from None


def probe(media: Media, limits: Limits) -> Facts:
    """Decode one medium completely and say what it is.

    Args:
        media: the bytes and what they are expected to be.
        limits: sizes and lengths that are allowed.

    Raises:
        Rejected: unreadable, of an unknown format, outside a limit, or deadly to the decoder.
    """
    if not media.data:
        raise Rejected(f"empty {media.type} file")
    if len(media.data) > limits.max_media_bytes:
        raise Rejected("too many bytes", f"{len(media.data)} bytes, limit {limits.max_media_bytes}")
    bounds = Bounds(**{field.name: getattr(limits, field.name) for field in fields(Bounds)})
    return in_decoder(PROBES[media.type], media.data, bounds)
