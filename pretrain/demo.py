"""The whole path on two CPU cores: raw files, shards, pretraining with EP = 2, resuming on one rank, answers, pictures.

    python pretrain/demo.py --output runs/demo

A second call reuses the raw data and the shards and trains anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import demo_scenes

from megatron_anyexperts.console import quiet_imports
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.manifest import iteration_directory
from megatron_anyexperts.survival.run_directory import Run

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "pretrain/configs/demo.yaml"
CORPORA = ROOT / "pretrain/configs/corpora"
SAVED_AT, RESUMED_UNTIL = 120, 130


def run(title: str, *command: str | Path) -> None:
    """Run one step; its output goes to the screen.

    Raises:
        SystemExit: the step failed.
    """
    print(f"\n== {title}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    code = subprocess.call([str(word) for word in command], cwd=ROOT, env=environment)
    if code:
        sys.exit(f"'{title}' failed with exit code {code}; see above")
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


def torchrun(ranks: int) -> list[str]:
    """The words that start `ranks` processes on this machine, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def train(title: str, ranks: int, run_dir: Path, data: list[str], *flags: str) -> None:
    """Pretrain with the demo's configuration in `run_dir`."""
    run(
        title,
        *torchrun(ranks),
        "pretrain/pretrain_multimodal.py",
        *common(run_dir, data),
        *("--micro-batch-size", "4"),
        *flags,
    )


def common(run_dir: Path, data: list[str]) -> list[str]:
    """Flags that every step of the demo shares; `data` says what is read."""
    return ["--config", str(CONFIG), "--run-dir", str(run_dir), *data]


def build(title: str, corpus: str, root: Path, output: Path) -> None:
    """Build the shards of one of the demo's corpora."""
    script = [sys.executable, "data_tools/build_shards.py", CORPORA / f"{corpus}.yaml"]
    run(title, *script, "--root", root, "--output", output)


def resume_on_one_rank(uninterrupted: Path, resumed: Path, data: list[str]) -> None:
    """Continue from the middle of the 2-rank run on one rank, and compare the samples with that run's.

    Raises:
        SystemExit: the samples differ.
    """
    quiet_imports()
    from megatron_anyexperts.training.step_stats import read_sample_log

    source, target = Run(uninterrupted).checkpoints, Run(resumed).checkpoints
    shutil.copytree(iteration_directory(source, SAVED_AT), iteration_directory(target, SAVED_AT))
    until = ["--exit-interval", str(RESUMED_UNTIL), "--eval-interval", "1000", "--save-interval", "1000"]
    train(f"resume at {SAVED_AT} on 1 rank, EP = 1", 1, resumed, data, "--log-interval", "1", *until)
    before, after = read_sample_log(uninterrupted / "samples"), read_sample_log(resumed / "samples")
    for iteration in range(SAVED_AT + 1, RESUMED_UNTIL + 1):
        if before[iteration] != after.get(iteration):
            sys.exit(f"iteration {iteration}: the resumed run trained other samples than the uninterrupted one")
    samples = sum(len(after[iteration]) for iteration in range(SAVED_AT + 1, RESUMED_UNTIL + 1))
    print(f"   iterations {SAVED_AT + 1} to {RESUMED_UNTIL}: the same {samples} samples as the uninterrupted run")


def summary(run_dir: Path) -> str:
    """First and last training loss of each modality."""
    metrics = runlog.read_metrics(Run(run_dir))
    lines = []
    for name in ("text", "image", "audio"):
        losses = [record[f"loss_{name}"] for record in metrics if f"loss_{name}" in record]
        lines.append(f"   {name:6s} loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    last = metrics[-1]["routing"]["all"]
    lines.append(f"   slots per token {last['slots']:.2f}, of which real {last['real']:.2f}")
    return "\n".join(lines)


def answers(run_dir: Path, raw: Path, data: list[str]) -> None:
    """Ask about scenes that training never showed; print the scores, and where importance falls."""
    flags = ["--evaluate", "--other-pictures", "--masks", str(raw / "scenes/held_out.masks.jsonl")]
    script = [sys.executable, "pretrain/generate.py", *flags]
    run("held-out questions, and the same with exchanged pictures", *script, *common(run_dir, data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where everything goes")
    output = parser.parse_args().output.resolve()
    start = time.monotonic()
    raw, shards, pretrained, resumed = (output / name for name in ("raw", "shards", "pretrain", "resume"))
    tokenizer = ["--tokenizer-model", str(shards / "tokenizer")]
    if not raw.exists():
        run("fetch real images, speech and prose", sys.executable, "data_tools/fetch_demo_data.py", "--output", raw)
    sees = demo_scenes.available(raw)
    if sees:
        demo_scenes.make(raw, run)
    build("build shards and tokenizer", "demo", raw, shards)
    data = ["--data-path", str(shards / "blend.yaml")]
    if sees:
        build("build shards of scenes of one thing", "demo_scenes", output, output / "first")
        build("build shards of held-out questions", "demo_answers", output, output / "answers")
        data = demo_scenes.write_blend(output)
    data += tokenizer
    for folder in (pretrained, resumed):
        shutil.rmtree(folder, ignore_errors=True)
    train("pretrain on 2 ranks, EP = 2", 2, pretrained, data, "--expert-model-parallel-size", "2")
    print(summary(pretrained))
    resume_on_one_rank(pretrained, resumed, data)
    if sees:
        answers(pretrained, raw, ["--data-path", str(output / "answers/blend.yaml"), *tokenizer])
    pictures = [sys.executable, "pretrain/show_routing.py", *common(pretrained, data)]
    run("pictures", *pictures)
    run("report", sys.executable, "-m", "megatron_anyexperts", "runs", "report", pretrained)
    results = {
        "shards": shards,
        "checkpoints": pretrained / "checkpoints",
        "TensorBoard": pretrained / "tensorboard",
        "report": pretrained / "report.html",
        "pictures": pretrained / "pictures",
        "samples": pretrained / "samples",
        "log": Run(pretrained).output,
    }
    print(f"\ndone in {time.monotonic() - start:.0f} s; results:")
    print("\n".join(f"   {name:12s} {path}" for name, path in results.items()))
    (output / "results.json").write_text(json.dumps({name: str(path) for name, path in results.items()}, indent=2))


if __name__ == "__main__":
    main()
