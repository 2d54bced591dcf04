"""What keeping expert ranks level does to learning: the demo model trained in each way, from several seeds.

    python benchmarks/balance_training.py --shards runs/demo/shards --output runs/balance

Every run is a real pretraining of `pretrain/configs/demo.yaml` on 2 ranks with EP = 2, shortened. Runs of one seed
start from the same weights and read the same data, so differences are taken seed by seed. A run that ended is only read
again: the command goes on where it was stopped, and `--seeds` may grow. Printed: held-out loss after the last step; the
fullest expert rank over the mean, mean and highest of all layers, microbatches and steps; slots that the cap sent to
other experts, or that copies computed. "above" counts steps whose fullest rank is over the limit: 1 + eps, and what
rounding up adds (a microbatch has at least one real slot a token).
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run_directory import Run

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "pretrain/configs/demo.yaml"
RANKS = 2
WAYS = {
    "off": [],
    "cap 0.1": ["--anyexperts-dispatch-eps", "0.1"],
    "cap 0.05": ["--anyexperts-dispatch-eps", "0.05"],
    "copies 0.05": ["--anyexperts-balance", "copies", "--anyexperts-copies-eps", "0.05"],
}


@dataclass(frozen=True)
class Outcome:
    """What one run ended with.

    Attributes:
        losses: held-out loss, nats per target, of all targets and of each modality.
        peaks: highest received load over mean of each step.
        moved: mean share over the steps of slots rerouted, made virtual, and computed by copies.
    """

    losses: dict[str, float]
    peaks: list[float]
    moved: dict[str, float]


def read(folder: Path) -> Outcome | None:
    """What the run in `folder` ended with; None before it ended."""
    held_out = runlog.read_held_out(Run(folder))
    if not held_out:
        return None
    losses = {
        name.removeprefix("loss").lstrip("_") or "all": held_out[-1][name] for name in held_out[-1] if "loss" in name
    }
    load = [record["routing"]["load"] for record in runlog.read_metrics(Run(folder))]
    shares = {
        name: statistics.mean(step.get(f"{name}_share", 0.0) for step in load)
        for name in ("rerouted", "displaced", "copied")
    }
    return Outcome(losses, [step["rank_max_over_mean_peak"] for step in load], shares)


def train(options: argparse.Namespace, seed: int, way: str) -> Outcome:
    """Pretrain in a directory below ``--output``; a run that ended there before is only read.

    Raises:
        SystemExit: the run failed; names its log.
    """
    folder = options.output / f"seed{seed}_{way.replace(' ', '_')}"
    if outcome := read(folder):
        return outcome
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = ["--data-path", options.shards / "blend.yaml", "--tokenizer-model", options.shards / "tokenizer"]
    length = ["--train-iters", options.train_iters, "--global-batch-size", options.global_batch_size, "--seed", seed]
    logs = ["--log-interval", 1, "--eval-interval", 10**6, "--eval-iters", options.eval_iters, "--save-interval", 10**6]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS]
    entry = ["pretrain/pretrain_multimodal.py", "--config", CONFIG, "--expert-model-parallel-size", RANKS]
    words = [str(word) for word in (*launch, *entry, *paths, "--run-dir", folder, *length, *logs, *WAYS[way])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "train.log").open("w") as file:
        code = subprocess.call(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    outcome = read(folder)
    if code or outcome is None:
        sys.exit(f"the run failed with exit code {code}; see {folder}/train.log")
    return outcome


def load_limit(way: str) -> float | None:
    """Highest max-over-mean load that a way promises for any microbatch of the demo model."""
    if way == "off":
        return None
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return 1 + float(way.split()[1]) + RANKS / (RANKS * config["micro-batch-size"] * config["seq-length"])


def mean_and_error(values: list[float]) -> str:
    return f"{statistics.mean(values):+.4f} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def print_differences(outcomes: dict[str, list[Outcome]]) -> None:
    """Print held-out losses without any, and what each way adds to them, with standard errors over the seeds."""
    off, *others = outcomes
    print(f"\n| held-out loss | {off} | " + " | ".join(f"{way} - {off}" for way in others) + " |")
    print("|" + " --- |" * (2 + len(others)))
    for name in outcomes[off][0].losses:
        base = [outcome.losses[name] for outcome in outcomes[off]]
        cells = [
            mean_and_error([outcome.losses[name] - one for outcome, one in zip(outcomes[way], base, strict=True)])
            for way in others
        ]
        print(f"| {name} | {statistics.mean(base):.4f} | {' | '.join(cells)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="shards of the demo (pretrain/demo.py builds them)")
    parser.add_argument("--output", type=Path, required=True, help="one run directory per run goes here")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="the first is compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="at least two")
    parser.add_argument("--train-iters", type=int, default=160)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--eval-iters", type=int, default=8)
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error(f"--seeds {options.seeds}: a spread needs at least two")
    options.shards, options.output = options.shards.resolve(), options.output.resolve()

    violations, outcomes = 0, {way: [] for way in options.ways}
    print("| seed | balance | held-out loss | fullest rank, mean | highest | above | rerouted | virtual | copied |")
    print("|" + " --- |" * 9)
    for seed in options.seeds:
        for way in options.ways:
            outcome, limit = train(options, seed, way), load_limit(way)
            outcomes[way].append(outcome)
            above = 0 if limit is None else sum(peak > limit for peak in outcome.peaks)
            violations += above * way.startswith("cap")  # copies reach it where R allows
            shares = " | ".join(f"{outcome.moved[name]:.2%}" for name in ("rerouted", "displaced", "copied"))
            print(
                f"| {seed} | {way} | {outcome.losses['all']:.4f} | {statistics.mean(outcome.peaks):.4f} | "
                f"{max(outcome.peaks):.4f} | {'-' if limit is None else above} | {shares} |",
                flush=True,
            )
    print_differences(outcomes)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
