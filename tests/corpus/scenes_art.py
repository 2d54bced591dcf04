"""Stand-ins for the stamps of Debian's package: plain shapes, the same bytes everywhere."""

from pathlib import Path

import numpy as np
from PIL import Image

from megatron_anyexperts.corpus.scenes.art import STAMPS


def write_stamps(images: Path) -> Path:
    """Write a picture for every stamp, each of another colour and size, half transparent at the border."""
    for number, file in enumerate(STAMPS.values()):
        height, width = 40 + 3 * number, 100 - 2 * number
        pixels = np.zeros((height, width, 4), np.uint8)
        pixels[...] = (10 * number, 255 - 10 * number, 37 * number % 256, 100)
        pixels[4:-4, 4:-4, 3] = 255
        target = images / f"{file}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)
    return images
