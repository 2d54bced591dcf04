"""The real training entry on a real Slurm: what a fault costs is time, never a step or a sample.

Every test compares with one uninterrupted run of 2 nodes x 1 rank with expert parallelism 2.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_anyexperts.survival import checkpoints, runlog
from megatron_anyexperts.survival.manifest import iteration_directory, saved_iterations
from megatron_anyexperts.survival.run_directory import Run
from tests.feed import corpus
from tests.slurm.conftest import Submitted

PROGRAM = "pretrain_multimodal"
ITERATIONS = 12
SAVE_INTERVAL = 4
MODEL = {
    "--config": "pretrain/configs/demo.yaml",
    "--hybrid-layer-pattern": "*E",
    "--vision-num-layers": 1,
    "--audio-num-layers": 1,
    "--seq-length": 128,
    "--global-batch-size": 8,
    "--expert-model-parallel-size": 2,
    "--lr-warmup-iters": 1,
    "--lr-decay-iters": ITERATIONS,
    "--log-interval": 1,
    "--eval-iters": 0,
    "--data-shuffle-buffer": 10,
    "--data-packing-buffer": 8,
    "--train-iters": ITERATIONS,
    "--save-interval": SAVE_INTERVAL,
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Flags that name a small generated corpus, its tokenizer and a mixture that changes."""
    folder = tmp_path_factory.mktemp("corpus")
    stages = folder / "stages.yaml"
    stages.write_text(
        f"stages:\n- {{at_step: {SAVE_INTERVAL - 2}, over: 4, weights: {{text: 1, image_text: 3}}}}\n"
        f"- {{at_step: {SAVE_INTERVAL + 3}, weights: {{audio_text: 1}}}}\n"
    )
    blend = corpus.build(folder / "shards", {"text": 200, "image_text": 100, "audio_text": 80})
    tokenizer = corpus.write_tokenizer(folder / "tokenizer")
    return {"--data-path": blend, "--tokenizer-model": tokenizer, "--data-mixture-schedule": stages}


def submit(run: Submitted, data: dict, settings: dict | None = None, **flags: object) -> None:
    chosen = MODEL | data | {"--" + name.replace("_", "-"): value for name, value in flags.items()}
    run.submit(*(word for pair in chosen.items() for word in pair), **({"NODES": 2} | (settings or {})))


@pytest.fixture(scope="session")
def uninterrupted(session_cluster, tmp_path_factory, data):
    """Losses and sample keys by iteration of a run to which nothing happens."""
    run = Submitted(session_cluster, Run(tmp_path_factory.mktemp("uninterrupted") / "run"))
    submit(run, data, {"CHECK": "on"})
    run.await_end(200)
    assert sorted(run.losses()) == list(range(1, ITERATIONS + 1))
    assert [event["event"] for event in run.events("fallback") + run.events("save_failed")] == []
    return run.losses(), run.sample_keys()


def assert_equal_to(uninterrupted, run: Submitted) -> None:
    losses, keys = uninterrupted
    assert run.losses() == losses  # bit-identical, also where an iteration was trained twice
    assert run.sample_keys() == keys


def attempts(run: Submitted) -> int:
    return len(run.events("attempt"))


def test_a_signal_then_a_truncated_newest_checkpoint(submitted, data, uninterrupted):
    submit(submitted, data)
    submitted.await_iteration(SAVE_INTERVAL + 2, 200)
    submitted.cluster.command("scancel", "--signal=TERM", submitted.job)
    submitted.await_event("exit", 60)
    submitted.cluster.wait(lambda: any("reason" in event for event in submitted.events("exit")), 60, "no exit")
    # The job now waits to be started again: time for a file system to lose the end of a file.
    newest = checkpoints.newest_sealed(submitted.run.checkpoints)
    assert newest > SAVE_INTERVAL
    shard = next(iteration_directory(submitted.run.checkpoints, newest).glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size - 1)
    submitted.await_end(200)
    (fallback,) = submitted.events("fallback")
    assert fallback["iteration"] == SAVE_INTERVAL
    assert f"iteration {newest} skipped: {shard.name} has" in fallback["reason"]
    assert_equal_to(uninterrupted, submitted)


def moment_to_kill(run: Submitted, kind: str, draw: random.Random) -> None:
    """Wait for a random moment of the present attempt: while it starts, saves or steps."""
    folder, began = run.run.checkpoints, run.events("attempt")[-1]["time"]
    if kind == "start":
        time.sleep(draw.uniform(0, 8))
    elif kind == "save":

        def saving() -> bool:
            sealed = set(checkpoints.sealed_iterations(folder))
            unsealed = set(saved_iterations(folder)) - sealed
            return any(iteration_directory(folder, each).stat().st_mtime > began for each in unsealed)

        run.cluster.wait(saving, 200, "no save", run.log)
        time.sleep(draw.uniform(0, 0.3))
    else:
        # One save further than before, so that kills do not keep the run from progressing.
        sealed = checkpoints.newest_sealed(folder) or 0
        target = min(sealed + SAVE_INTERVAL + draw.randint(1, 2), ITERATIONS - 1)

        def reached() -> bool:
            rows = runlog.read(run.run.metrics)
            return any(row["iteration"] >= target and row["time"] > began for row in rows)

        run.cluster.wait(reached, 200, "no step", run.log)


