"""GQA (Hudson and Manning 2019): questions of several steps about one picture, exact match, balanced split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet

from megatron_anyexperts.evaluation.benchmarks.items import (
    Benchmark,
    BenchmarkError,
    Item,
    Rate,
    by_group,
    fields_of,
    image_file,
    rate,
    read_json,
)

INSTRUCTION = "Answer the question using a single word or phrase."


def read(path: Path, images: Path) -> list[Item]:
    """Read ``testdev_balanced_questions.json`` (a mapping of id to question), or a parquet file of instructions.

    Questions that say they are not of the balanced split are left out.

    Raises:
        BenchmarkError: another file, or an image is missing.
    """
    if path.suffix == ".parquet":
        rows = {row["id"]: row for row in pyarrow.parquet.read_table(path).to_pylist()}
    else:
        rows = read_json(path)
    if not isinstance(rows, dict):
        raise BenchmarkError(f"{path} is not a mapping of question ids to questions")
    found = []
    for key, row in rows.items():
        image, question, answer = fields_of(row, ("imageId", "question", "answer"), f"{path}: question {key}")
        if row.get("isBalanced") is False:
            continue
        types = {kind: name for kind, name in (row.get("types") or {}).items() if name and kind != "detailed"}
        prompt = f"{question}\n{INSTRUCTION}"
        found.append(Item(str(key), (image_file(images, str(image)),), prompt, (str(answer),), 0, types))
    return found


def scores(items: Sequence[Item], right: Sequence[bool]) -> dict[str, Rate]:
    """Accuracy, and that of each structural and semantic type."""
    parts = {kind: by_group(items, right, kind) for kind in ("structural", "semantic")}
    named = {f"{kind} {name}": each for kind, rates in parts.items() for name, each in rates.items()}
    return {"accuracy": rate(right)} | named


GQA = Benchmark(read, scores)
