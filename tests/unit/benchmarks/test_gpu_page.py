"""The generated part of docs/gpu.md: up to date, and true to what was measured."""

import pytest

from benchmarks.gpu_page import PAGE, RESULT, load, put, render
from benchmarks.gpu_steps import STEPS

MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.95.05", "torch": "2.15.0", "triton": "3.9.0", "megatron": "0.19.2",
    "transformer_engine": None,
}  # fmt: skip
CHECKED = [{"row": "fp32", "gib": 1.23456}, {"row": "bf16", "verdict": "FAILED: a | b"}]
RECORDS = [
    {"name": "gpu_check", "state": "ran", "seconds": 31.2, "figures": CHECKED},
    {"name": "bf16", "state": "ran", "seconds": 44.0, "figures": {"tokens_per_s": 51234.5, "last_loss": 5.25}},
    {"name": "fp8_delayed", "state": "failed", "seconds": 9.0, "last_lines": ["first", "RuntimeError: x | y"]},
    {"name": "fp8_mxfp8", "state": "needs compute capability 10.0"},
]
RESULT_OF_A_GPU = {"machine": MACHINE, "date": "2026-11-25T12:00:00+00:00", "commit": "abc", "seconds": 300.0}


def test_the_page_is_up_to_date():
    page = PAGE.read_text()
    assert put(page, render(load(RESULT))) == page, "run: python -m benchmarks.gpu_page"


def test_without_figures_everything_has_never_run():
    part = render(None)
    assert "no part of this project has been run on a GPU yet" in part
    assert part.count("| never run |") == len(STEPS)


def test_figures_failures_and_what_never_ran_are_shown():
    part = render(RESULT_OF_A_GPU | {"steps": RECORDS})
    assert "On one NVIDIA H100 80GB HBM3, 2026-11-25, commit abc: driver 580.95.05" in part
    rows = {line.split(" | ")[0]: line.split(" | ")[-1] for line in part.splitlines() if line.startswith("| ")}
    titles = {step.name: f"| {step.title}" for step in STEPS}
    assert rows[titles["bf16"]] == "ran, 44 s; tokens_per_s 51,234; last_loss 5.25 |"
    assert rows[titles["gpu_check"]] == "ran, 31 s; table below |"
    assert "| **failed** after 9 s: `RuntimeError: x \\| y` |" in part
    assert rows[titles["fp8_mxfp8"]] == "never run: needs compute capability 10.0 |"
    assert rows[titles["kernels"]] == "never run |"
    table = "| row | gib | verdict |\n| --- | --- | --- |\n| fp32 | 1.235 | - |\n| bf16 | - | FAILED: a \\| b |"
    assert table in part


def test_figures_of_a_cpu_are_refused():
    with pytest.raises(ValueError, match="measured without a GPU"):
        render({"machine": MACHINE | {"gpu": None}, "steps": []})
