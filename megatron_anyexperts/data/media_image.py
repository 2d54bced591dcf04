"""Reads still pictures: upright, 8 bits a channel, with limits that act before memory is spent."""

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from PIL import Image

from megatron_anyexperts.data.media_forms import IMAGE_FORMATS, MediaError, brief

_FORMATS = [name for name in IMAGE_FORMATS if name != "MPO"]  # which Pillow makes of a JPEG by itself
_ORIENTATION = 0x0112
_SWAPS_SIDES = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_END_OF_JPEG = b"\xff\xd9"


def image_size(data: bytes, max_pixels: int) -> tuple[int, int, str]:
    """(height, width, extension) of a picture as it is displayed, from its header.

    Raises:
        MediaError: no picture, or more than `max_pixels`.
    """
    return _read(data, max_pixels, lambda content: _displayed_size(content, max_pixels))


def header_needs_decoder(data: bytes) -> bool:
    """Whether `image_size` calls native decoders; for the common forms Python code reads the header."""
    if data.startswith(_PNG):
        return _tells_orientation_late(data)
    return not data.startswith(b"\xff\xd8")


def _displayed_size(data: bytes, max_pixels: int) -> tuple[int, int, str]:
    image = _open(data, max_pixels)
    width, height = image.size
    if _orientation(image, data) in _SWAPS_SIDES:
        width, height = height, width
    return height, width, IMAGE_FORMATS[image.format]


def load_image(data: bytes, max_pixels: int, at_least: tuple[int, int] | None = None) -> Image.Image:
    """A picture as it is displayed.

    Args:
        data: the file.
        max_pixels: limit.
        at_least: (height, width) that suffice; lets JPEG decoding take a short cut.

    Returns:
        Upright, of mode RGB, or RGBA where it has transparency.

    Raises:
        MediaError: damaged, no picture, or more than `max_pixels`.
    """
    return _read(data, max_pixels, lambda content: _upright(content, max_pixels, at_least))


def decode_image(data: bytes, height: int, width: int, max_pixels: int) -> np.ndarray:
    """Decode and resize a picture; transparency is laid over white.

    Returns:
        uint8 [height, width, 3].

    Raises:
        MediaError: the file is damaged or larger than `max_pixels`.
    """
    image = over_white(load_image(data, max_pixels, (height, width)))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def over_white(image: Image.Image) -> Image.Image:
    """An RGB picture of an RGB or RGBA one."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _read[T](data: bytes, max_pixels: int, read: Callable[[bytes], T]) -> T:
    """Read a picture, without its texts where they stop Pillow."""
    # Pillow's own limit also holds for the frames inside a picture. It begins to refuse at twice the figure.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return read(data)
            except ValueError as error:  # Pillow refuses large text and colour profiles, which nobody here needs
                if isinstance(error, MediaError) or not data.startswith(_PNG):
                    raise
                return read(_without_text(data))
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("too many pixels", f"{brief(error)}, limit {max_pixels}") from None
    except Exception as error:  # decoders raise whatever a hostile file provokes in them
        raise MediaError("unreadable image", brief(error)) from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _open(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise MediaError("too many pixels", f"{width} x {height}, limit {max_pixels}")
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    try:
        if image.format in ("JPEG", "MPO", "WEBP"):
            exif = image.getexif()
        elif image.format == "PNG":
            # What stands behind the pixels Pillow only knows once they are decoded.
            exif = image.getexif() if _tells_orientation_late(data) else Image.Image.getexif(image)
        else:
            return 1  # Pillow turns TIFF itself; the others have no orientation
        return exif.get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error):
        return 1  # a damaged block of camera data does not make the picture unreadable


def _upright(data: bytes, max_pixels: int, at_least: tuple[int, int] | None) -> Image.Image:
    image = _open(data, max_pixels)
    orientation = _orientation(image, data)
    if at_least is not None:
        height, width = at_least
        image.draft("RGB", (height, width) if orientation in _SWAPS_SIDES else (width, height))
    image = _to_8_bits(_pixels(image, data))
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    image = image.convert("RGBA" if transparent else "RGB")
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _pixels(image: Image.Image, data: bytes) -> Image.Image:
    try:
        image.load()
        return image
    except OSError as error:
        if image.format not in ("JPEG", "MPO") or "truncated" not in str(error):
            raise
        # Nothing but the end mark is missing if what is put before it changes no pixel.
        with suppress(OSError):
            whole, other = (_with_end(image, data.removesuffix(b"\xff") + filler) for filler in (b"", b"\x55" * 64))
            if whole.tobytes() == other.tobytes():
                return whole
        raise


def _with_end(image: Image.Image, data: bytes) -> Image.Image:
    ended = Image.open(io.BytesIO(data + _END_OF_JPEG), formats=["JPEG"])
    ended.draft("RGB", image.size)
    ended.load()
    return ended


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale modes of 16 and 32 bits, which Pillow would clip to white.

    16 bits: the full scale. 32 bits and floating point: up to 255, or up to 65,535, as they are or as 16 bits; floating
    point within 0..1 as that; anything else from its lowest to its highest finite value.
    """
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    hidden = values == transparent if isinstance(transparent, int) else None
    if image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(339, (1,)) in (1, (1,)):
        values = values.view(np.uint32)
    finite = np.isfinite(values)
    low, high = (float(limit(values[finite], initial=0.0)) for limit in (np.min, np.max))
    if image.mode.startswith("I;16"):
        full = (0.0, 65535.0)
    elif image.mode == "F" and low >= 0 and high <= 1:
        full = (0.0, 1.0)
    elif low >= 0 and high <= 65535:
        full = (0.0, 255.0 if high <= 255 else 65535.0)
    else:
        full = (low, high)
    scaled = (np.where(finite, values, full[0]).astype(np.float64) - full[0]) * (255 / (full[1] - full[0]))
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    if hidden is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk."""
    at = len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end


def _tells_orientation_late(data: bytes) -> bool:
    after = False
    for kind, start, _ in _png_chunks(data):
        after = after or kind == b"IDAT"
        if after and (kind == b"eXIf" or kind in _PNG_TEXT and data.startswith(_PNG_ORIENTATION, start + 8)):
            return True
    return False


def _without_text(data: bytes) -> bytes:
    kept = [data[start:end] for kind, start, end in _png_chunks(data) if kind not in _PNG_TEXT]
    return _PNG + b"".join(kept)
