"""The logs of a run and the screen made of them."""

from __future__ import annotations

import pytest

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.heartbeat import start_heartbeat
from megatron_anyexperts.survival.manifest import iteration_directory, seal
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.survival.status import screen, seconds_per_iteration


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(tmp_path / "run").create()
    runlog.append_event(run, "attempt", reason="first start")
    for iteration in range(1, 11):
        runlog.append_metrics(
            run, iteration, loss=5.0 - iteration / 10, loss_text=4.5, tokens_per_s=123456.0, train_iters=100,
            load_max_over_mean=1.04, data_wait_share=0.007,
        )  # fmt: skip
    folder = iteration_directory(run.checkpoints, 10)
    folder.mkdir()
    (folder / "data").write_bytes(b"x")
    seal(folder)
    return run


def test_one_screen_tells_how_the_run_goes(run):
    start_heartbeat(run, 0).beat(10)
    text = screen(run)
    for expected in (
        "training on ", "(1 ranks)", "10 of 100 (10.0%)", "4.0000  (text 4.5000)", "123,456",
        "checkpoint    iteration 10, 0 s ago", "1.040 max over mean", "0.7% of step time", "restarts      0",
    ):  # fmt: skip
        assert expected in text
    assert len(text.splitlines()) < 24


@pytest.mark.parametrize(
    ("event", "fields", "state"),
    [
        ("exit", {"reason": "time limit"}, "waiting to restart: time limit"),
        ("finished", {}, "finished"),
        ("stop", {"summary": "crash loop: 3 attempts"}, "stopped: crash loop: 3 attempts"),
    ],
)
def test_the_state_follows_the_last_event(run, event, fields, state):
    runlog.append_event(run, event, **fields)
    assert f"state         {state}" in screen(run)


def test_restarts_are_counted_with_their_reasons(run):
    runlog.append_event(run, "exit", reason="hang of rank 3 on n7", iteration=10)
    runlog.append_event(run, "attempt", reason="hang of rank 3 on n7")
    text = screen(run)
    assert "restarts      1" in text
    assert "exit at iteration 10: hang of rank 3 on n7" in text


def test_a_finished_run_has_no_end_to_expect(run):
    runlog.append_metrics(run, 100, loss=1.0, train_iters=100)
    runlog.append_event(run, "finished", iteration=100)
    assert "expected end  reached\n" in screen(run)


def test_a_start_without_a_sign_of_life_is_told(run):
    assert "state         starting: no rank has given a sign of life yet, 0 s after the start" in screen(run)


def test_an_array_that_builds_shards_is_no_idle_run(tmp_path):
    run = Run(tmp_path)
    for job, index, state in (("7", 0, "failed"), ("9", 0, "started"), ("9", 1, "started"), ("9", 0, "finished")):
        runlog.append_event(run, "task", job=job, index=index, count=2, state=state)
    assert "state         building shards with 2 tasks: 1 finished, 1 started\n" in screen(run)


def test_what_a_run_says_does_not_command_the_terminal(run):
    start_heartbeat(run, 0)
    beat = run.heartbeats / "rank0000.json"
    beat.write_text(beat.read_text().replace('"node": "', '"node": "\\u001b[2Jevil\\u202e'))
    runlog.append_event(run, "hang", reason="\x1b]0;title\x07 gone\r\nstate         finished")
    text = screen(run)
    assert all(line.isprintable() for line in text.splitlines())
    assert "\\x1b[2Jevil\\u202e" in text
    assert not any(line.startswith("state         finished") for line in text.splitlines())


def test_silence_is_told(run):
    start_heartbeat(run, 0)
    assert "silent: no sign of life for 2 h" in screen(run, now=runlog.read_events(run)[0]["time"] + 2 * 3600 + 9)


def test_a_fresh_run_and_a_missing_one(tmp_path):
    assert "not started" in screen(Run(tmp_path))
    with pytest.raises(FileNotFoundError, match="no run directory"):
        screen(Run(tmp_path / "absent"))


def test_a_torn_line_loses_nothing_else(run):
    with run.metrics.open("a") as log:
        log.write('{"iteration": 11, "lo')
    runlog.append_metrics(run, 12, loss=1.0)
    assert [row["iteration"] for row in runlog.read_metrics(run)] == [*range(1, 11), 12]


def test_of_steps_trained_twice_the_later_ones_count(run):
    for iteration in (5, 7):  # resumed at 4, with a line for every other step
        runlog.append_metrics(run, iteration, loss=99.0)
        runlog.append_held_out(run, iteration, loss=98.0)
    runlog.append_held_out(run, 7, loss=97.0)
    rows = runlog.read_metrics(run)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 7]
    assert [row["loss"] for row in rows[4:]] == [99.0, 99.0]
    assert [(row["iteration"], row["loss"]) for row in runlog.read_held_out(run)] == [(5, 98.0), (7, 97.0)]


def test_figures_by_layer_are_read_of_the_newest_line_alone_on_request(tmp_path):
    run = Run(tmp_path)
    for iteration in (1, 2, 3, 2):
        runlog.append_metrics(run, iteration, loss=1.0, routing={"all": 5, "layers": {"2": iteration}})
    whole, part = runlog.read_metrics(run), runlog.read_metrics(run, layers=False)
    assert [row["routing"] for row in part] == [{"all": 5}, {"all": 5, "layers": {"2": 2}}]
    assert [row["routing"].get("layers") for row in whole] == [{"2": 1}, {"2": 2}]


def test_pauses_between_restarts_hardly_change_the_expected_end():
    times = [0, 2, 4, 6, 4000, 4002, 4004]
    assert seconds_per_iteration([{"iteration": n, "time": time} for n, time in enumerate(times)]) == 2
