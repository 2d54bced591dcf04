"""Host memory that a save, and the load that resumes, needs beyond what training holds: ours, and Megatron's own.

    python benchmarks/save_memory.py --shards DEMO/shards --output /tmp/save_memory

Real training runs of two sizes over two and four data-parallel ranks on CPU, in bf16 with the distributed optimizer.
Each saves after every step and reads its checkpoint back at once. A rank's peak is the kernel's (VmHWM, set back
before) over what was resident before; the median over steps, of the rank that needs most. A shard is what that rank
wrote; `planned` is what `anyexperts plan` says of it. Megatron's four ranks of the large size need 16 GB.

Megatron's `fully_reshardable` is this tree without two repairs. Its peak counts what ranks exchange, of one bucket at a
time, which on a GPU is device memory.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

MIB = 2**20
ROOT = Path(__file__).resolve().parents[1]
FFN = {"small": 1024, "large": 4096}
RANKS = (2, 4)
STEPS = 4
FLAGS = {
    **{"config": ROOT / "pretrain/configs/demo.yaml", "hidden-size": 256, "num-attention-heads": 4},
    **{"micro-batch-size": 1, "global-batch-size": 4, "train-iters": STEPS, "lr-warmup-iters": 1, "log-interval": 1},
    **{"save-interval": 1, "eval-iters": 0, "keep-last-checkpoints": 1},
}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def growth(action) -> int:
    """Run it; bytes by which the resident set grew at most."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def train(kind: str, output: Path) -> int:
    """Be one rank of a run that measures its saves and loads."""
    from megatron_anyexperts.platform import megatron as upstream
    from megatron_anyexperts.survival.manifest import iteration_directory
    from megatron_anyexperts.training import checkpoints, pretrain

    if kind == "megatron":
        gathers = ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable")
        upstream.REPAIRS = tuple(repair for repair in upstream.REPAIRS if repair.attribute not in gathers)
    records: list[dict[str, int]] = []
    save = checkpoints.Checkpoints.save

    def measured(self, iteration: int, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **named: Any) -> None:
        from megatron.training import get_args

        args, rank = get_args(), os.environ["RANK"]
        saved = growth(lambda: save(self, iteration, model, optimizer, scheduler, *rest, **named))
        folder = iteration_directory(Path(args.save), iteration)
        written = sum(file.stat().st_size for file in folder.glob(f"__{rank}_*.distcp"))
        loaded = growth(lambda: self.load(model, optimizer, scheduler))
        records.append({"shard": written, "save": saved, "load": loaded})
        (output / f"rank{rank}.json").write_text(json.dumps(records))

    checkpoints.Checkpoints.save = measured
    return pretrain.main()


def flags_of(ffn: int, options: argparse.Namespace) -> list[str]:
    """The command line of a run, its directory apart."""
    flags = FLAGS | {"moe-ffn-hidden-size": ffn, "data-path": options.shards / "blend.yaml"}
    flags |= {"tokenizer-model": options.tokenizer or options.shards / "tokenizer"}
    return [*(str(word) for name, value in flags.items() for word in (f"--{name}", value)), "--bf16"]


def planned(ffn: int, ranks: int, options: argparse.Namespace) -> float:
    """Bytes that a rank writes by the formula of `anyexperts plan`."""
    from megatron_anyexperts.checks.plan_config import layout_from, parse_flags, precision_from, vocabulary_rows
    from megatron_anyexperts.checks.plan_save import save
    from megatron_anyexperts.checks.plan_sizes import sizes_from

    args = parse_flags(flags_of(ffn, options))
    rows, _ = vocabulary_rows(args, None)
    return save(sizes_from(args, rows), layout_from(args, ranks), precision_from(args), 1.0).shard


def run(kind: str, ffn: int, ranks: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train once; medians of each rank, the first step left out: it makes what stays.

    Raises:
        SystemExit: the run failed; names its log.
    """
    folder = options.output / f"{kind}_{ffn}_{ranks}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [*flags_of(ffn, options), "--run-dir", str(folder / "run")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # Freed blocks go back to the kernel, so that a later save shows what it needs.
    memory = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **memory, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        code = subprocess.call(
            [*launch, __file__, *words],
            cwd=ROOT,
            env={**environment, "SAVE_MEMORY": f"{kind} {folder}", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if code:
        sys.exit(f"the run failed with exit code {code}; see {folder}/log")
    found = []
    for file in sorted(folder.glob("rank*.json")):
        columns = defaultdict(list)
        for record in json.loads(file.read_text())[1:]:
            for name, value in record.items():
                columns[name].append(value)
        found.append({name: statistics.median(values) for name, values in columns.items()})
    shutil.rmtree(folder / "run")
    return found


def cell(ranks: list[dict[str, float]], name: str) -> str:
    """The rank that needs most: MiB, and multiple of its shard."""
    worst = max(ranks, key=lambda rank: rank[name])
    return f"{worst[name] / MIB:,.0f} ({worst[name] / worst['shard']:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="shards of the demo (pretrain/demo.py builds them)")
    parser.add_argument("--tokenizer", type=Path, help="where it is not beside the shards")
    parser.add_argument("--output", type=Path, required=True, help="runs and logs go here")
    options = parser.parse_args()
    options.shards, options.output = options.shards.resolve(), options.output.resolve()

    print("MiB beyond training, and multiples of a rank's shard\n")
    print("| checkpoint | ranks | shard | planned | save | load | save, Megatron | load, Megatron |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for ffn in FFN.values():
        for ranks in RANKS:
            ours, theirs = (run(kind, ffn, ranks, options) for kind in ("ours", "megatron"))
            whole = sum(rank["shard"] for rank in ours)
            worst = max(worst, *(rank[name] / rank["shard"] for rank in ours for name in ("save", "load")))
            cells = [cell(side, name) for side in (ours, theirs) for name in ("save", "load")]
            sizes = [whole, max(rank["shard"] for rank in ours), planned(ffn, ranks, options)]
            whole, shard, plan = (f"{size / MIB:,.0f}" for size in sizes)
            print(f"| {whole} | {ranks} | {shard} | {plan} | {' | '.join(cells)} |", flush=True)
    print(f"\nat most {worst:.2f} times a rank's shard")
    return int(worst > 2)


if __name__ == "__main__":
    if "SAVE_MEMORY" in os.environ:
        kind, folder = os.environ["SAVE_MEMORY"].split(" ", 1)
        sys.exit(train(kind, Path(folder)))
    sys.exit(main())
