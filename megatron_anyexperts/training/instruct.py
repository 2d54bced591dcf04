"""Instruction tuning: the pretraining loop on conversations, from a pretrained model, with exact match on the way."""

from __future__ import annotations

import argparse
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from megatron_anyexperts.console import say
from megatron_anyexperts.evaluation.answers import AnswerScorer, Score, score_table
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.manifest import TRACKER
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training import pretrain
from megatron_anyexperts.training.arguments import UsageError


def check(args: argparse.Namespace) -> None:
    """Refuse what pretraining refuses, and tuning that would start from random weights.

    Raises:
        UsageError: the way out is in the message.
    """
    pretrain.check(args)
    if args.load and (Path(args.load) / TRACKER).exists():
        return
    if args.pretrained_checkpoint is None:
        raise UsageError(
            f"no checkpoint in {args.load} to resume and no --pretrained-checkpoint to start from; name the "
            "checkpoints folder of a pretraining run"
        )
    if not (Path(args.pretrained_checkpoint) / TRACKER).exists():
        raise UsageError(
            f"--pretrained-checkpoint={args.pretrained_checkpoint} holds no {TRACKER}; name the folder in which the "
            "folders iter_* lie"
        )


class HeldOutAnswers:
    """Exact match and loss per modality and task at every evaluation; see `pretrain.HeldOut`.

    With pipeline parallelism no rank has all of the model, with context parallelism none decodes whole rows; nothing is
    measured then; `generate.py --evaluate` does it on checkpoints.

    Args:
        args: Megatron's arguments.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args

    @cached_property
    def scorer(self) -> AnswerScorer:
        """Made at the first evaluation, when process groups exist."""
        return AnswerScorer.from_args(self.args)

    def measure(self, model: list[torch.nn.Module]) -> dict[str, Score]:
        """Score the held-out conversations."""
        split = self.args.pipeline_model_parallel_size > 1 or self.args.context_parallel_size > 1
        return {} if split else self.scorer(model[0])

    def log(self, measured: dict[str, Score], iteration: int, writer: Any) -> None:
        """Print the scores and write them to TensorBoard and the run's event log."""
        if not measured:
            return
        say(f"held-out answers at iteration {iteration}\n{score_table(measured)}")
        for task, score in measured.items():
            writer.add_scalar(f"exact match/{task}", score.exact, iteration)
            writer.add_scalar(f"answer loss/{task}", score.loss, iteration)
        if self.args.run_dir:
            exact = {task: score.exact for task, score in measured.items()}
            runlog.append_event(Run(Path(self.args.run_dir)), "answers", iteration=iteration, exact_match=exact)


def main(cli: list[str] | None = None) -> int:
    """Entry point of one rank; see `pretrain.main`."""
    return pretrain.main(cli, partial(pretrain.pretrain, check=check, held_out=HeldOutAnswers))
