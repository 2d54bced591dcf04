import re
from argparse import Namespace

import pytest
import torch

from megatron_anyexperts.checks import gpu_check
from megatron_anyexperts.checks.doctor import FP8_CAPABILITY
from megatron_anyexperts.checks.gpu_check import DYNAMIC, FP32, STATIC, STOCK, Row, compare, rows

OPTIONS = Namespace(device="cpu", steps=4, hidden_size=64, seq_length=64, lr=1e-3, attention=None)


@pytest.mark.parametrize(
    ("cuda", "fusion", "count"), [(False, False, 4), (True, False, 9 + len(FP8_CAPABILITY)), (True, True, 14)]
)
def test_every_reference_comes_first(cuda, fusion, count):
    plan = rows(cuda, tuple(FP8_CAPABILITY) if cuda else (), fusion)
    assert any(row.settings.get("gradient_accumulation_fusion") for row in plan) == fusion
    names = [row.name for row in plan]
    assert len(set(names)) == count
    assert all(row.reference in names[:index] for index, row in enumerate(plan) if row.reference)


def test_all_rows_of_a_cpu_pass(one_rank, capsys):
    passed, rows_shown = compare(rows(False, ()), OPTIONS)
    assert passed and [row["row"] for row in rows_shown] == [row.name for row in rows(False, ())]
    table = capsys.readouterr().out
    assert len(re.findall(r" ok \(limits| reference$", table, re.MULTILINE)) == 4
    # Only rounding: padding gets no experts here, so that a matrix product has fewer rows.
    assert re.search(r"static, fp32, local .* (0\.00e\+00|\d\.\d\de-0[789])  1\.00000 ", table)


def test_a_row_that_computes_something_else_fails(one_rank, capsys):
    stock = Row("stock", STOCK | FP32)
    other = Row("other", STATIC | FP32 | {"moe_router_topk": 3}, "stock", 1e-5, 0.999)
    assert not compare([stock, other], OPTIONS)[0]
    assert "TOO FAR" in capsys.readouterr().out


def test_a_row_that_crashes_fails_and_the_others_still_run(one_rank, capsys):
    broken = Row("broken", DYNAMIC | FP32 | {"anyexperts_k_max": 99})
    behind = Row("behind", STATIC | FP32, "broken")
    passed, shown = compare([broken, behind], OPTIONS)
    assert not passed and [row["verdict"].split(":")[0] for row in shown] == ["FAILED", "no reference"]
    table = capsys.readouterr().out
    assert re.search(r"broken +FAILED: ValueError: .*anyexperts_k_max=99", table)
    assert "no reference: broken failed" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_the_command_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "CUDA is missing" in capsys.readouterr().err
