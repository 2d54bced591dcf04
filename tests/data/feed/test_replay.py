"""The sequence of global batches does not depend on how many ranks read it, nor on where a run was interrupted."""

import random
from pathlib import Path

from megatron_anyexperts.data import elastic
from tests.data.feed.conftest import CONFIG

STREAMS = CONFIG.data_streams


def step_keys(loaders: list) -> list[tuple]:
    """Sample keys of one training step (one round): those of each row, whichever rank drew it."""
    rows = [next(loader)["sample_keys"] for loader in loaders for _ in range(STREAMS // len(loaders))]
    return sorted(tuple(row) for microbatch in rows for row in microbatch)


def run(make_loader, blend: Path, plan: list[tuple[int, int]]) -> list[list[tuple]]:
    """Keys of every step; `plan` lists (dp_size, steps), with the state carried from each entry to the next."""
    state, steps = None, []
    for dp_size, count in plan:
        loaders = [make_loader(blend, rank, dp_size) for rank in range(dp_size)]
        for loader in loaders:
            if state is not None:
                loader.restore(state)
        steps += [step_keys(loaders) for _ in range(count)]
        ranks = [loader.save_state() for loader in loaders]
        state = elastic.merge_states(ranks, loaders[0].fingerprint, 1)
        assert state["rounds"] == len(steps)
        for loader in loaders:
            loader.close()
    return steps


def test_changing_sizes_at_random_steps_replays_the_uninterrupted_run(make_loader, blend):
    rng = random.Random(3)
    stops = [rng.randint(1, 4) for _ in range(4)]
    uninterrupted = run(make_loader, blend, [(4, sum(stops))])
    assert run(make_loader, blend, list(zip((4, 2, 1, 4), stops, strict=True))) == uninterrupted
