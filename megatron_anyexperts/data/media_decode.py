"""What the feed makes of pictures and video: sizes in patches, patches, which frames of a video."""

import math

import numpy as np

from megatron_anyexperts.data.samples import SampleError


def fit_grid(
    height: int, width: int, multiple: int, patch_size: int, min_patches: int, max_patches: int
) -> tuple[int, int]:
    """(height, width) in pixels closest to the native size: multiples of `multiple`, aspect about kept,
    with a patch count inside the limits wherever the aspect ratio allows it and never above `max_patches`.

    Raises:
        SampleError: the aspect ratio is so extreme that one row or column of merged patches exceeds `max_patches`.
    """
    area = patch_size**2
    scale = 1.0
    if height * width > max_patches * area:
        scale = math.sqrt(max_patches * area / (height * width))
    elif height * width < min_patches * area:
        scale = math.sqrt(min_patches * area / (height * width))
    rows = max(1, round(height * scale / multiple))
    columns = max(1, round(width * scale / multiple))
    limit = max_patches * area // multiple**2
    while rows * columns > limit:  # rounding up may overshoot; shrink the longer side
        if rows >= columns and rows > 1:
            rows -= 1
        elif columns > 1:
            columns -= 1
        else:
            raise SampleError(f"max_patches={max_patches} is less than one merged patch; raise it")
    return rows * multiple, columns * multiple


def patchify(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut an image into flattened, normalised patches in raster order.

    Args:
        image: uint8 [h * p, w * p, 3].

    Returns:
        float32 [h * w, 3 * p * p]; channel first inside a patch; (x / 255 - 0.5) / 0.5.
    """
    rows, columns = image.shape[0] // patch_size, image.shape[1] // patch_size
    patches = image.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    return patches.reshape(rows * columns, -1).astype(np.float32) * np.float32(2 / 255) - np.float32(1)


def sample_frames(times: list[float], fps: float, max_frames: int) -> tuple[int, ...]:
    """Indices of the frames to keep: `fps` per second while that fits in `max_frames`, else spread evenly."""
    duration = times[-1] + (times[-1] / (len(times) - 1) if len(times) > 1 else 0.0)
    count = max(1, min(max_frames, len(times), round(duration * fps)))
    return tuple(int((index + 0.5) * len(times) / count) for index in range(count))
