"""The sequence of global batches does not depend on how many ranks read it, nor on where a run was interrupted."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_anyexperts.data import elastic
from megatron_anyexperts.data.faults import DataFeedError
from megatron_anyexperts.data.loader import MicrobatchLoader
from tests.feed import corpus
from tests.feed.conftest import CONFIG, SHAPE
from tests.multirank import run_ranks

STREAMS = CONFIG.data_streams


def rows_of_step(loaders: list) -> list[tuple]:
    """Sample keys of each row of one training step (one round), whichever rank drew it."""
    microbatches = [next(loader) for loader in loaders for _ in range(STREAMS // len(loaders))]
    return sorted(tuple(row) for microbatch in microbatches for row in microbatch.sample_keys)


def merged(loaders: list) -> dict:
    states = [loader.save_state() for loader in loaders]
    return elastic.merge_states(states, loaders[0].fingerprint, 1, loaders[0].mixture_state())


def replay(make_loader, blend: Path, plan: list[tuple[int, int]]) -> list[list[tuple]]:
    """Keys of every step; `plan` lists (dp_size, steps), with the state carried from each entry to the next."""
    state, steps = None, []
    for dp_size, count in plan:
        loaders = [make_loader(blend, rank, dp_size) for rank in range(dp_size)]
        for loader in loaders:
            if state is not None:
                loader.restore(state)
        steps += [rows_of_step(loaders) for _ in range(count)]
        state = merged(loaders)
        assert state["rounds"] == len(steps)
        for loader in loaders:
            loader.close()
    return steps


def test_changing_sizes_at_random_steps_replays_the_uninterrupted_run(make_loader, blend):
    rng = random.Random(3)
    stops = [rng.randint(1, 4) for _ in range(4)]
    uninterrupted = replay(make_loader, blend, [(4, sum(stops))])
    assert replay(make_loader, blend, list(zip((4, 2, 1, 4), stops, strict=True))) == uninterrupted


def test_saving_right_after_restoring_changes_nothing(make_loader, blend):
    steps = replay(make_loader, blend, [(2, 3)])
    assert replay(make_loader, blend, [(2, 1), (1, 0), (4, 0), (1, 2)]) == steps


def test_one_epoch_holds_every_key_once_across_size_changes(make_loader, tmp_path):
    counts = {"text": 160, "image_text": 104, "chat": 80}
    corpus.build(tmp_path / "shards", counts)
    blend = corpus.write_epoch_blend(tmp_path / "shards", list(counts))
    seen, state = Counter(), None
    for dp_size, steps in ((4, 1), (2, 1), (1, None)):
        loaders = [make_loader(blend, rank, dp_size, endless=False, data_packing_buffer=8) for rank in range(dp_size)]
        for loader in loaders:
            if state is not None:
                loader.restore(state)
        for _ in range(steps or 0):
            seen.update(key for row in rows_of_step(loaders) for key in row)
        if steps is None:
            [loader] = loaders
            seen.update(key for microbatch in loader for row in microbatch.sample_keys for key in row)
        else:
            state = merged(loaders)
    # The last shard of 8 samples of each kind is held out.
    expected = {f"{kind}/{kind}-{index:05d}" for kind, count in counts.items() for index in range(count - 8)}
    assert seen == Counter(expected)


def test_a_one_pass_stream_that_has_read_everything_cannot_be_saved(make_loader, tmp_path):
    corpus.build(tmp_path / "shards", {"text": 40})
    loader = make_loader(corpus.write_epoch_blend(tmp_path / "shards", ["text"]), endless=False)
    rows_of_step([loader])
    with pytest.raises(ValueError, match="has read its last sample"):
        loader.save_state()


def _save_or_resume(rank: int, world_size: int, blend: str, tokenizer: str, state: dict | None, steps: int):
    loader = MicrobatchLoader(blend, CONFIG, SHAPE, tokenizer, 256, 1, rank, world_size, seed=7)
    if state is not None:
        loader.restore(state)
    share = STREAMS // world_size
    keys = [[tuple(next(loader).sample_keys[0]) for _ in range(share)] for _ in range(steps)]
    return keys, loader.state_for_checkpoint(torch.distributed.group.WORLD)


def test_real_processes_save_one_state_that_one_process_resumes(make_loader, blend, tokenizer, tmp_path):
    uninterrupted = replay(make_loader, blend, [(1, 5)])
    first = run_ranks(_save_or_resume, 2, str(blend), str(tokenizer), None, 2, timeout=90)
    (_, state), (_, other) = first
    assert [bytes(s) for s in state["streams"]] == [bytes(s) for s in other["streams"]]
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    [(then, _)] = run_ranks(_save_or_resume, 1, str(blend), str(tokenizer), state, 3, timeout=90)
    steps = [sorted(row for keys, _ in first for row in keys[step]) for step in range(2)] + [sorted(s) for s in then]
    assert steps == uninterrupted


def test_the_middle_of_a_round_cannot_be_saved(make_loader, blend):
    loader = make_loader(blend)
    next(loader)
    with pytest.raises(ValueError, match="1 microbatches are not whole rounds"):
        loader.save_state()


def test_changed_settings_are_refused_by_name(make_loader, blend):
    first = make_loader(blend)
    rows_of_step([first])
    state = merged([first])
    with pytest.raises(ValueError, match="data_packing_buffer: checkpoint 16, now 17"):
        make_loader(blend, data_packing_buffer=17).restore(state)
    make_loader(blend, data_error_budget=3).restore(state)  # tolerance does not move the data


def test_restoring_after_the_first_batch_is_refused(make_loader, blend):
    loader = make_loader(blend)
    rows_of_step([loader])
    with pytest.raises(DataFeedError, match="before the first microbatch"):
        loader.restore(merged([loader]))


def test_a_size_that_does_not_divide_names_those_that_do(make_loader, blend):
    with pytest.raises(ValueError, match=r"dp_size=3 does not divide data_streams=4; use one of 1, 2, 4"):
        make_loader(blend, 0, 3)
