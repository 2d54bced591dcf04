"""The steps of `gpu.sh`, in their order: command, time limit, what they need, and the figures they leave."""

from __future__ import annotations

import json
import re
import socket
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine import Machine

FP8 = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Least compute capability; tests hold it to the doctor's."""
PROXY = "ling_mini_2_0_anyexperts_proxy_1gpu"
SMALL_PROXY = "ling_mini_2_0_anyexperts_proxy_cpu"
LOCAL = (
    *("--transformer-impl", "local", "--unset", "moe-grouped-gemm", "--no-rope-fusion", "--no-persist-layer-norm"),
    *("--no-masked-softmax-fusion", "--unset", "recompute-granularity", "--unset", "recompute-modules"),
)
"""Flags of a training without Transformer Engine."""
SHORT = (
    *("--train-iters", "8", "--global-batch-size", "8", "--log-interval", "1", "--eval-interval", "100"),
    *("--eval-iters", "1", "--lr-warmup-iters", "1", "--lr-wsd-decay-iters", "1", "--save-interval", "100"),
)
LING_VOCABULARY = ("--make-vocab-size-divisible-by", "157184")
"""Rows of Ling's table, whatever tokenizer the small corpus has: its logits take a good part of the memory."""
NEEDS_GPU = "needs a GPU"
NEEDS_TE = "needs Transformer Engine"


@dataclass(frozen=True)
class Step:
    """One measurement.

    Args:
        name: for `--only`.
        title: what is measured.
        shown: the command as the page prints it.
        limit: seconds.
        command: words for a machine and the folder of all steps.
        figures: reads them from that folder and from the step's output.
        lacks: what the machine lacks for it; None if nothing.
    """

    name: str
    title: str
    shown: str
    limit: float
    command: Callable[[Machine, Path], list[str]]
    figures: Callable[[Path, str], Any]
    lacks: Callable[[Machine], str | None] = field(default=lambda machine: None)


def python(*words: object) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, "-W", "ignore", *map(str, words)]


def table(name: str) -> Callable[[Path, str], Any]:
    """Figures of a step that writes them itself."""
    return lambda work, output: json.loads((work / name).read_text())


