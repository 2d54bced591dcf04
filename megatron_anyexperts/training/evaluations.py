"""Writes the held-out losses of every evaluation to the run, in the terms of ``metrics.jsonl``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.training import training

from megatron_anyexperts.console import say
from megatron_anyexperts.platform.seams import replace
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.progress import losses


def figures(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """``loss`` and ``loss_<kind of sample>`` from what Megatron's evaluation calls ``lm loss`` and ``<kind> loss``."""
    names = {name: "loss" if name == "lm loss" else f"loss_{name.removesuffix(' loss')}" for name in losses}
    return {names[name]: float(value) for name, value in losses.items()}


def install(run: Run | None) -> None:
    """Say the results of evaluations on the last rank, and record them where there is a run.

    Megatron 0.19 prints the losses and drops them: `evaluate` has them, and its caller knows the iteration.
    """
    evaluate, print_results = training.evaluate, training.evaluate_and_print_results
    last: dict[str, float] = {}
    said: list[str] = []

    @functools.wraps(evaluate)
    def keeping(*args: Any, **named: Any) -> Any:
        last.clear()
        result = evaluate(*args, **named)
        last.update(figures(result[0] or {}))  # None when a time limit ended it
        return result

    @functools.wraps(print_results)
    def recording(prefix: str, step: Any, data: Any, model: Any, iteration: int, *args: Any, **named: Any) -> None:
        print_results(prefix, step, data, model, iteration, *args, **named)
        if last and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            line = f"held out at step {iteration} | {losses(last)}"
            if line not in said:  # after its last step Megatron's loop evaluates again
                say(line)
            said[:] = [line]
            if run is not None:
                runlog.append_held_out(run, iteration, **last)

    replace(training.__name__, "evaluate", keeping)
    replace(training.__name__, "evaluate_and_print_results", recording)
