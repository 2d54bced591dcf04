"""What `anyexperts plan` predicts beside throughput that others published; prints the table of docs/planning.md.

    python benchmarks/plan_published.py

Models are described by their sizes, runs by what their sources say. Every prediction uses the same efficiencies
(`hardware.py`), and none was fitted to a row.
"""

from dataclasses import dataclass

from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_memory import Precision
from megatron_anyexperts.checks.plan_sizes import LatentSizes, MixtureSizes, ModelSizes
from megatron_anyexperts.checks.plan_time import Feed, Setting, step_time
from megatron_anyexperts.checks.plan_work import training_operations
from megatron_anyexperts.hardware import ASSUMED, GPUS

SEQUENCE = 4096
FP8 = Precision(fp8=True, fp8_copies=True, fused_loss=True)

LING = ModelSizes(
    "*-" + "*E" * 19, vocabulary=157_184, hidden=2048, ffn=5120, heads=16, groups=4, channels=128, head_norm=256,
    mixture=MixtureSizes(256, 512, real=8, most=8, shared=512, reach=0.5),
)  # fmt: skip
LING_MTP = ModelSizes(**(vars(LING) | {"pattern": LING.pattern + "/*E"}))
QWEN_30B = ModelSizes(
    "*E" * 48, vocabulary=151_936, hidden=2048, ffn=6144, heads=32, groups=4, channels=128, head_norm=256,
    mixture=MixtureSizes(128, 768, real=8, most=8),
)  # fmt: skip
# 32 chunks, eight stages of four: the first has the embedding and one layer, 30 have two, the last only prediction and
# the output layer. The source's recipe says so.
DEEPSEEK_CHUNKS = ["*-", "*-*-", *["*E*E"] * 29, ""]
DEEPSEEK = ModelSizes(
    "|".join(DEEPSEEK_CHUNKS) + "/*E", vocabulary=129_280, hidden=7168, ffn=18_432, heads=128, groups=128, channels=128,
    latent=LatentSizes(1536, 512, 128, 64, 128), head_norm=2048,
    mixture=MixtureSizes(256, 2048, real=8, most=8, shared=2048, reach=0.5),
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A run that others measured: tokens a second of one GPU, and where that is written."""

    name: str
    sizes: ModelSizes
    layout: Layout
    gpu: str
    tokens: float
    source: str
    precision: Precision = FP8


def layout(gpus: int, tensor: int, pipeline: int, expert: int, rows: int, *recompute: str, micro: int = 1) -> Layout:
    """Of a run with rows of 4,096 positions."""
    return Layout(gpus, tensor, pipeline, expert, 1, micro, rows, SEQUENCE, frozenset(recompute))


LING_SOURCE = "Ling-mini-2.0 README; run_pretrain_4k.sh"
BRIDGE = "Megatron-Bridge, performance summary, NeMo"

RUNS = (
    Published("Ling-mini-2.0", LING, layout(8, 1, 1, 8, 128, "moe"), "h100", 128_298 / 8, LING_SOURCE),
    Published("Ling-mini-2.0", LING, layout(32, 1, 1, 8, 512, "moe"), "h100", 611_466 / 32, LING_SOURCE),
    Published("Ling-mini-2.0, MTP", LING_MTP, layout(8, 1, 1, 8, 128, "moe"), "h100", 109_532 / 8, LING_SOURCE),
    Published("Ling-mini-2.0, MTP", LING_MTP, layout(32, 1, 1, 8, 512, "moe"), "h100", 448_726 / 32, LING_SOURCE),
    Published("Qwen3-30B-A3B", QWEN_30B, layout(16, 1, 1, 16, 1024), "h100", 8960, f"{BRIDGE} 26.04.01"),
    Published("Qwen3-30B-A3B", QWEN_30B, layout(8, 1, 1, 8, 512), "b200", 9691, f"{BRIDGE} 26.02"),
    Published(
        "DeepSeek-V3, MTP", DEEPSEEK, layout(1024, 2, 8, 64, 8192, "mla_up_proj", "mlp"), "h100", 1297,
        f"{BRIDGE} 25.09",
    ),
)  # fmt: skip


def predict(run: Published) -> tuple[float, float, float]:
    """Tokens a second of a GPU, predicted; and its TFLOP/s, predicted and published, by our count of operations."""
    setting = Setting(run.sizes, run.precision, GPUS[run.gpu], ASSUMED, Feed(SEQUENCE), once=True)
    seconds = step_time(setting, run.layout).total
    tokens = run.layout.global_batch * SEQUENCE / run.layout.gpus / seconds
    operations = training_operations(run.sizes, SEQUENCE) / 1e12
    return tokens, tokens * operations, run.tokens * operations


def main() -> None:
    heads = ("model", "GPUs", "layout", "tokens/s a GPU", "predicted", "ratio", "TFLOP/s a GPU", "predicted", "source")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for run in RUNS:
        tokens, predicted, published = predict(run)
        shape = f"TP{run.layout.tensor} PP{run.layout.pipeline} EP{run.layout.expert}, {run.layout.global_batch:,} rows"
        print(
            f"| {run.name} | {run.layout.gpus:,} {run.gpu.upper()} | {shape} | {run.tokens:,.0f} | {tokens:,.0f} | "
            f"{tokens / run.tokens:.2f} | {published:.0f} | {predicted:.0f} | {run.source} |"
        )


if __name__ == "__main__":
    main()