def last_json(work: Path, output: str) -> Any:
    """The last line of an output that is JSON."""
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def training(text: str) -> dict[str, float]:
    """Figures of a training from all that its ranks printed; speed without the first two steps."""

    def all_of(pattern: str) -> list[float]:
        return [float(value) for value in re.findall(pattern, text)]

    losses, speed = all_of(r"\| loss: ([\d.e+-]+)"), all_of(r"tokens_per_s: ([\d.e+]+)")
    figures = {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
    if len(speed) > 1:
        figures["tokens_per_s"] = statistics.median(speed[1:])
    if shares := all_of(r"mfu: ([\d.e+-]+)"):
        figures["mfu"] = statistics.median(shares[1:] or shares)
    if peaks := [peak for peak in all_of(r"max allocated: ([\d.]+)") if peak]:
        figures["peak_gib"] = max(peaks) / 1024
    if saves := all_of(r"save-checkpoint \.+: \([\d.]+, ([\d.]+)\)"):
        figures |= {"saves": len(saves), "longest_save_stall_s": max(saves) / 1000}
    return figures


def of_run(name: str) -> Callable[[Path, str], Any]:
    """Figures of a training with a run directory, whose ranks print into a log."""
    return lambda work, output: training(
        "\n".join(path.read_text(errors="replace") for path in sorted((work / name / "logs/output").iterdir()))
    )


def train(machine: Machine, work: Path, flags: tuple[str, ...], run: str | None = None) -> list[str]:
    """Command of a short training; without a run directory nothing is saved.

    Not under torchrun, which puts its workers where they outlive it: the GPU's memory would stay taken.
    """
    config, more = (PROXY, LING_VOCABULARY) if machine.gpu else (SMALL_PROXY, ())
    local = LOCAL if machine.gpu and not machine.transformer_engine else ()
    data = ("--data-path", work / "corpus/shards/blend.yaml", "--tokenizer-model", work / "corpus/tokenizer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = ("RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}")
    command = python(
        *("pretrain/pretrain_multimodal.py", "--config", f"pretrain/configs/{config}.yaml", *data, *more, *SHORT),
        *(*local, *(("--run-dir", work / run) if run else ()), *flags),
    )
    return ["env", *rank, *command]


def shown(*flags: str) -> str:
    """A training as the page prints it, without what makes it short."""
    return " ".join(("train 1 $proxy", *flags))


def fp8(recipe: str) -> Step:
    """A training in FP8; Megatron refuses our recomputation with delayed scaling."""
    flags = ("--fp8-format", "hybrid", "--fp8-recipe", recipe)
    if recipe == "delayed":
        flags += ("--unset", "recompute-granularity", "--unset", "recompute-modules")

    def lacks(machine: Machine) -> str | None:
        if machine.gpu is None or machine.transformer_engine is None:
            return NEEDS_GPU if machine.gpu is None else NEEDS_TE
        least = ".".join(map(str, FP8[recipe]))
        return None if machine.capability >= FP8[recipe] else f"needs compute capability {least}"

    return Step(
        f"fp8_{recipe}", f"1-GPU proxy, FP8 `{recipe}`", shown(*flags), 45,
        lambda machine, work: train(machine, work, flags), lambda work, output: training(output), lacks,
    )  # fmt: skip


def _gpu(machine: Machine) -> str | None:
    return None if machine.gpu else NEEDS_GPU


def _te(machine: Machine) -> str | None:
    return _gpu(machine) or (None if machine.transformer_engine else NEEDS_TE)


def _check(machine: Machine, work: Path) -> list[str]:
    size = () if machine.gpu else ("--device", "cpu", "--hidden-size", 64, "--seq-length", 64)
    steps, engine = (20 if machine.gpu else 2), () if machine.transformer_engine else ("--no-te",)
    words = ("-m", "megatron_anyexperts.gpu_check", "--steps", steps, *size, *engine)
    return python(*words, "--json", work / "gpu_check.json")


def _layer(machine: Machine, work: Path) -> list[str]:
    size = ("--preset", "ling", "--rounds", 5) if machine.gpu else ("--tokens", 2048, "--rounds", 1)
    return python("benchmarks/moe_layer.py", *size, "--json", work / "moe_layer.json")


def _save(machine: Machine) -> tuple[str, ...]:
    strategy = ("--async-strategy", machine.async_strategy)
    return ("--async-save", "--use-persistent-ckpt-worker", *strategy, "--train-iters", "6", "--save-interval", "3")


def _small(machine: Machine) -> tuple[str, ...]:
    return () if machine.gpu else ("--small",)


STEPS = [
    Step(
        "transformer_engine", "Transformer Engine compiles, if it is not there, and imports",
        "python -m benchmarks.gpu_engine ENGINE", 170,
        lambda machine, work: python("-c", "import transformer_engine.pytorch") if machine.transformer_engine
        else python("-m", "benchmarks.gpu_engine", work / "engine"),
        lambda work, output: {}, _gpu,
    ),
    Step(
        "gpu_check", "precisions and implementations agree", "anyexperts gpu-check --steps 20", 80,
        _check, table("gpu_check.json"),
    ),
    Step(
        "moe_layer", "a layer of Ling's size: ours and Megatron's, fused and not, with and without the cap",
        "python benchmarks/moe_layer.py --preset ling --rounds 5", 75, _layer, table("moe_layer.json"),
    ),
    Step(
        "corpus", "a small corpus for the trainings", "python -m benchmarks.gpu_corpus CORPUS", 40,
        lambda machine, work: python("-m", "benchmarks.gpu_corpus", work / "corpus", *_small(machine)),
        lambda work, output: {},
    ),
    Step(
        "bf16", "1-GPU proxy, bf16, saved in the end", shown(), 75,
        lambda machine, work: train(machine, work, (), "bf16"), of_run("bf16"),
    ),
    *(fp8(recipe) for recipe in FP8),
    Step(
        "attention", "cuDNN's packed attention and fused rope against the local ones",
        "anyexperts gpu-check --steps 20 --attention fused", 45,
        lambda machine, work: python(
            *("-m", "megatron_anyexperts.gpu_check", "--steps", 20, "--attention", "fused"),
            *("--json", work / "attention.json"),
        ),
        table("attention.json"), _te,
    ),
    Step(
        "async_save", "asynchronous saves",
        shown("--async-save", "--use-persistent-ckpt-worker"), 70,
        lambda machine, work: train(machine, work, _save(machine), "async_save"), of_run("async_save"), _gpu,
    ),
    Step(
        "evaluate", "held-out losses of the bf16 run", "anyexperts evaluate --run-dir RUN --batches 4", 45,
        lambda machine, work: python("pretrain/evaluate.py", "--run-dir", work / "bf16", "--batches", 4, "--json"),
        lambda work, output: {f"loss_{kind}": loss["mean"] for kind, loss in last_json(work, output)["losses"].items()},
    ),
    Step(
        "generate", "an answer of the bf16 run", "anyexperts generate --run-dir RUN --prompt \"two old birds\"", 45,
        lambda machine, work: python(
            *("pretrain/generate.py", "--run-dir", work / "bf16", "--prompt", "two old birds", "--max-new-tokens", 8),
            "--json",
        ),
        lambda work, output: {"tokens": len(last_json(work, output)["answer"])},
    ),
    Step(
        "kernels", "our Triton kernels against the operators that define them", "python benchmarks/kernels.py", 60,
        lambda machine, work: python(
            "benchmarks/kernels.py", *(_small(machine) and ("--small", "--passes", 1)), "--json", work / "kernels.json"
        ),
        table("kernels.json"),
    ),
]  # fmt: skip
