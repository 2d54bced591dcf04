import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.media import MediaShape

small = st.integers(1, 6)


@given(patch=small, merge=small, rows=small, columns=small, frames=small)
def test_tokens_times_merged_patches_equal_the_patches(patch, merge, rows, columns, frames):
    shape = MediaShape(patch_size=patch, spatial_merge=merge)
    height, width = rows * shape.pixel_multiple, columns * shape.pixel_multiple
    t, h, w = shape.image_grid(height, width, frames)
    assert (t, h * patch, w * patch) == (frames, height, width)
    assert shape.image_token_count((t, h, w)) * merge**2 == t * h * w


@given(stride=st.integers(1, 8).map(lambda half: 2 * half), frames=st.integers(0, 1000))
def test_audio_tokens_cover_all_frames_and_no_token_is_empty(stride, frames):
    tokens = MediaShape(audio_stride=stride).audio_token_count(frames)
    assert (tokens - 1) * stride < frames <= tokens * stride


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "patch_size=0"),
        ({"audio_stride": 3}, "audio_stride=3 must be even"),
        ({"n_mels": -1}, "n_mels=-1"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MediaShape(**fields)


@pytest.mark.parametrize("size", [(28, 27), (0, 28), (28, -28)])
def test_sizes_that_leave_a_remainder_are_refused_with_the_multiple(size):
    with pytest.raises(ValueError, match="multiples of 28"):
        MediaShape().image_grid(*size)


def test_a_grid_that_cannot_be_merged_is_refused():
    with pytest.raises(ValueError, match="3 x 4 is not a multiple of spatial_merge=2"):
        MediaShape().image_token_count((1, 3, 4))
