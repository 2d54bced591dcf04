"""One question of a benchmark, what a model made of it, and rates of right answers with their errors."""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_anyexperts.data.samples import Media


class BenchmarkError(ValueError):
    """A file is not what the benchmark's readers expect."""


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        key: the benchmark's own name of it.
        images: in order, before the prompt.
        prompt: the user's turn; None: the candidates are captions of the image, without a conversation.
        candidates: answers of which the likeliest is chosen; a single one has to be generated exactly.
        right: number of the right one.
        groups: what it is counted under, such as a subject.
    """

    key: str
    images: tuple[Media, ...]
    prompt: str | None
    candidates: tuple[str, ...]
    right: int
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """Share of right answers, its standard error over items, and how many there are."""

    value: float
    error: float
    items: int


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read and scored.

    Attributes:
        read: questions of a file and a folder of images (None where images lie in the file).
        scores: rates by name, the headline first, of items and whether each was right.
        needs_images: whether a folder has to be named.
    """

    read: Callable[[Path, Path | None], list[Item]]
    scores: Callable[[Sequence[Item], Sequence[bool]], dict[str, Rate]]
    needs_images: bool = True


def rate(right: Iterable[bool]) -> Rate:
    """The mean of right answers, with a binomial standard error; NaN of none."""
    values = list(right)
    if not values:
        return Rate(math.nan, math.nan, 0)
    mean = sum(values) / len(values)
    return Rate(mean, math.sqrt(mean * (1 - mean) / len(values)), len(values))


def by_group(items: Sequence[Item], right: Sequence[bool], kind: str) -> dict[str, Rate]:
    """The rate of each group of a kind, by name; items without one are left out."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for item, correct in zip(items, right, strict=True):
        if kind in item.groups:
            groups[item.groups[kind]].append(correct)
    return {name: rate(groups[name]) for name in sorted(groups)}


def macro(rates: Iterable[Rate]) -> Rate:
    """The mean of rates, each counting the same; its error from theirs."""
    rates = list(rates)
    if not rates:
        return Rate(math.nan, math.nan, 0)
    error = math.sqrt(sum(each.error**2 for each in rates)) / len(rates)
    return Rate(sum(each.value for each in rates) / len(rates), error, sum(each.items for each in rates))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BenchmarkError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON: {error}") from error


@functools.lru_cache(maxsize=4096)
def image_file(folder: Path, name: str, extensions: tuple[str, ...] = ("jpg", "png", "jpeg")) -> Media:
    """The image of a name with or without extension.

    Raises:
        BenchmarkError: there is none.
    """
    paths = [folder / name, *(folder / f"{name}.{extension}" for extension in extensions)]
    for path in paths:
        if path.suffix and path.is_file():
            return Media("image", path.read_bytes(), path.suffix.removeprefix(".").lower())
    raise BenchmarkError(f"there is no image {name} in {folder}")


def fields_of(row: dict[str, Any], names: Sequence[str], where: str) -> list[Any]:
    """The named fields of a row.

    Raises:
        BenchmarkError: one is missing.
    """
    if missing := [name for name in names if row.get(name) is None]:
        raise BenchmarkError(f"{where} has no {', '.join(missing)}")
    return [row[name] for name in names]
