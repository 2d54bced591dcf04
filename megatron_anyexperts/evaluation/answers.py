"""Scores a model's answers to held-out conversations: exact match and loss, per modality and task.

Decoding greedily gives the reference answer if and only if each of its tokens is the most likely one after those before
it. Routing and attention are causal, so one forward pass over question and answer tells for all of them at once, many
conversations to a row. `tests/unit/evaluation/test_generation.py` compares with real decoding.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core import mpu
from megatron.energon import WorkerConfig
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader

from megatron_anyexperts.data.blend import open_blend
from megatron_anyexperts.data.cookers import cook
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.microbatch import LOGIT_INPUTS, collate
from megatron_anyexperts.data.packing import assemble_row, pack_rows
from megatron_anyexperts.data.samples import Document, Planned, SampleError
from megatron_anyexperts.data.shard_reader import ShardReader
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.evaluation.known_tokens import KnownTokens
from megatron_anyexperts.evaluation.routing_trace import traced
from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.training.data import data_settings
from megatron_anyexperts.training.trace import Tracer


@dataclass(frozen=True)
class Question:
    """A held-out conversation.

    Attributes:
        task: modality and name of the source it was built from, such as ``image topic``.
        document: the cooked conversation.
        planned: its tokens; targets are the answers.
    """

    task: str
    document: Document
    planned: Planned


@dataclass(frozen=True)
class Score:
    """Result of one task.

    Attributes:
        questions: conversations scored.
        exact: share of those in which every token of every answer, and its end, is right.
        loss: mean loss per answer token.
        most_frequent: share that the most frequent answer would get right: what knowing the task, but not looking at
            the medium, is worth.
    """

    questions: int
    exact: float
    loss: float
    most_frequent: float

    @property
    def error(self) -> float:
        """Standard error of `exact`."""
        return math.sqrt(self.exact * (1 - self.exact) / self.questions)


def with_other_pictures(questions: list[Question]) -> list[Question]:
    """The same questions, each with the pictures of another one of its task: what is right then needs no sight.

    Questions without pictures stay as they are, and so do those whose task has no other pictures of the same sizes.
    """
    groups: dict[tuple, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault((question.task, *question.planned.grids), []).append(index)
    changed = list(questions)
    for (_, *grids), indices in groups.items():
        if not grids:
            continue
        shown = [[frames.media.data for frames in questions[index].planned.frames] for index in indices]
        for place, index in enumerate(indices):
            turned = indices[place + 1 :] + indices[: place + 1]
            others = shown[place + 1 :] + shown[: place + 1]
            other = next((one for one, data in zip(turned, others, strict=True) if data != shown[place]), None)
            if other is not None:
                planned = replace(questions[index].planned, frames=questions[other].planned.frames)
                changed[index] = replace(questions[index], planned=planned)
    return changed


def document_encoder(args: argparse.Namespace) -> DocumentEncoder:
    """The encoder that the run's loaders use."""
    settings = data_settings(args)
    vocabulary = Vocabulary(settings["tokenizer"])
    return DocumentEncoder(settings["config"], settings["shape"], vocabulary, settings["seq_length"])


def read_questions(args: argparse.Namespace, encoder: DocumentEncoder) -> Iterator[Question]:
    """Yield the conversations in the ``val`` split of ``--data-path``, in shard order; unusable ones are left out.

    Args:
        args: Megatron's arguments.
        encoder: from `document_encoder`.
    """
    config = encoder.config
    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    for entry in open_blend(data_settings(args)["blend"], "val", config, alone).datasets:
        dataset = entry.dataset
        if dataset.subflavors["kind"] != "chat":
            continue
        reader = ShardReader(
            ShardInfosITarReader(dataset.path, dataset.shards), config.data_storage_retries, config.data_storage_backoff
        )
        for crude in map(reader.__getitem__, range(len(reader))):
            try:
                document = cook("chat", crude)
                [planned] = encoder.plan(document)
            except SampleError:
                continue
            source = str(json.loads(crude["json"]).get("origin", "chat")).partition(":")[0]
            yield Question(f"{MODALITIES[planned.sample_modality]} {source}", document, planned)


