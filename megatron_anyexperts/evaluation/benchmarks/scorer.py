"""Asks a model the questions of a benchmark: the likeliest candidate, or the one answer generated exactly."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_anyexperts.data.chat import chat_parts
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.samples import Document, Text
from megatron_anyexperts.evaluation.answers import AnswerScorer, Question
from megatron_anyexperts.evaluation.benchmarks.items import Item, Rate
from megatron_anyexperts.evaluation.benchmarks.tasks import BENCHMARKS, Task
from megatron_anyexperts.training.trace import Tracer


@dataclass(frozen=True)
class Result:
    """Rates of a benchmark, the headline first.

    Attributes:
        rates: by name.
        unusable: items that do not fit a row or whose image cannot be read; they count as wrong.
    """

    rates: dict[str, Rate]
    unusable: int


def document_of(item: Item, candidate: str) -> Document:
    """The conversation, or the captioned image, in which a candidate is the answer."""
    if item.prompt is None:
        parts = [*item.images, Text(candidate, True)]
    else:
        media = [{"type": "image", "medium": medium} for medium in item.images]
        turn = {"role": "user", "content": [*media, {"type": "text", "text": item.prompt}]}
        parts = chat_parts([turn, {"role": "assistant", "content": candidate}], lambda item: item["medium"])
    kind = "image_text" if item.prompt is None else "chat"
    return Document(__key__=item.key, __restore_key__=(), __subflavors__={}, kind=kind, parts=parts)


def chosen(losses: Sequence[float], targets: Sequence[float], normalised: bool) -> int:
    """Number of the likeliest candidate, by the sum of its tokens' losses or by their mean; the first of equal ones."""
    return int(np.argmin([loss / count if normalised else loss for loss, count in zip(losses, targets, strict=True)]))


def evaluate(
    task: Task,
    model: torch.nn.Module,
    encoder: DocumentEncoder,
    args: argparse.Namespace,
    limit: int | None = None,
    normalised: bool = False,
    tracer: Tracer | None = None,
) -> Result:
    """Score a benchmark; all ranks call it together.

    Args:
        task: what to read.
        model: in evaluation mode.
        encoder: from `answers.document_encoder`.
        args: for its micro batch size.
        limit: the first so many items only.
        normalised: choose by the mean loss of a candidate's tokens, not by the sum.
        tracer: traces the routing.

    Raises:
        BenchmarkError: the files are not the benchmark's.
    """
    benchmark = BENCHMARKS[task.name]
    items = benchmark.read(task.path, task.images)[:limit]
    questions, place = [], []
    for item in items:
        asked = _questions(encoder, item, task.name)
        place.append(range(len(questions), len(questions) + len(asked)) if asked else None)
        questions += asked
    results_Q4 = np.zeros((0, 4))
    if questions:
        results_Q4 = AnswerScorer(encoder, questions, args.micro_batch_size).each(model, tracer).numpy()
    right = []
    for item, numbers in zip(items, place, strict=True):
        if numbers is None:
            right.append(False)
            continue
        _, exact, losses, targets = results_Q4[list(numbers)].T
        right.append(bool(exact[0]) if len(numbers) == 1 else chosen(losses, targets, normalised) == item.right)
    return Result(benchmark.scores(items, right), sum(numbers is None for numbers in place))


def _questions(encoder: DocumentEncoder, item: Item, task: str) -> list[Question]:
    """One for each candidate; none where one of them cannot be asked."""
    asked = []
    for candidate in item.candidates:
        document = document_of(item, candidate)
        try:
            [planned] = encoder.plan(document)
        except ValueError:  # a medium, a length, or a text in several pieces
            return []
        asked.append(Question(task, document, planned))
    return asked


def benchmark_table(results: dict[str, Result]) -> str:
    """The rates as text, a block for each benchmark."""
    width = max(len(name) for result in results.values() for name in result.rates)
    lines = []
    for task, result in results.items():
        lines.append(f"{task:{width + 2}s} {'items':>7s} {'rate':>16s}")
        for name, each in result.rates.items():
            lines.append(f"  {name:{width}s} {each.items:7d} {f'{each.value:.1%} +- {each.error:.1%}':>16s}")
        if result.unusable:
            lines.append(f"  {result.unusable} items do not fit a row or have no readable image; they count as wrong")
    return "\n".join(lines)
