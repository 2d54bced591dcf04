"""Evaluate a trained model on what its data hold out.

    anyexperts evaluate --run-dir RUN [--batches 64] [--trace FOLDER] [--data-path BLEND] [flags of the training]
    anyexperts evaluate --run-dir RUN --tasks gqa=testdev_balanced_questions.json:images [scienceqa=FILE.parquet ...]

Prints the loss of each kind of sample with its standard error over documents, the real slots a token and layer by kind
of token and, where conversations are held out, how many are answered exactly. The ranks share the work. With --tasks:
the published benchmarks of the user's copy instead, see docs/benchmarks.md.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    own.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME=FILE[:IMAGES]",
        help="benchmarks instead: aro_attribution, aro_relation, gqa, nlvr2, scienceqa",
    )
    own.add_argument("--limit", type=int, metavar="N", help="with --tasks: the first N items of each")
    own.add_argument(
        "--length-normalised", action="store_true", help="with --tasks: choose by the mean loss of an answer's tokens"
    )
    own.add_argument(
        "--collapse", type=int, metavar="N",
        help="measure instead whether representations collapse, on the first N held-out tokens of rank 0",
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
        if own.collapse is not None and own.collapse < 2:
            raise UsageError(f"--collapse {own.collapse} is below 2")
        if own.limit is not None and own.limit < 1:
            raise UsageError(f"--limit {own.limit} is below 1")
        from megatron_anyexperts.evaluation.benchmarks.tasks import Task

        tasks = [Task.parse(word) for word in own.tasks]
        args = start(rest)
        if args.pipeline_model_parallel_size > 1:
            raise UsageError("pipeline stages cannot be evaluated one by one; use expert or tensor parallelism")
        from megatron_anyexperts.evaluation.answers import AnswerScorer, score_table
        from megatron_anyexperts.evaluation.losses import held_out_losses, loss_table
        from megatron_anyexperts.evaluation.routing_trace import evaluation_tracer

        model = load_model(args)
        if tasks:
            return _benchmarks(own, args, model, tasks)
        if own.collapse is not None:
            return _collapse(own, args, model)
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


def _benchmarks(own: argparse.Namespace, args: argparse.Namespace, model: Any, tasks: list[Any]) -> int:
    from megatron_anyexperts.evaluation.answers import document_encoder
    from megatron_anyexperts.evaluation.benchmarks.scorer import benchmark_table, evaluate
    from megatron_anyexperts.evaluation.routing_trace import evaluation_tracer

    encoder, results = document_encoder(args), {}
    for task in tasks:
        with evaluation_tracer(args, own.trace and own.trace / task.name, own.trace_positions) as tracer:
            found = evaluate(task, model, encoder, args, own.limit, own.length_normalised, tracer)
        results[task.name] = found
    if os.environ["RANK"] == "0" and own.json:
        tables = {name: asdict(result) for name, result in results.items()}
        say(json.dumps({"load": args.load, "iteration": args.iteration, "tasks": tables}))
    elif os.environ["RANK"] == "0":
        say(f"checkpoint: {args.load}, iteration {args.iteration}\n{benchmark_table(results)}")
    return 0


def _collapse(own: argparse.Namespace, args: argparse.Namespace, model: Any) -> int:
    from megatron_anyexperts.analysis.routing.collapse import measure_collapse
    from megatron_anyexperts.analysis.routing.findings import Findings
    from megatron_anyexperts.analysis.routing.shown import as_json, text
    from megatron_anyexperts.evaluation.held_out import held_out_batches
    from megatron_anyexperts.evaluation.hidden_states import hidden_states

    if args.tensor_model_parallel_size > 1 or args.anyexperts_stock_moe:
        raise UsageError("--collapse needs this project's layers, and whole ones: no tensor parallelism")
    states = hidden_states(model, held_out_batches(args, own.batches), own.collapse)
    if os.environ["RANK"] != "0":
        return 0
    found = Findings()
    for number, each in states.items():
        for quantity, value in measure_collapse(each).items():
            found.figures.setdefault(quantity, {})[f"layer {number}, {len(each.expert_N)} tokens"] = value
    say(json.dumps(as_json(found)) if own.json else text(found))
    return 0
