"""What scenes are made of: real stamps, shrunk, and rendered words; whole numbers only, so that all bytes agree.

A picture of something is premultiplied: int64 [height, width, 4] of red * alpha, green * alpha, blue * alpha, alpha.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

STAMPS = {
    "frog": "animals/amphibians/frog-1", "crow": "animals/birds/crow", "magpie": "animals/birds/magpie",
    "pelican": "animals/birds/pelican", "gull": "animals/birds/seagull", "turkey": "animals/birds/turkey",
    "ladybug": "animals/insects/cartoon/ladybug-2", "dolphin": "animals/mammals/aquatic/dolphin",
    "cow": "animals/mammals/bovines/cow", "tiger": "animals/mammals/cats/tiger", "dog": "animals/mammals/dogs/dog",
    "pig": "animals/mammals/pig", "koala": "animals/marsupials/koala", "sombrero": "clothes/hats/sombrero",
    "strawberry": "food/fruit/Strawberry2", "banana": "food/fruit/banana", "orange": "food/fruit/cartoon/orange",
    "pear": "food/fruit/cartoon/pear", "eggplant": "food/vegetables/eggplant", "camera": "hobbies/camera_35mm",
    "snowman": "people/cartoon/snowman", "daffodil": "plants/flowers/daffodil",
    "airplane": "vehicles/flight/planes/747", "basketball": "sports/basketball",
}  # fmt: skip
"""Name of each stamp, and its file in the folder `images` of fetch_demo_data.py, without ``.png``."""

WORDS = ("cat", "sun", "red", "map", "fox", "hat", "key", "bus", "owl", "ice", "jam", "zip")

COLOURS = {"black": (20, 20, 20), "crimson": (200, 20, 40), "green": (10, 120, 40), "blue": (30, 50, 200)}
"""Colours in which words are written, as red, green and blue."""

SIDE = 28
"""Longer side of a stamp, in pixels."""


class ArtError(ValueError):
    """Something that scenes are made of is missing; the message says how to get it."""


class Art:
    """Pictures of stamps and words.

    Args:
        images: folder `images` of fetch_demo_data.py.

    Raises:
        ArtError: a stamp is missing.
    """

    def __init__(self, images: Path):
        missing = [name for name, file in STAMPS.items() if not (images / f"{file}.png").is_file()]
        if missing:
            raise ArtError(
                f"{images} lacks {len(missing)} of {len(STAMPS)} stamps ({', '.join(missing[:4])}, ...); they come "
                "with data_tools/fetch_demo_data.py where Debian's packages can be reached"
            )
        self._stamps = {name: _stamp(images / f"{file}.png") for name, file in STAMPS.items()}

    def picture(self, name: str, colour: str | None = None) -> np.ndarray:
        """A stamp, or a word in one of `COLOURS`."""
        return self._stamps[name] if colour is None else _word(name, colour)


def _stamp(path: Path) -> np.ndarray:
    rgba = np.asarray(Image.open(path).convert("RGBA"), np.int64)
    return shrink(np.concatenate((rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]), axis=2), SIDE)


def shrink(picture: np.ndarray, side: int) -> np.ndarray:
    """Average the pixels of a premultiplied picture until its longer side is `side`; smaller ones stay as they are."""
    longer = max(picture.shape[:2])
    if longer <= side:
        return picture
    for axis, length in enumerate(picture.shape[:2]):
        wanted = max(1, length * side // longer)
        edges = np.arange(wanted + 1) * length // wanted
        shape = [-1 if dimension == axis else 1 for dimension in range(3)]
        picture = np.add.reduceat(picture, edges[:-1], axis=axis) // np.diff(edges).reshape(shape)
    return picture


@cache
def _word(word: str, colour: str) -> np.ndarray:
    # Pillow's bitmap font is part of Pillow; outlines would look different with every version of FreeType.
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), word, fill=255, font=font)
    alpha = np.asarray(image, np.int64)
    larger = [np.arange(length * 3 // 2) * 2 // 3 for length in alpha.shape]
    alpha = alpha[np.ix_(*larger)][..., None]
    return np.concatenate((np.array(COLOURS[colour]) * alpha, alpha), axis=2)
