"""Does the dispatch cap cost quality? The demo model trained with the cap off and on, from several seeds.

    python benchmarks/dispatch_cap_training.py --shards runs/demo/shards --output runs/cap

Every run is a real pretraining of `pretrain/configs/demo.yaml` on 2 ranks with EP = 2, shortened. Runs of one seed
start from the same weights and read the same data. Printed: held-out loss after the last step; the highest load of an
expert rank over the mean, of all layers, microbatches and steps; and the difference of the losses in units of the
spread over seeds. A step violates the cap if its highest load exceeds ceil((1 + eps) * R / P) / (R / P); R is at least
one real slot for each token of a microbatch, which bounds what rounding up adds.
"""

import argparse
import os
import re
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
HELD_OUT = re.compile(r"validation loss at iteration \d+ on validation set \|(.*)")


@dataclass(frozen=True)
class Outcome:
    """What one run ended with.

    Attributes:
        losses: held-out loss, nats per target, of "lm" (all) and of each modality.
        peaks: highest received load over mean of each step.
        rerouted: mean share over the steps of slots that the cap sent to another expert.
        displaced: mean share that it made virtual.
    """

    losses: dict[str, float]
    peaks: list[float]
    rerouted: float
    displaced: float


def read(folder: Path) -> Outcome | None:
    """What the run in `folder` ended with; None before it ended."""
    log = folder / "train.log"
    held_out = HELD_OUT.findall(log.read_text(errors="replace")) if log.exists() else []
    if not held_out:
        return None
    figures = re.findall(r"(\w+) loss value: (\S+)", held_out[-1])
    load = [record["routing"]["load"] for record in runlog.read_metrics(Run(folder))]
    return Outcome(
        {name: float(value) for name, value in figures},
        [step["rank_max_over_mean_peak"] for step in load],
        statistics.mean(step["rerouted_share"] for step in load),
        statistics.mean(step["displaced_share"] for step in load),
    )


def train(options: argparse.Namespace, seed: int, eps: float | None) -> Outcome:
    """Pretrain in a directory below ``--output``; a run that ended there before is only read.

    Raises:
        SystemExit: the run failed; names its log.
    """
    folder = options.output / f"seed{seed}_{'off' if eps is None else f'eps{eps}'}"
    if outcome := read(folder):
        return outcome
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards, iterations = options.shards, str(options.train_iters)
    paths = ["--data-path", shards / "blend.yaml", "--tokenizer-model", shards / "tokenizer", "--run-dir", folder]
    length = ["--train-iters", iterations, "--global-batch-size", options.global_batch_size, "--seed", seed]
    logs = ["--log-interval", 1, "--eval-interval", 10**6, "--eval-iters", options.eval_iters, "--save-interval", 10**6]
    cap = [] if eps is None else ["--anyexperts-dispatch-eps", eps]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS]
    entry = ["pretrain/pretrain_multimodal.py", "--config", CONFIG, "--expert-model-parallel-size", RANKS]
    words = [str(word) for word in (*launch, *entry, *paths, *length, *logs, *cap)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "train.log").open("w") as file:
        code = subprocess.call(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    outcome = read(folder)
    if code or outcome is None:
        sys.exit(f"the run failed with exit code {code}; see {folder}/train.log")
    return outcome


def load_limit(eps: float) -> float:
    """Highest max-over-mean load that the cap allows in any microbatch of the demo model."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    least_slots = RANKS * config["micro-batch-size"] * config["seq-length"]
    return 1 + eps + RANKS / least_slots


def print_losses(outcomes: dict[str, list[Outcome]]) -> None:
    """Print held-out losses off against on, with the difference in units of the spread over seeds."""
    off, on = outcomes.values()
    print("\n| held-out loss | cap off | spread | cap on | spread | on - off | in spreads |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in off[0].losses:
        values = [[outcome.losses[name] for outcome in side] for side in (off, on)]
        means, spreads = [statistics.mean(side) for side in values], [statistics.stdev(side) for side in values]
        difference, spread = means[1] - means[0], statistics.mean(value**2 for value in spreads) ** 0.5
        cells = [f"{mean:.4f} | {one:.4f}" for mean, one in zip(means, spreads, strict=True)]
        label = "all" if name == "lm" else name
        print(f"| {label} | {' | '.join(cells)} | {difference:+.4f} | {difference / spread:+.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="shards of the demo (pretrain/demo.py builds them)")
    parser.add_argument("--output", type=Path, required=True, help="one run directory per run goes here")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="at least two")
    parser.add_argument("--train-iters", type=int, default=60)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--eval-iters", type=int, default=8)
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error(f"--seeds {options.seeds}: a spread needs at least two")
    options.shards, options.output = options.shards.resolve(), options.output.resolve()

    limit, violations = load_limit(options.eps), 0
    outcomes: dict[str, list[Outcome]] = {"off": [], "on": []}
    print(f"eps {options.eps}: a rank may hold {limit:.4f} of the mean\n")
    print("| seed | cap | held-out loss | highest load | steps above the cap | rerouted | made virtual |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for seed in options.seeds:
        for name, eps in (("off", None), ("on", options.eps)):
            outcome = train(options, seed, eps)
            outcomes[name].append(outcome)
            above = sum(peak > limit for peak in outcome.peaks)
            violations += above * (name == "on")
            print(
                f"| {seed} | {name} | {outcome.losses['lm']:.4f} | {max(outcome.peaks):.4f} | "
                f"{above} of {len(outcome.peaks)} | {outcome.rerouted:.2%} | {outcome.displaced:.2%} |",
                flush=True,
            )
    print_losses(outcomes)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