class AnswerScorer:
    """Scores conversations; all ranks call it together.

    Needs the whole model on each rank of a data-parallel group: pipeline parallelism is not supported.

    Args:
        encoder: tokenizes and decodes, as in training.
        questions: what is asked; the same on all ranks.
        micro_batch_size: rows of a forward pass.
    """

    def __init__(self, encoder: DocumentEncoder, questions: list[Question], micro_batch_size: int):
        self.encoder = encoder
        self.known = KnownTokens(encoder.vocabulary)
        self.questions = questions
        self.micro_batch_size = micro_batch_size

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> AnswerScorer:
        """For the conversations held out in ``--data-path``."""
        encoder = document_encoder(args)
        return cls(encoder, list(read_questions(args, encoder)), args.micro_batch_size)

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, tracer: Tracer | None = None) -> dict[str, Score]:
        """Return the score of each task.

        Args:
            model: in evaluation mode; called once per microbatch on every rank.
            tracer: traces the routing of what counts.
        """
        if not self.questions:
            return {}
        results_Q4 = self.each(model, tracer)
        names = [question.task for question in self.questions]
        tasks = sorted(set(names))
        places = torch.tensor([tasks.index(name) for name in names])
        sums_T4 = torch.zeros(len(tasks), 4, dtype=torch.float64).index_add_(0, places, results_Q4)
        return {
            task: Score(int(count), exact / count, loss / targets, self._most_frequent(task))
            for task, (count, exact, loss, targets) in zip(tasks, sums_T4.tolist(), strict=True)
        }

    @torch.no_grad()
    def each(self, model: torch.nn.Module, tracer: Tracer | None = None) -> torch.Tensor:
        """Return the result of each question, fp64 [Q, 4] on the host: 1, exact, sum of losses in nats, targets.

        Args:
            model, tracer: see `__call__`.
        """
        device = torch.device(torch.cuda.current_device())
        results_Q4 = torch.zeros(len(self.questions), 4, dtype=torch.float64, device=device)
        rows = pack_rows([question.planned.size for question in self.questions], self.encoder.limits)
        width = self.micro_batch_size
        batches = [rows[start : start + width] for start in range(0, len(rows), width)]
        rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        # Expert parallelism needs every rank in every pass: ranks without a batch of their own repeat one, uncounted.
        for start in range(0, len(batches), ranks):
            numbers = batches[(start + rank) % len(batches)]
            mine = [[self.questions[index] for index in row] for row in numbers]
            counts = start + rank < len(batches)
            results = self._score(model, mine, device, tracer if counts else None)
            if counts:
                for number, result in zip((number for row in numbers for number in row), results, strict=True):
                    results_Q4[number] = result
        torch.distributed.all_reduce(results_Q4, group=mpu.get_data_parallel_group())
        return results_Q4.cpu()

    def _score(
        self, model: torch.nn.Module, rows: list[list[Question]], device: torch.device, tracer: Tracer | None
    ) -> Iterator[torch.Tensor]:
        """Yield (1, exact, sum of losses, targets) of each conversation, row by row."""
        encoder = self.encoder
        pad_id, end_id = (encoder.vocabulary.special[name] for name in ("<|pad|>", "<|endoftext|>"))
        arrays = [
            assemble_row(
                [encoder.decode(question.planned) for question in row], encoder.limits[0], encoder.shape, pad_id
            )
            for row in rows
        ]
        keys = [[question.document.__key__ for question in row] for row in rows]
        tasks = [[question.task for question in row] for row in rows]
        batch = collate(arrays, keys).to(device)
        labels_BS, mask_BS = batch["labels"], (batch["loss_mask"] > 0) & (batch["labels"] != end_id)
        with traced(tracer, batch, len(rows), tasks):
            logits_BSV = model(**batch.select((*LOGIT_INPUTS, "segment_ids")), runtime_gather_output=True)
        logits_BSV = self.known(logits_BSV.float())
        wrong_BS = (logits_BSV.argmax(-1) != labels_BS) & mask_BS
        losses_BS = torch.nn.functional.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, reduction="none")
        for number, row in enumerate(rows):
            for segment in range(1, len(row) + 1):
                own_S = batch["segment_ids"][number] == segment
                targets = mask_BS[number][own_S].sum()
                loss = (losses_BS[number] * mask_BS[number])[own_S].sum()
                yield torch.stack([targets.new_ones(()), ~wrong_BS[number][own_S].any(), loss, targets]).double()

    def _most_frequent(self, task: str) -> float:
        answers = Counter(
            tuple(question.planned.tokens[question.planned.target].tolist())
            for question in self.questions
            if question.task == task
        )
        return max(answers.values()) / answers.total()


def score_table(scores: dict[str, Score], shuffled: dict[str, Score] | None = None) -> str:
    """The scores as text, a line per task and one for all of them.

    Args:
        scores: by task.
        shuffled: the same of `with_other_pictures`.
    """
    head = f"{'task':24s} {'questions':>9s} {'exact match':>16s} {'most frequent':>13s}"
    lines = [head + (f" {'other pictures':>16s}" if shuffled else "") + f" {'loss':>7s}"]
    for task, score in ({**scores, "all": together(scores)} if len(scores) > 1 else scores).items():
        line = f"{task:24s} {score.questions:9d} {_share(score):>16s} {score.most_frequent:13.1%}"
        if shuffled:
            line += f" {_share(shuffled[task] if task in shuffled else together(shuffled)):>16s}"
        lines.append(f"{line} {score.loss:7.3f}")
    return "\n".join(lines)


def _share(score: Score) -> str:
    return f"{score.exact:.1%} +- {score.error:.1%}"


def together(scores: dict[str, Score]) -> Score:
    """All tasks as one: means over questions; a constant answer is one for each task."""
    count = sum(score.questions for score in scores.values())
    means = (
        sum(score.questions * getattr(score, name) for score in scores.values()) / count
        for name in ("exact", "loss", "most_frequent")
    )
    return Score(count, *means)
