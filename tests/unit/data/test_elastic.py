import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

from megatron_anyexperts.data import elastic, plain_state

STREAMS = st.sampled_from([1, 2, 4, 6, 12, 64])


MIXTURE = {"stages": [[0, 0, [1.0]]], "rows_per_step": 4}


def checkpoints(streams: range) -> SavableDataLoaderState:
    """Energon's state of one rank; each stream is told by its offset."""
    states = [SavableDatasetCheckpoint(state=None, offset=stream) for stream in streams]
    return SavableDataLoaderState(worker_states=states, next_worker_id=0, micro_batch_size=2)


def save(streams: int, dp_size: int, rounds: int = 3) -> dict:
    share = streams // dp_size
    ranks = [checkpoints(range(rank * share, (rank + 1) * share)) for rank in range(dp_size)]
    return elastic.merge_states([elastic.split_state(rank, rounds) for rank in ranks], {"seed": 1}, 2, MIXTURE)


@given(STREAMS, st.data())
def test_dealing_out_gives_each_rank_its_streams_whoever_saved(streams, data):
    sizes = st.sampled_from(elastic.valid_dp_sizes(streams))
    state = save(streams, data.draw(sizes))
    dp_size = data.draw(sizes)
    dealt = [elastic.rank_state(state, {"seed": 1}, rank, dp_size) for rank in range(dp_size)]
    assert [worker.offset for rank in dealt for worker in rank.worker_states] == list(range(streams))
    assert all(rank.next_worker_id == 0 and rank.micro_batch_size == 2 for rank in dealt)


@given(STREAMS, st.data())
def test_the_stored_state_is_the_same_for_every_layout(streams, data):
    sizes = st.sampled_from(elastic.valid_dp_sizes(streams))
    first, second = (save(streams, data.draw(sizes)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.pop("streams"), second.pop("streams"), strict=True))
    assert first == second


def test_a_state_passes_through_a_safe_load(tmp_path):
    torch.save(save(4, 2), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert elastic.rank_state(state, {"seed": 1}, 0, 1).worker_states[3].offset == 3


@given(st.integers(1, 200), st.integers(1, 200))
def test_streams_divide_or_the_error_lists_sizes_that_work(streams, dp_size):
    if streams % dp_size == 0:
        assert elastic.streams_per_rank(streams, dp_size) * dp_size == streams
        return
    with pytest.raises(ValueError, match=f"dp_size={dp_size} does not divide data_streams={streams}; use one of 1"):
        elastic.streams_per_rank(streams, dp_size)


@given(st.integers(1, 500), st.integers(1, 8), STREAMS)
def test_a_step_consumes_whole_rounds_or_is_refused_with_a_size_that_does(global_batch, micro_batch, streams):
    if global_batch % (micro_batch * streams) == 0:
        elastic.check_global_batch(global_batch, micro_batch, streams)
        return
    with pytest.raises(ValueError, match=f"global_batch_size={global_batch} is not a multiple") as error:
        elastic.check_global_batch(global_batch, micro_batch, streams)
    suggested = int(str(error.value).rpartition("use ")[2].split(",")[0].split(" or ")[-1])
    elastic.check_global_batch(suggested, micro_batch, streams)


def test_ranks_at_different_rounds_cannot_be_merged():
    ranks = [elastic.split_state(checkpoints(range(2)), rounds) for rounds in (3, 4)]
    with pytest.raises(ValueError, match=r"different rounds \[3, 4\]"):
        elastic.merge_states(ranks, {}, 1, MIXTURE)


def test_the_middle_of_a_round_is_refused():
    state = checkpoints(range(4))
    state.next_worker_id = 3
    with pytest.raises(ValueError, match="middle of a round"):
        elastic.split_state(state, 1)


def test_differing_settings_are_named_with_both_values():
    with pytest.raises(ValueError, match=r"seed: checkpoint 1, now 2"):
        elastic.rank_state(save(2, 1), {"seed": 2}, 0, 1)


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match="version 99"):
        elastic.rank_state(save(2, 1) | {"version": 99}, {"seed": 1}, 0, 1)


def test_a_run_saved_before_its_first_batch_starts_at_the_beginning():
    state = elastic.merge_states([elastic.split_state(None, 0)] * 2, {"seed": 1}, 1, MIXTURE)
    assert state["streams"] == [] and elastic.rank_state(state, {"seed": 1}, 0, 4) is None


@pytest.mark.parametrize(("counts", "ended"), [([1, 1], True), ([1, 0], False), ([0], False)])
def test_a_stream_has_ended_when_all_its_datasets_have(counts, ended):
    datasets = FlexState(datasets=[FlexState(datasets=[FlexState(_epoch_count=count)]) for count in counts])
    state = SavableDatasetState(rng=None, dataset_state=datasets, sample_index=1)
    assert elastic.has_ended(plain_state.dumps(SavableDatasetCheckpoint(state=state, offset=0))) == ended
