import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from megatron_anyexperts.data.media_forms import MediaError
from megatron_anyexperts.data.media_image import decode_image, image_size, load_image, over_white

LIMIT = 10**6
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_every_mode_becomes_rgb(mode, form):
    if mode == "CMYK" and form == "PNG":
        return
    assert decode_image(encoded(Image.new(mode, (20, 10)), form), 28, 56, LIMIT).shape == (28, 56, 3)


def test_transparent_pixels_become_white():
    data = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")
    assert (decode_image(data, 8, 8, 100) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_camera_orientation_is_applied_in_every_form(form, orientation):
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.fromarray(PICTURE), form, exif=oriented(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    height, width, _ = image_size(data, LIMIT)
    assert (height, width) == expected.shape[:2] == ((48, 80) if orientation < 5 else (80, 48))
    np.testing.assert_array_equal(decode_image(data, height, width, LIMIT), expected)


def test_the_short_cut_of_jpeg_decoding_keeps_the_orientation():
    picture = Image.new("RGB", (400, 200), "black")
    picture.paste("white", (0, 0, 200, 200))  # left half
    data = encoded(picture, "JPEG", exif=oriented(6))  # displayed turned clockwise: left becomes top
    turned = decode_image(data, 40, 20, LIMIT)
    assert turned[:15].mean() > 240 and turned[25:].mean() < 15


def moved_behind_the_pixels(png: bytes, kind: bytes) -> bytes:
    at = png.index(kind) - 4
    end = at + 12 + int.from_bytes(png[at : at + 4], "big")
    return png[:at] + png[end:-12] + png[at:end] + png[-12:]


def test_orientation_behind_the_pixels_of_a_png_is_found():
    data = moved_behind_the_pixels(encoded(Image.fromarray(PICTURE), "PNG", exif=oriented(8)), b"eXIf")
    assert image_size(data, LIMIT) == (80, 48, "png")
    np.testing.assert_array_equal(decode_image(data, 80, 48, LIMIT), np.rot90(PICTURE))


def test_a_damaged_block_of_camera_data_does_not_cost_the_picture():
    data = encoded(Image.fromarray(PICTURE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_image(data, LIMIT).size == (80, 48)


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * 255).astype(np.int32), "TIFF"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
        ((RAMP * 200_000 - 100_000).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 9000 - 500).astype(np.float32), "TIFF"),
    ],
)
def test_pictures_of_16_and_32_bits_are_scaled_not_clipped(values, form):
    data = encoded(Image.fromarray(values), form)
    grey = decode_image(data, 64, 64, LIMIT)
    np.testing.assert_allclose(grey, (RAMP * 255)[:, :, None].repeat(3, 2), atol=1.5)


def test_unsigned_values_of_32_bits_are_not_taken_for_negative_ones():
    data = encoded(Image.fromarray((RAMP * (2**32 - 1)).astype(np.uint32).view(np.int32)), "TIFF")
    sample_format = struct.pack("<HHII", 339, 3, 1, 2)
    assert data.count(sample_format) == 1
    grey = decode_image(data.replace(sample_format, struct.pack("<HHII", 339, 3, 1, 1)), 64, 64, LIMIT)
    np.testing.assert_allclose(grey[:, :, 0], RAMP * 255, atol=1.5)


def test_values_that_are_not_finite_leave_the_others_alone():
    values = RAMP.astype(np.float32)
    values[0, 0], values[0, 1] = np.nan, np.inf
    grey = decode_image(encoded(Image.fromarray(values), "TIFF"), 64, 64, LIMIT)
    np.testing.assert_allclose(grey[1:, :, 0], RAMP[1:] * 255, atol=1.5)


def test_a_transparent_grey_of_16_bits_becomes_white():
    values = np.full((8, 8), 1000, np.uint16)
    values[:4] = 300
    data = encoded(Image.fromarray(values), "PNG", transparency=300)
    grey = decode_image(data, 8, 8, LIMIT)
    assert (grey[:4] == 255).all() and (grey[4:] == 4).all()


def test_a_camera_file_of_two_pictures_is_read_as_its_first():
    second = Image.new("RGB", (80, 48), "red")
    data = encoded(Image.fromarray(PICTURE), "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert image_size(data, LIMIT) == (48, 80, "jpg")
    first = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(PICTURE), "JPEG", quality=95))))
    np.testing.assert_array_equal(decode_image(data, 48, 80, LIMIT), first)


def test_a_png_with_large_texts_is_read():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("log", "x" * 3_000_000, zip=True)
    data = encoded(Image.fromarray(PICTURE), "PNG", pnginfo=info, exif=oriented(3), icc_profile=bytes(3_000_000))
    for file in (data, moved_behind_the_pixels(data, b"zTXt")):
        assert image_size(file, LIMIT) == (48, 80, "png")
        np.testing.assert_array_equal(np.asarray(load_image(file, LIMIT)), PICTURE[::-1, ::-1])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_may_lack_its_end_marker_but_no_pixels(progressive):
    data = encoded(Image.fromarray(PICTURE), "JPEG", progressive=progressive)
    whole = np.asarray(load_image(data, LIMIT))
    np.testing.assert_array_equal(np.asarray(load_image(data[:-2], LIMIT)), whole)
    np.testing.assert_array_equal(np.asarray(load_image(data[:-1], LIMIT)), whole)
    for cut in (20, len(data) // 3):
        with pytest.raises(MediaError, match="truncated"):
            load_image(data[:-cut], LIMIT)


def test_a_decompression_bomb_is_refused_by_its_header():
    data = encoded(Image.new("1", (5_000, 5_000)), "PNG")
    with pytest.raises(MediaError, match="too many pixels: .*25000000 pixels.*limit 1000"):
        image_size(data, 1000)
    with pytest.raises(MediaError, match="too many pixels: 5000 x 5000, limit 20000000"):
        image_size(data, 20_000_000)


@given(st.binary(max_size=200))
def test_random_bytes_are_rejected_not_crashed_on(data):
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"):
        with pytest.raises(MediaError):
            load_image(start + data, 1000)


def test_over_white_leaves_opaque_pictures_alone():
    assert (np.asarray(over_white(Image.fromarray(PICTURE))) == PICTURE).all()
