"""Weights that change during a run: where they were declared to, in any layout, with nothing lost or read twice."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from megatron_anyexperts.data.faults import DataFeedError
from megatron_anyexperts.data.mixture_schedule import MixtureScheduleError
from tests.feed import corpus
from tests.feed.conftest import CONFIG, COUNTS
from tests.feed.test_replay import merged, rows_of_step

STREAMS = CONFIG.data_streams
STAGES = [
    {"at_step": 4, "weights": {"chat": 1.0}},
    {"at_step": 8, "over": 4, "weights": {"text": 0.75, "image_text": 0.25}},
]


@pytest.fixture
def schedule(tmp_path):
    def write(stages: list[dict]) -> dict:
        path = tmp_path / f"schedule{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump({"stages": stages}))
        return {"data_mixture_schedule": str(path), "rows_per_step": STREAMS}

    return write


def replay(make_loader, blend: Path, plan: list[tuple[int, int, dict]]) -> tuple[list[list[tuple]], dict]:
    """Keys of every step; `plan` lists (dp_size, steps, settings), the state carried from each to the next."""
    state, steps = None, []
    for dp_size, count, settings in plan:
        loaders = [make_loader(blend, rank, dp_size, **settings) for rank in range(dp_size)]
        for loader in loaders:
            if state is not None:
                loader.restore(state)
        steps += [rows_of_step(loaders) for _ in range(count)]
        state = merged(loaders)
        for loader in loaders:
            loader.close()
    return steps, state


def test_a_schedule_is_followed_exactly_across_layouts_and_resumes(make_loader, blend, schedule, capsys):
    settings = schedule(STAGES) | {"data_shuffle_buffer": 0, "data_packing_buffer": 4}
    whole, state = replay(make_loader, blend, [(1, 30, settings)])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mixture stage")]
    assert said == [
        f"mixture stage 1 of 3 begins: {', '.join(f'{kind} 0.1667' for kind in COUNTS)}",
        "mixture stage 2 of 3 begins: chat 1",
        "mixture stage 3 of 3 begins: text 0.75, image_text 0.25",
    ]
    parts = [(2, 3, settings), (1, 2, settings), (4, 3, settings), (1, 1, settings), (2, 21, settings)]
    assert replay(make_loader, blend, parts)[0] == whole
    assert [stage[0] for stage in state["mixture"]["stages"]] == [0, 4, 8]

    kinds = [Counter(key.partition("/")[0] for row in step for key in row) for step in whole]
    assert len(kinds[0]) > 3  # the blend's own weights
    assert set(kinds[7]) == {"chat"}  # four packed rows of lookahead are through
    late = sum(kinds[18:], Counter())
    assert set(late) == {"text", "image_text"}
    # 0.75 in expectation; the bound is four standard deviations of so many draws.
    assert late["text"] / late.total() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / late.total()) ** 0.5)


def test_a_dataset_that_rested_goes_on_where_it_stopped(make_loader, blend, schedule):
    settings = {"data_shuffle_buffer": 0, "data_packing_buffer": 1, "data_run_length": 1000, "data_open_shards": 1}
    rest = [{"at_step": 3, "weights": {"chat": 1.0}}, {"at_step": 6, "weights": {"text": 1.0}}]
    only = [{"at_step": 0, "weights": {"text": 1.0}}]

    def texts(stages: list[dict], steps: int) -> list[str]:
        [loader] = [make_loader(blend, **schedule(stages), **settings)]
        read = [next(loader).sample_keys for _ in range(steps * STREAMS)]
        return [key for rows in read[::STREAMS] for row in rows for key in row if key.startswith("text/")]

    rested = texts([only[0], *rest], 12)
    assert len(rested) > 3
    assert rested == texts(only, 12)[: len(rested)]


def test_stages_to_come_may_change_and_those_that_began_may_not(make_loader, blend, schedule, capsys):
    settings = schedule(STAGES)
    _, state = replay(make_loader, blend, [(1, 5, settings)])
    later = schedule([STAGES[0], {"at_step": 20, "weights": {"text": 1.0}}])
    make_loader(blend, **settings).restore(state)
    assert "mixture stages to come" not in capsys.readouterr().out
    make_loader(blend, **later).restore(state)
    assert "mixture stages to come are others than in the checkpoint" in capsys.readouterr().out
    # In a run whose batch changed, a step is no place, and stays none.
    with pytest.raises(ValueError, match=r"use `at_row` \(a step was 4 rows until now, and is 8\)"):
        make_loader(blend, **settings | {"rows_per_step": 2 * STREAMS}).restore(state)
    by_row = schedule([{"at_row": 4 * STREAMS, "weights": {"chat": 1.0}}]) | {"rows_per_step": 2 * STREAMS}
    loader = make_loader(blend, **by_row)
    loader.restore(state)
    assert loader.mixture_state()["rows_per_step"] is None
    for other in (schedule([STAGES[0] | {"at_step": 3}, STAGES[1]]), {}):
        with pytest.raises(ValueError, match="stages of the mixture schedule that have begun are others"):
            make_loader(blend, **other).restore(state)


def test_a_schedule_without_effect_changes_no_sample(make_loader, blend, schedule):
    kinds = ("text", "image_text", "audio_text", "video_text", "interleaved", "chat")
    same = schedule([{"at_step": 2, "weights": dict.fromkeys(kinds, 1.0)}])
    assert replay(make_loader, blend, [(1, 5, same)])[0] == replay(make_loader, blend, [(1, 5, {})])[0]


def test_a_blend_of_repetitions_repeats_its_datasets_as_often_as_it_says(make_loader, tmp_path, schedule):
    counts = {"text": 72, "chat": 40}  # of which 8 are held out
    corpus.build(tmp_path / "shards", counts)
    blend = corpus.write_epoch_blend(tmp_path / "shards", list(counts))
    loader = make_loader(blend, data_shuffle_buffer=0, data_packing_buffer=1)
    keys: Counter[str] = Counter()
    while keys.total() < 3 * 96:
        keys.update(key for row in next(loader).sample_keys for key in row)
    assert len(keys) == 96 and max(keys.values()) <= 5 and min(keys.values()) >= 1
    with pytest.raises(MixtureScheduleError, match="a blend_epochized, which has repetitions and no weights"):
        make_loader(blend, **schedule(STAGES))


@pytest.mark.parametrize(
    ("weight", "message"),
    [(-0.5, "-0.5 is not"), (float("nan"), "nan' is not"), (0.0, "chat has weight 0"), (1e-9, "resolve 5.96e-08")],
)
def test_weights_of_a_blend_that_cannot_be_drawn_are_refused(make_loader, tmp_path, weight, message):
    corpus.build(tmp_path / "shards", {"text": 16, "chat": 16})
    with pytest.raises(DataFeedError, match=message):
        make_loader(corpus.write_blend(tmp_path / "shards", {"text": 1.0, "chat": weight}))


def test_a_dataset_of_weight_0_waits_for_its_stage(make_loader, tmp_path, schedule):
    corpus.build(tmp_path / "shards", {"text": 72, "chat": 40})
    blend = corpus.write_blend(tmp_path / "shards", {"text": 1.0, "chat": 0.0})
    settings = schedule([{"at_step": 3, "weights": {"chat": 1.0}}])
    steps, _ = replay(make_loader, blend, [(1, 8, settings | {"data_shuffle_buffer": 0, "data_packing_buffer": 1})])
    kinds = [{key.partition("/")[0] for row in step for key in row} for step in steps]
    assert kinds[0] == {"text"} and kinds[7] == {"chat"}


def test_a_stage_that_leaves_a_stream_empty_is_refused_before_it_comes(make_loader, tmp_path, schedule, capsys):
    corpus.build(tmp_path / "shards", {"text": 16, "chat": 4}, per_shard=2)  # 2 chats are left for 4 streams
    blend = corpus.write_blend(tmp_path / "shards", {"text": 1.0, "chat": 1.0})
    make_loader(blend)
    assert "WARNING: chat is so small that 2 of the 4 streams of dp_rank=0" in capsys.readouterr().out
    with pytest.raises(MixtureScheduleError, match=r"stream \d of 4 has no sample of mixture stage 2 of 2 \(chat 1\)"):
        make_loader(blend, **schedule([{"at_step": 9000, "weights": {"chat": 1.0}}]))
