"""ScienceQA (Lu et al. 2022): multiple choice, many questions without a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet

from megatron_anyexperts.data.samples import Media
from megatron_anyexperts.evaluation.benchmarks.items import (
    Benchmark,
    BenchmarkError,
    Item,
    Rate,
    by_group,
    fields_of,
    rate,
)

INSTRUCTION = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"


def read(path: Path, _images: Path | None = None) -> list[Item]:
    """Read a parquet file of question, choices, answer (number), hint, subject and image (or null).

    Raises:
        BenchmarkError: a row lacks something, or its answer is no choice.
    """
    found = []
    for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist()):
        where = f"{path}: row {number}"
        question, choices, answer = fields_of(row, ("question", "choices", "answer"), where)
        if not 0 <= answer < len(choices) <= len(LETTERS):
            raise BenchmarkError(f"{where} has the answer {answer} of {len(choices)} choices")
        data = (row.get("image") or {}).get("bytes")
        images = () if data is None else (Media("image", data, "jpg" if data[:2] == b"\xff\xd8" else "png"),)
        lines = [f"Context: {row['hint']}"] if row.get("hint") else []
        lines += [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
        groups = {"image": "with image" if images else "without image"}
        groups |= {"subject": row["subject"]} if row.get("subject") else {}
        letters = tuple(LETTERS[: len(choices)])
        found.append(Item(str(number), images, "\n".join([*lines, INSTRUCTION]), letters, answer, groups))
    return found


def scores(items: Sequence[Item], right: Sequence[bool]) -> dict[str, Rate]:
    """Accuracy, by subject, and with and without image."""
    return {"accuracy": rate(right)} | by_group(items, right, "subject") | by_group(items, right, "image")


SCIENCE_QA = Benchmark(read, scores, needs_images=False)
