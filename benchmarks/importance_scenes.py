"""Does importance fall on what a picture shows? The demo's model under several ways to teach importance, several seeds.

    python benchmarks/importance_scenes.py --demo runs/demo --output runs/importance

DEMO is what pretrain/demo.py made. Every run is a real pretraining of `pretrain/configs/demo.yaml` on one rank; one
that ended in OUTPUT before is only read. Printed for each setting, means over seeds with standard errors: AUC of
importance of informative against background tokens by layer, the real slots of both, held-out answers right, their
loss. "start" is a model after one step at learning rate 0: untrained importance already favours one or the other.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NO_SPREAD = ["--anyexperts-spread-loss-coeff", "0"]
NO_ALPHA = ["--anyexperts-alpha", "0"]
CENTRED = ["--anyexperts-importance-gradient", "centred"]
SETTINGS = {
    "start": ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0"],
    "plain": [],
    "plain, no spread": NO_SPREAD,
    "plain, no spread, alpha 0": [*NO_SPREAD, *NO_ALPHA],
    "centred": CENTRED,
    "centred, alpha 0": [*CENTRED, *NO_ALPHA],
    "centred, no spread": [*CENTRED, *NO_SPREAD],
    "centred, no spread, alpha 0": [*CENTRED, *NO_SPREAD, *NO_ALPHA],
}


def measure(options: argparse.Namespace, name: str, seed: int) -> dict:
    """Train and score one run; return what `anyexperts generate --evaluate --json` says.

    Raises:
        SystemExit: a step failed; names its log.
    """
    folder = options.output / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    demo, setting = options.demo, SETTINGS[name]
    shared = ["--config", "demo", "--run-dir", folder, "--tokenizer-model", demo / "shards/tokenizer", *setting]
    length = [] if "--train-iters" in setting else ["--train-iters", options.train_iters]
    training = [*length, "--seed", seed, "--eval-interval", 10**6, "--eval-iters", 0, "--save-interval", 10**6]
    training += ["--data-path", demo / "blend.yaml"]
    if "--train-iters" not in setting:
        training += ["--data-mixture-schedule", demo / "schedule.yaml"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
    call([*torchrun, "pretrain/pretrain_multimodal.py", *shared, *training], folder / "train.log")
    masks = ["--masks", demo / "raw/scenes/held_out.masks.jsonl", "--data-path", demo / "answers/blend.yaml"]
    asked = [sys.executable, "pretrain/generate.py", "--evaluate", "--json", "--other-pictures", *shared, *masks]
    printed = call([*asked], folder / "answers.log")
    result.write_text(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))
    return json.loads(result.read_text())


def call(words: list, log: Path) -> str:
    """Run one step; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    with log.open("w") as file:
        code = subprocess.call(
            [str(word) for word in words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if code:
        sys.exit(f"exit code {code}; log: {log}")
    return log.read_text(errors="replace")


def table(results: dict[str, list[dict]]) -> str:
    """Means over seeds as text, a line per setting."""
    layers = sorted(results[next(iter(results))][0]["layers"], key=int)
    heads = [f"AUC {layer}" for layer in layers] + ["real inform.", "real backgr.", "right %", "other pict. %", "loss"]
    lines = [f"{'setting':28s} {'runs':>4s} " + " ".join(f"{head:>15s}" for head in heads)]
    for name, runs in results.items():
        columns = [[run["layers"][layer]["auc"] for run in runs] for layer in layers]
        for kind in ("real_informative", "real_background"):
            columns.append([statistics.mean(one[kind] for one in run["layers"].values()) for run in runs])
        columns.append([100 * run["all"]["exact"] for run in runs])
        columns.append([100 * run["all, other pictures"]["exact"] for run in runs])
        columns.append([run["all"]["loss"] for run in runs])
        lines.append(f"{name:28s} {len(runs):4d} " + " ".join(f"{mean_and_error(column):>15s}" for column in columns))
    return "\n".join(lines)


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error over seeds, the latter from two on."""
    error = f" +- {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--train-iters", type=int, default=240, help="default: 240, as the demo")
    options = parser.parse_args()
    options.demo, options.output = options.demo.resolve(), options.output.resolve()
    results: dict[str, list[dict]] = {}
    for seed in options.seeds:
        for name in options.settings:
            results.setdefault(name, []).append(measure(options, name, seed))
            print(f"seed {seed}: {name}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