def kill_at_random(run: Submitted, data: dict, kills: int, seed: int) -> None:
    """Train while random ranks are killed, in turn at the start, during a save and between steps."""
    draw = random.Random(seed)
    submit(run, data, {"MAX_FAILURES": kills + 1})
    for kill in range(kills):
        run.cluster.wait(lambda kill=kill: attempts(run) == kill + 1, 60, "no restart", run.log)
        run.cluster.wait(
            lambda: all(run.cluster.pid(run.job, rank, PROGRAM) for rank in (0, 1)), 60, "no rank", run.log
        )
        moment_to_kill(run, ("start", "save", "step")[kill % 3], draw)
        os.kill(run.cluster.pid(run.job, draw.randrange(2), PROGRAM), signal.SIGKILL)
        run.cluster.wait(
            lambda kill=kill: sum("reason" in event for event in run.events("exit")) == kill + 1,
            60,
            "the kill went unnoticed",
            run.log,
        )
    run.await_end(300)


def test_ranks_killed_at_random_moments(submitted, data, uninterrupted):
    kill_at_random(submitted, data, kills=2, seed=1)
    assert_equal_to(uninterrupted, submitted)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ranks_killed_at_ten_random_moments(submitted, data, uninterrupted):
    kill_at_random(submitted, data, kills=10, seed=2)
    assert_equal_to(uninterrupted, submitted)


def test_a_lost_node_leaves_a_smaller_run_that_grows_again(submitted, data, uninterrupted):
    losses, keys = uninterrupted
    submit(submitted, data, {"NODES": "1-2"})
    submitted.await_iteration(SAVE_INTERVAL + 1, 200)
    submitted.cluster.lose_node("n2")
    submitted.cluster.wait(lambda: attempts(submitted) == 2, 60, "no restart", submitted.log)
    submitted.cluster.wait(lambda: len(submitted.events("start")) == 2, 120, "no second start", submitted.log)
    resumed_at = submitted.events("start")[1]["time"]
    submitted.cluster.wait(lambda: submitted.last_metrics_time() > resumed_at, 200, "no step", submitted.log)
    submitted.cluster.return_node("n2")
    submitted.cluster.command("scancel", "--batch", "--signal=TERM", submitted.job)
    submitted.await_end(300)
    assert [event["nodes"] for event in submitted.events("attempt")] == [["n1", "n2"], ["n1"], ["n1", "n2"]]
    assert [event["world_size"] for event in submitted.events("start")] == [2, 1, 2]
    assert submitted.sample_keys() == keys
    found = submitted.losses(relative=1e-5)
    assert found.keys() == losses.keys()
    for iteration, expected in losses.items():
        assert found[iteration] == pytest.approx(expected, rel=1e-5), iteration


def test_a_full_disk_during_a_save(submitted, data, uninterrupted):
    folder = submitted.run.create().checkpoints
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        submit(submitted, data)
        first = submitted.await_event("save_failed", 200)
        assert first["iteration"] == SAVE_INTERVAL
        # Room for one checkpoint and a half: the second save succeeds, and before the last its lack is noticed.
        subprocess.run(["mount", "-o", "remount,size=20m", folder], check=True)
        submitted.cluster.wait(lambda: len(submitted.events("save_failed")) > 1, 200, "no second", submitted.log)
        assert submitted.events("save_failed")[1]["iteration"] == ITERATIONS
        assert checkpoints.select_resume(folder).iteration == ITERATIONS - SAVE_INTERVAL
        subprocess.run(["mount", "-o", "remount,size=80m", folder], check=True)
        submitted.await_end(200)
        reasons = {event["reason"].partition(",")[0] for event in submitted.events("exit")}
        assert reasons == {"last save failed", "finished"}
        assert checkpoints.select_resume(folder).iteration == ITERATIONS
        assert_equal_to(uninterrupted, submitted)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_two_trainings_share_a_node(cluster, tmp_path, data, uninterrupted):
    runs = [Submitted(cluster, Run(tmp_path / name), settings={"SBATCH_EXTRA": "--nodelist=n1"}) for name in "ab"]
    for run in runs:
        submit(run, data, {"NODES": 1, "RANKS_PER_NODE": 2})
    for run in runs:
        run.await_end(400)
        assert_equal_to(uninterrupted, run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_time_limit(submitted, data, uninterrupted):
    submit(submitted, data, {"TIME": 2, "SIGNAL_LEAD_S": 45, "HANG_S": 600, "MAX_FAILURES": 9})
    submitted.await_iteration(SAVE_INTERVAL + 2, 400)
    # From here the ranks stand still until the signal comes: a fast machine would be done before.
    ranks = [submitted.cluster.pid(submitted.job, rank, PROGRAM) for rank in (0, 1)]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    submitted.cluster.wait(lambda: all(map(has_pending_sigterm, ranks)), 150, "no signal", submitted.log)
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    submitted.await_end(400)
    assert "time limit" in {event.get("reason") for event in submitted.events("exit")}
    assert_equal_to(uninterrupted, submitted)


def has_pending_sigterm(pid: int) -> bool:
    pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(pending[1], 16) >> (signal.SIGTERM - 1) & 1)
