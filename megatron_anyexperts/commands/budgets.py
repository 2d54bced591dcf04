"""Evaluate a trained model under other slot budgets, without training it.

    anyexperts budgets --run-dir RUN --budgets 1:1 2:2 1:4:2:1.6

A budget is k_min:k_max[:target_slots[:target_real]]; k:k is a fixed top-k without virtual experts. The other flags are
those of the training. Prints one table of held-out losses against real slots; its first row is the model as trained.
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
    own.add_argument("--budgets", nargs="+", required=True, metavar="K_MIN:K_MAX[:SLOTS[:REAL]]")
    own.add_argument("--batches", type=int, default=8, help="held-out microbatches per rank (default 8)")
    own.add_argument("--passes", type=int, default=40, help="most passes over them to reach a target (default 40)")
    own.add_argument("--output", type=Path, metavar="DIR", help="folder for budgets.json and budgets.png")
    own.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return own


@own_lines_only
def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    own, rest = parser().parse_known_args(cli)
    try:
        if own.output and own.output.suffix:
            raise UsageError(f"--output {own.output}: name a folder, for budgets.json and budgets.png")
        for name in ("batches", "passes"):
            if getattr(own, name) < 1:
                raise UsageError(f"--{name} {getattr(own, name)} is below 1")
        args = start(rest)
        if args.pipeline_model_parallel_size > 1:
            raise UsageError("pipeline stages cannot be evaluated one by one; use expert or tensor parallelism")
        from megatron_anyexperts.analysis.charts import write_png
        from megatron_anyexperts.analysis.pictures import budget_curves
        from megatron_anyexperts.evaluation.budgets import TOLERANCE, Budget, budget_config, evaluate, table
        from megatron_anyexperts.evaluation.held_out import held_out_batches
        from megatron_anyexperts.training.pretrain import transformer_config

        trained = transformer_config(args)
        budgets = [Budget.parse(word) for word in own.budgets]
        plans = [(None, trained), *((budget, budget_config(args, trained, budget)) for budget in budgets)]
        model = load_model(args)
        batches = list(held_out_batches(args, own.batches))
        evaluations, trained_sums = [], None
        for budget, config in plans:
            evaluation, sums = evaluate(model, config, budget, batches, own.passes, trained_sums)
            evaluations.append(evaluation)
            trained_sums = sums if trained_sums is None else trained_sums
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ["RANK"] != "0":
        return 0
    listed = json.dumps([asdict(one) for one in evaluations], indent=2)
    say(listed if own.json else table(evaluations))
    rows = [tuple(keys) for batch in batches for keys in batch.sample_keys]
    if len(set(rows)) < len(rows):
        few = f"{len(set(rows))} of {len(rows)} held-out rows are different"
        print(f"note: {few}, so the errors are too small; lower --batches", file=sys.stderr)
    for one in evaluations:
        if one.deviation > TOLERANCE:
            off = f"a layer is still {one.deviation:.1%} off its target; see --passes"
            print(f"note: '{one.budget}': {off}", file=sys.stderr)
    if own.output:
        own.output.mkdir(parents=True, exist_ok=True)
        (own.output / "budgets.json").write_text(listed + "\n", encoding="utf-8")
        write_png(budget_curves(evaluations), own.output / "budgets.png")
    return 0
