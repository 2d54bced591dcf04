import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.data.mixture_schedule import (
    MixtureSchedule,
    MixtureScheduleError,
    constant,
    dataset_name,
    load_schedule,
)

NAMES = ("web/text", "web/image_text", "books/text")
WEIGHTS = (3.0, 1.0, 4.0)


@st.composite
def schedules(draw) -> MixtureSchedule:
    starts, ramps = [0], [0]
    for _ in range(draw(st.integers(0, 4))):
        starts.append(starts[-1] + ramps[-1] + draw(st.integers(1, 20)))
        ramps.append(draw(st.integers(0, 20)))
    rows = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda row: sum(row) > 1e-3)
    weights = [tuple(value / sum(row) for value in row) for row in (draw(rows) for _ in starts)]
    return MixtureSchedule(NAMES, tuple(starts), tuple(ramps), tuple(weights))


@given(schedules(), st.integers(0, 200))
def test_weights_are_those_of_the_stage_or_between_two(schedule, rounds):
    found, stage = schedule.weights_at(rounds), schedule.stage_at(rounds)
    assert sum(found) == pytest.approx(1)
    assert schedule.starts[stage] <= rounds
    assert stage + 1 == len(schedule.starts) or rounds < schedule.starts[stage + 1]
    before, after = schedule.weights[max(stage - 1, 0)], schedule.weights[stage]
    if rounds >= schedule.starts[stage] + schedule.ramps[stage]:
        assert found == after
    for value, first, second in zip(found, before, after, strict=True):
        assert min(first, second) - 1e-12 <= value <= max(first, second) + 1e-12


