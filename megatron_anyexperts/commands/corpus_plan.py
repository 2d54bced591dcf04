"""Plan a mixture: from corpora, shares and a token budget to epochs, load and Energon blends.

    corpora: {web: shards/web}            # folders of built corpora
    planned:                              # sizes of those that are not built yet, by kind
      speech:
        audio: {samples: 200000000, bytes: 9000000000000, tokens: {text: 6e9, audio: 3e10}, shards: 18000}
    stages:
      - {name: pretrain, tokens: 1e12, shares: {web: 0.8, speech: 0.2}}
      - {name: anneal, tokens: 5e10, shares: {web/chat: 1.0}}
    training: {global_batch: 2048, sequence_length: 8192, step_seconds: 4.0, data_parallel: 512}

Prints tokens, epochs, samples, shards and storage of each stage, and what the loader must sustain; warns about
repetition. A share is one of tokens, not of samples. With --output it writes DIR/blend-STAGE.yaml for a run of each
stage, and for one run through all of them DIR/blend.yaml and DIR/schedule.yaml (--data-mixture-schedule).
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from megatron_anyexperts.corpus.mixture import (
    MixtureError,
    StagePlan,
    Training,
    blend,
    corpus_parts,
    load_mixture,
    plan_stage,
    schedule,
    warnings,
)
from megatron_anyexperts.corpus.summary import table
from megatron_anyexperts.files import atomic_file


def describe(plan: StagePlan, training: Training) -> str:
    """A stage as text."""
    rows = [
        [use.part.name, use.tokens, f"{use.tokens / plan.tokens:.1%}", f"{use.epochs:.3f}", use.samples]
        + [use.part.shards, f"{use.part.bytes / 1e9:,.3f}", f"{use.weight:.6f}"]
        for use in plan.uses
    ]
    header = ["part", "tokens", "share", "epochs", "samples", "shards", "GB stored", "weight"]
    modalities = ", ".join(f"{name} {count:,}" for name, count in plan.modality_tokens.items() if count)
    ranks, nodes = training.data_parallel, -(-training.data_parallel // training.ranks_per_node)
    hours = plan.steps * training.step_seconds / 3600
    return "\n".join(
        [
            f"stage {plan.name}: {plan.tokens:,} tokens, {plan.steps:,} steps, {hours:,.1f} hours",
            table(rows, header),
            f"tokens by modality: {modalities}",
            f"read in all: {plan.bytes / 1e12:,.3f} TB, {plan.samples:,} samples",
            f"the loader must sustain, in all:  {plan.tokens_per_second:,.0f} tokens/s, {_load(plan, 1)}",
            f"  each of {ranks} ranks: {_load(plan, ranks)};  each of {nodes} nodes: {_load(plan, nodes)}",
        ]
    )


def _load(plan: StagePlan, readers: int) -> str:
    return f"{plan.samples_per_second / readers:,.2f} samples/s, {plan.bytes_per_second / 1e6 / readers:,.3f} MB/s"


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("mixture", type=Path, metavar="MIXTURE.yaml", help="corpora, stages and training set-up")
    own.add_argument("--output", type=Path, metavar="DIR", help="folder for blends and schedule")
    own.add_argument("--json", action="store_true", help="print JSON")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(cli)
    try:
        mixture = load_mixture(args.mixture)
        corpora = corpus_parts(mixture, args.mixture.parent)
        plans = [plan_stage(stage, corpora, mixture.training) for stage in mixture.stages]
        if args.json:
            print(json.dumps([asdict(plan) for plan in plans], default=str))
        for plan in [] if args.json else plans:
            print(describe(plan, mixture.training), end="\n\n")
        for warning in warnings(mixture, plans):
            print(f"WARNING: {warning}", file=sys.stderr)
        if args.output:
            files = {f"blend-{plan.name}": blend([plan], args.output) for plan in plans}
            files |= {"blend": blend(plans, args.output), "schedule": schedule(plans, mixture.training)}
            for name, content in files.items():
                path = args.output / f"{name}.yaml"
                with atomic_file(path, args.output) as file:
                    file.write(yaml.safe_dump(content, sort_keys=False).encode())
                print(path, file=sys.stderr)
    except MixtureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
