import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.training.flops import WORK
from megatron_anyexperts.training.step_stats import (
    MODALITIES,
    SampleLog,
    StepStats,
    forget_after,
    modality_sums,
    read_sample_log,
)


@given(st.lists(st.tuples(st.integers(-1, 3), st.booleans(), st.integers(0, 9)), min_size=1, max_size=40))
def test_sums_per_modality_add_up_to_the_whole(tokens):
    kinds, targets, losses = zip(*tokens, strict=True)
    mask = torch.tensor([[float(target and kind >= 0) for kind, target in zip(kinds, targets, strict=True)]])
    losses = torch.tensor([losses], dtype=torch.float32)
    sums = modality_sums(losses, mask, torch.tensor([kinds], dtype=torch.int8))
    assert sums.shape == (len(MODALITIES), 2)
    assert sums[:, 0].sum() == (losses * mask).sum()
    assert sums[:, 1].sum() == mask.sum()
    for code in range(4):
        chosen = [
            loss
            for kind, loss, counted in zip(kinds, losses[0].tolist(), mask[0].tolist(), strict=True)
            if kind == code and counted
        ]
        assert sums[code].tolist() == [sum(chosen), len(chosen)]


def test_sample_logs_of_two_layouts_compare_equal(tmp_path):
    first, second = SampleLog(tmp_path / "two", 0), SampleLog(tmp_path / "two", 1)
    alone = SampleLog(tmp_path / "one", 0)
    for iteration in (1, 2):
        first.add([["a", "b"]])
        second.add([["c"]])
        alone.add([["c"], ["b", "a"]])
        for log in (first, second, alone):
            log.flush(iteration)
    assert read_sample_log(tmp_path / "two") == read_sample_log(tmp_path / "one") == {1: [*"abc"], 2: [*"abc"]}


def test_steps_after_the_checkpoint_are_forgotten_on_all_ranks(tmp_path):
    logs = [SampleLog(tmp_path, rank) for rank in (0, 1)]
    for iteration in (1, 2, 3):
        for log in logs:
            log.add([[f"key{iteration}"]])
            log.flush(iteration)
    with (tmp_path / "rank0001.jsonl").open("a") as file:
        file.write('{"iteration": 4, "ke')
    forget_after(tmp_path, 2)
    assert read_sample_log(tmp_path) == {1: ["key1", "key1"], 2: ["key2", "key2"]}


def step(stats: StepStats, wait: float, work: float) -> None:
    with stats.waiting_for_data():
        time.sleep(wait)
    time.sleep(work)
    stats.add_work(torch.full((len(WORK),), 100.0, dtype=torch.float64))
    stats.stop_clock()


def test_the_clock_counts_training_steps_only(one_rank):
    stats = StepStats()
    time.sleep(0.2)  # the model is built
    step(stats, wait=0.3, work=0.1)
    first = stats.drain(torch.distributed.group.WORLD, torch.device("cpu"))
    assert first.first_step_s >= 0.4 and first.seconds == 0 and first.work["tokens"] == 0
    started = time.monotonic()
    step(stats, wait=0.05, work=0.1)
    time.sleep(0.5)  # evaluation, a save
    step(stats, wait=0.05, work=0.1)
    wall = time.monotonic() - started
    second = stats.drain(torch.distributed.group.WORLD, torch.device("cpu"))
    assert second.first_step_s is None
    assert second.work["tokens"] == 200
    assert 0.3 <= second.seconds <= wall - 0.5
    assert 0.1 <= second.data_wait < second.seconds
    assert stats.drain(torch.distributed.group.WORLD, torch.device("cpu")).seconds == 0


def test_losses_of_an_interval_are_means_over_its_steps(one_rank):
    stats = StepStats()
    for value in (1.0, 2.0, 6.0):
        stats.add_losses(torch.tensor([[2 * value, 2.0], [0, 0], [value, 1], [0, 0]]))
        stats.add_step({"z_loss": torch.tensor(value)})
    interval = stats.drain(torch.distributed.group.WORLD, torch.device("cpu"))
    assert interval.step_losses == {"z_loss": 3.0}
    assert interval.losses == {"loss": pytest.approx(3.0), "loss_text": 3.0, "loss_audio": 3.0}
