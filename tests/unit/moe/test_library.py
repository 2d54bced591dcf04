"""The layer is a library: what docs/library.md prints runs, in Megatron's model and in other loops."""

import re
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

import megatron_anyexperts.moe
from megatron_anyexperts.moe.controllers import RouterControl

PAGE = Path(__file__).resolve().parents[3] / "docs/library.md"
MODEL, LOOP, FIGURES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def names(one_rank) -> dict:
    """What the first example of the page defines."""
    names: dict = {}
    exec(MODEL, names)
    return names


def wrapped(names: dict) -> DistributedDataParallel:
    return DistributedDataParallel(names["config"], DistributedDataParallelConfig(), names["model"])


def step(model: DistributedDataParallel, config) -> list[float]:
    """One step of a loop that calls what its configuration says; returns the slot offsets."""
    model.zero_grad_buffer()
    tokens = torch.arange(16)[None]
    model(tokens, tokens, attention_mask=None, labels=tokens).mean().backward()
    config.finalize_model_grads_func([model])
    controls = [module for module in model.modules() if isinstance(module, RouterControl)]
    return [control.slot_offset.item() for control in controls]


def test_a_stock_model_trains_with_the_layer(names):
    offsets = step(wrapped(names), names["config"])
    assert len(offsets) == 2 and any(offsets)


def test_a_loop_that_sets_its_own_function_is_told_the_line_to_add(names):
    model, config = wrapped(names), names["config"]
    config.finalize_model_grads_func = finalize_model_grads
    with pytest.raises(RuntimeError, match="controllers.*\n +config.finalize_model_grads_func = with_controllers"):
        step(model, config)
    exec(LOOP, names)
    assert any(step(model, config))
    model.eval()
    config.finalize_model_grads_func = finalize_model_grads
    with torch.no_grad():
        model(torch.arange(16)[None], torch.arange(16)[None], attention_mask=None)


def test_figures_are_those_of_the_forward_pass(names):
    exec(FIGURES, names)
    assert 1 <= names["slots"] <= 4
    assert names["loss"].requires_grad


def test_wrapping_twice_is_wrapping_once(names):
    with_controllers = megatron_anyexperts.moe.with_controllers
    calls, model = [], [wrapped(names)]
    once = with_controllers(lambda *args, **kwargs: calls.append((args, kwargs)))
    assert with_controllers(once) is once
    once(model, 3, None, force_all_reduce=True)
    assert calls == [((model, 3, None), {"force_all_reduce": True})]


def test_all_that_is_exported_is_documented():
    page = PAGE.read_text() + (PAGE.parent / "routing.md").read_text()
    assert all(name in page or "Layer" in name or "Router" in name for name in megatron_anyexperts.moe.__all__)
