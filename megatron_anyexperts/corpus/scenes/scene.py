"""A scene: what stands where, how it is drawn from a seed, and how it becomes pixels."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from megatron_anyexperts.corpus.scenes.art import COLOURS, STAMPS, WORDS, Art
from megatron_anyexperts.corpus.scenes.draws import Draws

CELL = 32
"""Pixels a side of a cell; a scene has two or three rows and columns of them, and nothing reaches over an edge."""

PATCH = 8
"""Pixels a side of the patches of which `covered` speaks."""

Split = Literal["train", "held_out", "combinations"]
"""``train`` and ``held_out`` are other scenes of the same kind, ``combinations`` are those that neither contains."""


@dataclass(frozen=True)
class Thing:
    """A stamp, or a word if it has a colour.

    Attributes:
        name: of the stamp, or the word itself.
        row, column: its cell, from 0.
        colour: of the word.
    """

    name: str
    row: int
    column: int
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """What is in a picture.

    Attributes:
        rows, columns: of cells.
        background: red, green and blue.
        things: with different names, in different cells; at most one is a word.
        corners: top and left of each in its cell, as draws below 2**16.
    """

    rows: int
    columns: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]
    corners: tuple[tuple[int, int], ...]

    @property
    def stamps(self) -> list[Thing]:
        """The things that are no words."""
        return [thing for thing in self.things if thing.colour is None]

    @property
    def word(self) -> Thing | None:
        """The word, if one is written."""
        return next((thing for thing in self.things if thing.colour is not None), None)


def is_held_out(one: str, other: str) -> bool:
    """Whether two stamps never meet in training, or a word never has a colour: one in eight, whatever the seed."""
    digest = hashlib.blake2b("+".join(sorted((one, other))).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % 8 == 0


def pairs(scene: Scene) -> Iterator[tuple[str, str]]:
    """Combinations of a scene that may be held out: each two stamps, and the word with its colour."""
    yield from combinations([stamp.name for stamp in scene.stamps], 2)
    if scene.word:
        yield scene.word.name, scene.word.colour


def draw_scene(draws: Draws, count: int, split: Split, square: bool = False) -> Scene:
    """Draw a scene that belongs to a split.

    Args:
        draws: decide everything.
        count: things in it, 1 to 4.
        split: scenes of ``combinations`` have at least one pair that is held out, the others none.
        square: three rows and columns always.
    """
    while True:
        scene = _draw(draws, count, square)
        if any(is_held_out(*pair) for pair in pairs(scene)) == (split == "combinations"):
            return scene


def _draw(draws: Draws, count: int, square: bool) -> Scene:
    rows, columns = (3, 3) if square else (2 + draws.below(2), 2 + draws.below(2))
    cells = draws.several(range(rows * columns), count)
    names = draws.several(tuple(STAMPS), count)
    things = [Thing(name, cell // columns, cell % columns) for name, cell in zip(names, cells, strict=True)]
    if draws.below(5) < 2:
        last = things.pop()
        things.append(Thing(draws.one(WORDS), last.row, last.column, draws.one(tuple(COLOURS))))
    # Close to what a model's input calls zero: a bright one would outweigh the things in every patch.
    background = tuple(100 + draws.below(56) for _ in range(3))
    corners = tuple((draws.below(2**16), draws.below(2**16)) for _ in things)
    return Scene(rows, columns, background, tuple(things), corners)


def render(scene: Scene, art: Art) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture, uint8 [32 * rows, 32 * columns, 3], and how many pixels of each patch are covered.

    Returns:
        the picture; int64 [4 * rows, 4 * columns], 0 to 64 pixels of things with an alpha above one half.
    """
    pixels = np.empty((CELL * scene.rows, CELL * scene.columns, 3), np.int64)
    pixels[:] = scene.background
    covered = np.zeros(pixels.shape[:2], bool)
    for thing, corner in zip(scene.things, scene.corners, strict=True):
        picture = art.picture(thing.name, thing.colour)
        height, width = picture.shape[:2]
        top = thing.row * CELL + corner[0] % (CELL - height + 1)
        left = thing.column * CELL + corner[1] % (CELL - width + 1)
        here = np.s_[top : top + height, left : left + width]
        alpha = picture[..., 3:]
        pixels[here] = (pixels[here] * (255 - alpha) + picture[..., :3] + 127) // 255
        covered[here] |= alpha[..., 0] > 127
    tiles = covered.reshape(scene.rows * CELL // PATCH, PATCH, scene.columns * CELL // PATCH, PATCH)
    return pixels.astype(np.uint8), tiles.sum((1, 3))
