"""ARO (Yuksekgonul et al. 2023), relations and attributes: a crop's true caption is likelier than a swapped one."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from megatron_anyexperts.data.samples import Media
from megatron_anyexperts.evaluation.benchmarks.items import (
    Benchmark,
    BenchmarkError,
    Item,
    Rate,
    by_group,
    fields_of,
    image_file,
    macro,
    rate,
    read_json,
)

_FIELDS = ("image_path", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "false_caption", "true_caption")


def _crop(medium: Media, box: tuple[int, int, int, int]) -> Media:
    """The part of an image from x, y on that is w wide and h high."""
    x, y, width, height = box
    with Image.open(io.BytesIO(medium.data)) as image:
        part, file = image.convert("RGB").crop((x, y, x + width, y + height)), io.BytesIO()
    part.save(file, "png")
    return Media("image", file.getvalue(), "png")


def read(kind: str, path: Path, images: Path) -> list[Item]:
    """Read ``visual_genome_relation.json`` or ``visual_genome_attribution.json``.

    Args:
        kind: "relation" or "attribution".
        path: of the file.
        images: folder that image paths are relative to.

    Raises:
        BenchmarkError: another file, or an image is missing.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path} is not a list of captions")
    found = []
    for number, row in enumerate(rows):
        where = f"{path}: entry {number}"
        name, *box, false, true = fields_of(row, _FIELDS, where)
        [group] = fields_of(row, ("relation_name",) if kind == "relation" else ("attributes",), where)
        group = group if kind == "relation" else "_".join(map(str, group))
        crop = _crop(image_file(images, name), tuple(box))
        found.append(Item(str(number), (crop,), None, (false, true), 1, {kind: group}))
    return found


def scores(kind: str, items: Sequence[Item], right: Sequence[bool]) -> dict[str, Rate]:
    """Mean over relations (pairs of attributes), over items, and each of them."""
    each = by_group(items, right, kind)
    return {"macro accuracy": macro(each.values()), "accuracy": rate(right)} | each


ARO_RELATION, ARO_ATTRIBUTION = (
    Benchmark(functools.partial(read, kind), functools.partial(scores, kind)) for kind in ("relation", "attribution")
)
