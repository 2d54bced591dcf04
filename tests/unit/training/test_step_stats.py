import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.training.step_stats import (
    MODALITIES,
    SampleLog,
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
