"""Evaluate a trained model under other slot budgets, without training it.

    python pretrain/evaluate_budgets.py --config pretrain/configs/demo.yaml --run-dir RUN --budgets 1:1 2:2 1:4:2:1.6

A budget is k_min:k_max[:target_slots[:target_real]]; k:k is a fixed top-k without virtual experts. The other flags are
those of the training. Prints one table of held-out losses against real slots; its first row is the model as trained.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_anyexperts.evaluation.trained_model import load_model, start
from megatron_anyexperts.training.arguments import UsageError


def parser() -> argparse.ArgumentParser:
    """The flags of this command; all others go to Megatron's parser."""
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    own.add_argument("--budgets", nargs="+", required=True, metavar="K_MIN:K_MAX[:SLOTS[:REAL]]")
    own.add_argument("--batches", type=int, default=8, help="held-out microbatches per rank (default 8)")
    own.add_argument("--passes", type=int, default=40, help="most passes over them to reach a target (default 40)")
    own.add_argument("--output", type=Path, help="JSON file to write")
    own.add_argument("--plot", type=Path, help="PNG file to write: loss against real slots, static and dynamic")
    return own


def main() -> int:
    own, rest = parser().parse_known_args()
    try:
        for name in ("batches", "passes"):
            if getattr(own, name) < 1:
                raise UsageError(f"--{name} {getattr(own, name)} is below 1")
        args = start(rest)
        if args.pipeline_model_parallel_size > 1:
            raise UsageError("pipeline stages cannot be evaluated one by one; use expert or tensor parallelism")
        from megatron_anyexperts.analysis.pictures import budget_curves
        from megatron_anyexperts.evaluation.budgets import TOLERANCE, Budget, budget_config, evaluate, table
        from megatron_anyexperts.evaluation.held_out import held_out_batches
        from megatron_anyexperts.training.pretrain import transformer_config

        trained = transformer_config(args)
        budgets = [Budget.parse(word) for word in own.budgets]
        plans = [(None, trained), *((budget, budget_config(args, trained, budget)) for budget in budgets)]
        model = load_model(args)
        batches = list(held_out_batches(args, own.batches))
        evaluations = [evaluate(model, config, budget, batches, own.passes) for budget, config in plans]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ["RANK"] != "0":
        return 0
    print(table(evaluations))
    for one in evaluations:
        if one.deviation > TOLERANCE:
            print(f"note: '{one.budget}': a layer is still {one.deviation:.1%} off its target; see --passes")
    if own.output:
        own.output.write_text(json.dumps([asdict(one) for one in evaluations], indent=2) + "\n", encoding="utf-8")
    if own.plot:
        budget_curves(evaluations, own.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
