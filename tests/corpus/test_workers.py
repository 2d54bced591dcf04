"""Tasks are done by whoever is there: all of them, whatever the number of participants."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.corpus import workers as workers_module
from megatron_anyexperts.corpus.workers import PATIENCE_SECONDS, Handled, Share, in_turn, run_tasks


@given(count=st.integers(0, 40), parts=st.integers(1, 9), data=st.data())
def test_every_participant_would_do_everything_its_own_share_first(count, parts, data):
    share = Share(data.draw(st.integers(0, parts - 1)), parts)
    order = list(in_turn(range(count), share))
    assert sorted(order) == list(range(count))
    own = range(count)[share.part :: parts]
    assert order[: len(own)] == list(own)


@dataclass(frozen=True)
class FileTask:
    """Creates a file; `content` is what it fails with, if anything."""

    path: Path
    failure: str = ""

    @property
    def claim(self) -> Path:
        return self.path.with_suffix(".claim")

    def done(self) -> bool:
        return self.path.exists()

    def run(self) -> Handled:
        if self.failure:
            raise ValueError(self.failure)
        self.path.touch()
        return Handled(1)

    def after_crash(self, signal_number: int) -> None:
        raise RuntimeError(f"signal {signal_number}")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_another_has_claimed_is_left_to_it_until_the_claim_is_old(tmp_path, workers):
    tasks = [FileTask(tmp_path / str(number)) for number in range(4)]
    tasks[1].claim.touch()
    os.utime(tasks[1].claim, (time.time() - PATIENCE_SECONDS - 1,) * 2)
    tasks[3].claim.touch()
    done = []
    other = threading.Timer(3.0, tasks[3].path.touch)
    other.start()
    run_tasks(tasks, Share(0, 2), workers, done.append)
    assert sorted(handled.items for handled in done) == [0, 1, 1, 1]


def test_the_claim_of_a_long_task_stays_young_until_it_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "PATIENCE_SECONDS", 0.4)
    task = SlowTask(tmp_path / "a")
    run_tasks([task], Share(0, 2), 0, lambda handled: None)
    seen = [float(line) for line in task.path.read_text().split()]
    assert max(seen) < 0.4
    time.sleep(0.6)
    assert time.time() - task.claim.stat().st_mtime > 0.4


@dataclass(frozen=True)
class SlowTask(FileTask):
    """Takes longer than anybody's patience, and notes the age of its claim from time to time."""

    def run(self) -> Handled:
        ages = []
        for _ in range(20):
            time.sleep(0.05)
            ages.append(time.time() - self.claim.stat().st_mtime)
        self.path.write_text("\n".join(map(str, ages)))
        return Handled(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_task_reaches_the_caller(tmp_path, workers):
    with pytest.raises(ValueError, match="no such thing"):
        run_tasks([FileTask(tmp_path / "a", "no such thing")], Share(), workers, lambda items: None)


@pytest.mark.parametrize(("part", "parts"), [(2, 2), (-1, 3), (0, 0)])
def test_a_share_outside_is_refused(part, parts):
    with pytest.raises(ValueError, match="--part counts from 0"):
        Share(part, parts)
