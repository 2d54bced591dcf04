"""NLVR2 (Suhr et al. 2019): whether a statement is true of two pictures; accuracy, and consistency by statement."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from megatron_anyexperts.evaluation.benchmarks.items import (
    Benchmark,
    BenchmarkError,
    Item,
    Rate,
    fields_of,
    image_file,
    rate,
)

LABELS = ("True", "False")


def read(path: Path, images: Path) -> list[Item]:
    """Read JSON lines of sentence, label and identifier ``split-set-pair-sentence``.

    Args:
        path: of the file.
        images: folder of ``split-set-pair-img0.png`` and ``-img1.png``.

    Raises:
        BenchmarkError: another file, or an image is missing.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BenchmarkError(f"{where} is not JSON: {error}") from error
        sentence, label, identifier = fields_of(row, ("sentence", "label", "identifier"), where)
        pair, _, last = identifier.rpartition("-")
        if str(label) not in LABELS or pair.count("-") < 2:
            raise BenchmarkError(f"{where} has label {label!r} and identifier {identifier!r}")
        two = tuple(image_file(images, f"{pair}-img{side}") for side in (0, 1))
        prompt = f"{sentence}\nIs this true of the two images? Answer True or False."
        statement = f"{pair.rpartition('-')[0]}-{last}"
        found.append(Item(identifier, two, prompt, LABELS, LABELS.index(str(label)), {"statement": statement}))
    return found


def scores(items: Sequence[Item], right: Sequence[bool]) -> dict[str, Rate]:
    """Accuracy, and consistency: the share of statements that are judged rightly with all of their pairs."""
    statements: dict[str, list[bool]] = defaultdict(list)
    for item, correct in zip(items, right, strict=True):
        statements[item.groups["statement"]].append(correct)
    return {"accuracy": rate(right), "consistency": rate(all(each) for each in statements.values())}


NLVR2 = Benchmark(read, scores)
