"""Evaluate a trained model on what its data hold out.

    anyexperts evaluate --run-dir RUN [--batches 64] [--trace FOLDER] [--data-path BLEND] [flags of the training]

Prints the loss of each kind of sample with its standard error over documents, the real slots a token and layer by kind
of token and, where conversations are held out, how many are answered exactly. The ranks share the work.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_anyexperts.console import Parser, own_lines_only, say
from megatron_anyexperts.evaluation.trained_model import load_model, start
from megatron_anyexperts.training.arguments import UsageError


def parser() -> argparse.ArgumentParser:
    """The flags of this command; all others go to Megatron's parser."""
    own = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    own.add_argument("--batches", type=int, default=64, help="most held-out microbatches of a rank (default 64)")
    own.add_argument(
        "--trace", type=Path, metavar="FOLDER",
        help="trace the routing of the held-out rows into FOLDER/held_out, of the questions into FOLDER/answers",
    )
    own.add_argument(
        "--trace-positions", type=int, metavar="N", help="positions of each row that are traced (default: all)"
    )
    own.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return own


@own_lines_only
def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    own, rest = parser().parse_known_args(cli)
    try:
        if own.batches < 1:
            raise UsageError(f"--batches {own.batches} is below 1")
        if own.trace_positions is not None and own.trace_positions < 1:
            raise UsageError(f"--trace-positions {own.trace_positions} is below 1")
        args = start(rest)
        if args.pipeline_model_parallel_size > 1:
            raise UsageError("pipeline stages cannot be evaluated one by one; use expert or tensor parallelism")
        from megatron_anyexperts.evaluation.answers import AnswerScorer, score_table
        from megatron_anyexperts.evaluation.losses import held_out_losses, loss_table
        from megatron_anyexperts.evaluation.routing_trace import evaluation_tracer

        model = load_model(args)
        folders = [own.trace and own.trace / name for name in ("held_out", "answers")]
        with evaluation_tracer(args, folders[0], own.trace_positions) as tracer:
            result = held_out_losses(args, model, own.batches, tracer)
        with evaluation_tracer(args, folders[1], own.trace_positions) as tracer:
            scores = AnswerScorer.from_args(args)(model, tracer)
    except (UsageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ["RANK"] != "0":
        return 0
    if own.json:
        answers = {task: asdict(score) for task, score in scores.items()}
        say(json.dumps({"load": args.load, "iteration": args.iteration, **asdict(result), "answers": answers}))
        return 0
    say(f"checkpoint: {args.load}, iteration {args.iteration}\n{loss_table(result)}")
    if scores:
        say(f"\n{score_table(scores)}")
    return 0
