"""The rows of `gpu_check` that need Transformer Engine hold over the reference."""

import contextlib
import io
import re

from megatron_anyexperts.checks.gpu_check import compare, parser, rows
from tests.multirank import run_ranks
from tests.unit.moe.rank_cases import initialize

SMALL = "--device cpu --steps 3 --hidden-size 128 --seq-length 128 --lr 1e-3"
RECIPES = ("delayed", "tensorwise", "blockwise")


def table(rank: int, ranks: int) -> str:
    """What the command prints."""
    initialize(1, 1)
    plan = [row for row in rows(True, RECIPES) if "kernels" not in row.name]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compare(plan, parser().parse_args(SMALL.split()))
    return printed.getvalue()


def test_transformer_engine_trains_as_the_local_implementation_does():
    [printed] = run_ranks(table, 1)
    measured = re.findall(r"^(.+?) {2,}[\d.]+ +[\d.]+ +([\d.e+-]+) +([\d.]+) .* ok \(", printed, re.MULTILINE)
    cosines = {name: (float(loss), float(cosine)) for name, loss, cosine in measured}
    expected = ["dynamic, bf16, TE", "dynamic, bf16, TE, fused rope", "static, bf16, TE"]
    expected += [f"dynamic, fp8 {recipe}, TE" for recipe in RECIPES]
    assert cosines.keys() >= set(expected), printed
    assert cosines["static, bf16, TE"] == (0.0, 1.0)  # ours is stock, bit by bit
    assert min(cosines["dynamic, bf16, TE"][1], cosines["dynamic, bf16, TE, fused rope"][1]) > 0.9995
    for recipe in RECIPES:  # a value of 1 would say that nothing was cast
        assert 0.98 < cosines[f"dynamic, fp8 {recipe}, TE"][1] < 0.999