@given(schedules())
def test_a_ramp_is_linear_and_begins_at_the_weights_before(schedule):
    for stage in range(1, len(schedule.starts)):
        start, ramp = schedule.starts[stage], schedule.ramps[stage]
        if ramp:
            assert schedule.weights_at(start) == pytest.approx(schedule.weights[stage - 1])
            middle = [sum(pair) / 2 for pair in zip(schedule.weights[stage - 1], schedule.weights[stage], strict=True)]
            if ramp % 2 == 0:
                assert schedule.weights_at(start + ramp // 2) == pytest.approx(middle)


@given(schedules(), st.integers(0, 100), st.data())
def test_a_run_may_go_on_with_another_schedule_if_it_drew_alike_so_far(schedule, rounds, data):
    saved = schedule.stages()
    assert not schedule.check_continues(saved, rounds)
    changed = data.draw(st.integers(0, len(saved) - 1))
    other = [list(stage) for stage in saved]
    other[changed][2] = [0.25, 0.25, 0.5001]
    if schedule.starts[changed] < max(rounds, 1):  # it was drawn from, or is the one that a stream begins with
        with pytest.raises(ValueError, match="that have begun are others than in the checkpoint"):
            schedule.check_continues(other, rounds)
    else:
        assert schedule.check_continues(other, rounds)


@given(schedules(), st.integers(1, 200))
def test_a_run_reaches_the_weights_of_every_stage_or_is_refused(schedule, rounds):
    last = max(starts + ramps for starts, ramps in zip(schedule.starts, schedule.ramps, strict=True))
    if last <= rounds and schedule.starts[-1] < rounds:
        schedule.check_ends(rounds * 8 + 7, 8)
    else:
        with pytest.raises(MixtureScheduleError, match=f"training ends with row {rounds * 8 - 1}: train longer"):
            schedule.check_ends(rounds * 8 - 1, 8)


def load(tmp_path, stages, rows_per_step=16, round_rows=8, **others) -> MixtureSchedule:
    path = tmp_path / "schedule.yaml"
    path.write_text(yaml.safe_dump({"stages": stages, **others}))
    return load_schedule(path, NAMES, WEIGHTS, round_rows, rows_per_step)


def test_steps_and_rows_are_turned_into_microbatches_of_a_stream(tmp_path):
    found = load(
        tmp_path,
        [
            {"at_step": 10, "weights": {"web": 1.0, "books/text": 1.0}},
            {"at_row": 480, "over": 80, "weights": {"books/text": 2}},
        ],
    )
    assert found.starts == (0, 20, 60) and found.ramps == (0, 0, 10)
    assert found.weights == ((0.375, 0.125, 0.5), (0.375, 0.125, 0.5), (0.0, 0.0, 1.0))


def test_a_stage_at_the_beginning_takes_the_place_of_the_blend(tmp_path):
    found = load(tmp_path, [{"at_step": 0, "weights": {"web/text": 1}}])
    assert found == MixtureSchedule(NAMES, (0,), (0,), ((1.0, 0.0, 0.0),))
    assert constant(NAMES, WEIGHTS).weights == ((0.375, 0.125, 0.5),)


ONE = {"web": 1.0}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages=.*at least 1"),
        ([{"weights": ONE}], "either `at_step` or `at_row`"),
        ([{"at_step": 1, "at_row": 16, "weights": ONE}], "either `at_step` or `at_row`"),
        ([{"at_step": -1, "weights": ONE}], "stages.0.at_step=-1"),
        ([{"at_step": 1, "weights": {}}], "stages.0.weights"),
        ([{"at_step": 1, "weights": {"wbe": 1}}], "'wbe' is no dataset of the blend; it has books/text"),
        ([{"at_step": 1, "weights": {"web": -1}}], "web=-1.0 is negative"),
        ([{"at_step": 1, "weights": {"web": 0}}], "add up to 0"),
        ([{"at_step": 1, "weights": {"web": float("nan")}}], "stages.0.weights.web=nan"),
        ([{"at_step": 1, "weights": {"web": float("inf")}}], "stages.0.weights.web=inf"),
        ([{"at_step": 1, "weights": {"web": 1e308, "books/text": 1e308}}], "add up to inf"),
        ([{"at_step": 1, "weights": {"web": 1, "books": 1e-9}}], "books/text has 1e-09 of the whole"),
        ([{"at_step": True, "weights": ONE}], "stages.0.at_step=True: .*yes is no number"),
        ([{"at_step": 1, "weights": {"web": True}}], "stages.0.weights=.*yes is no number"),
        ([{"at_step": 1, "wieghts": ONE, "weights": ONE}], "stages.0.wieghts"),
        ([{"at_row": 9, "weights": ONE}], "at=9 is row 9, no multiple of the 8 rows"),
        ([{"at_row": 8, "over": 3, "weights": ONE}], "over=3 is row 3"),
        ([{"at_step": 0, "over": 3, "weights": ONE}], "there is nothing before"),
        ([{"at_step": 5, "weights": ONE}, {"at_step": 5, "weights": ONE}], "let them follow each other"),
        ([{"at_step": 5, "over": 3, "weights": ONE}, {"at_step": 7, "weights": ONE}], "is reached 48 rows later"),
    ],
)
def test_what_cannot_be_carried_out_is_named(tmp_path, stages, message):
    with pytest.raises(MixtureScheduleError, match=message) as refused:
        load(tmp_path, stages)
    assert "schedule.yaml" in str(refused.value)


def test_steps_of_changing_size_are_no_place(tmp_path):
    with pytest.raises(MixtureScheduleError, match="use `at_row`"):
        load(tmp_path, [{"at_step": 1, "weights": ONE}], rows_per_step=None)
    assert load(tmp_path, [{"at_row": 16, "weights": ONE}], rows_per_step=None).starts == (0, 2)


@pytest.mark.parametrize("text", ["[1", "- a", "stages: 3", "3", "", "[" * 5000, "a: 2020-13-45", "&a [*a]"])
def test_what_is_no_schedule_is_refused(tmp_path, text):
    path = tmp_path / "schedule.yaml"
    path.write_text(text)
    with pytest.raises(MixtureScheduleError, match=str(path)):
        load_schedule(path, NAMES, WEIGHTS, 8, 16)
    with pytest.raises(MixtureScheduleError, match="cannot read it"):
        load_schedule(tmp_path / "none.yaml", NAMES, WEIGHTS, 8, 16)


def test_what_is_said_twice_is_refused_rather_than_dropped(tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text("stages: [{at_step: 1, weights: {web: 0.5, books: 0.1, web: 0.2}}]")
    with pytest.raises(MixtureScheduleError, match="'web' is there twice"):
        load_schedule(path, NAMES, WEIGHTS, 8, 16)


def test_datasets_are_named_by_corpus_and_kind():
    assert dataset_name({"kind": "text", "corpus": "web"}) == "web/text"
    assert dataset_name({"kind": "text"}) == "text"
