"""Copies of hot experts that keep their places for some optimizer steps (`moe/copies.py` plans them)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_anyexperts.moe.controllers import repeats_step
from megatron_anyexperts.moe.copies import CopyPlan, places_of, plan_copies, plan_on


@dataclass(frozen=True)
class _State:
    """Attributes: places of copies, None before the first; and counts [S, E] since then, microbatches and steps."""

    places: list[tuple[int, int]] | None = None
    counts_SE: np.ndarray | None = None
    microbatches: int = 0
    steps: int = 0


class KeptCopies:
    """Where one layer's copies are, chosen from the counts of the steps before; the same on all ranks.

    Until the first step has ended, and so after each start, copies are planned for each microbatch.

    Args:
        steps: optimizer steps for which copies keep their places.
        ranks: expert ranks.
        per_rank, eps, least: see `plan_copies`; `least` is of the mean microbatch.
    """

    def __init__(self, steps: int, ranks: int, per_rank: int, eps: float, least: int) -> None:
        self.steps, self.ranks, self.per_rank, self.eps, self.least = steps, ranks, per_rank, eps, least
        self._state, self._start, self._before = _State(), _State(), None

    @property
    def placed(self) -> bool:
        """Whether copies have places that they keep."""
        return self._state.places is not None

    def plan(self, counts_SE: np.ndarray) -> CopyPlan:
        """Plan one microbatch, and count it where it is trained on.

        Args:
            counts_SE: int64, slots of every source for every expert.
        """
        if self._before is not None and repeats_step():
            self._state, self._before = self._before, None
        state = self._state
        if torch.is_grad_enabled():  # once a microbatch of training, recomputed or not
            total = counts_SE if state.counts_SE is None else state.counts_SE + counts_SE
            self._state = replace(state, counts_SE=total, microbatches=state.microbatches + 1)
        if state.places is None:
            return plan_copies(counts_SE, self.ranks, self.per_rank, self.eps, self.least)
        return plan_on(state.places, counts_SE, self.ranks, self.eps)

    def end_step(self) -> None:
        """Choose new places where it is time; after the last backward pass of a step."""
        state, self._before = self._state, self._start
        if state.microbatches:
            state = replace(state, steps=state.steps + 1)
            if state.places is None or state.steps >= self.steps:
                least = self.least * state.microbatches
                plan = plan_copies(state.counts_SE, self.ranks, self.per_rank, self.eps, least)
                state = _State(places_of(plan, state.counts_SE.shape[1] // self.ranks))
        self._state = self._start = state
