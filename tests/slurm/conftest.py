"""A private Slurm for the session, and a run submitted to it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run_directory import Run
from tests.slurm.cluster import NODES, Cluster, missing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def cluster(session_cluster):
    """The cluster with an empty queue before and after, whatever the test does to it."""
    yield session_cluster
    session_cluster.restore()
    for node in NODES:
        session_cluster.set_task_environment(node)


@dataclass
class Submitted:
    """A run and the job that carries it."""

    cluster: Cluster
    run: Run
    job: str = ""
    settings: dict[str, object] = field(default_factory=dict)

    def submit(self, *training: object, kind: str = "pretrain", **settings: object) -> str:
        """Queue it with slurm/submit; the CPU profile, quick retries and low limits unless `settings` say otherwise."""
        chosen = (
            {
                "PROFILE": "cpu",
                "RUN": self.run.root,
                "PYTHON": sys.executable,
                "TIME": "10",
                "MIN_FREE_GIB": 0.01,
                "RETRY_DELAY_S": 0,
                "PREFLIGHT": "nodes",
                "CHECK": "off",
            }
            | self.settings
            | settings
        )
        words = [f"{key}={value}" for key, value in chosen.items()]
        command = [str(ROOT / "slurm" / "submit"), kind, *words, "--", *map(str, training)]
        self.job = self.cluster.command(*command).strip()
        return self.job

    def await_end(self, timeout: float, state: str = "COMPLETED") -> dict[str, str]:
        """Wait for the end of the job, and fail with its log when it ends otherwise than in `state`."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        try:
            job = self.cluster.await_state(self.job, *ends, timeout=timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log()}") from None
        assert job["JobState"] == state, self.log()
        return job

    def await_iteration(self, iteration: int, timeout: float) -> None:
        """Wait until training has logged `iteration`."""
        self.cluster.wait(
            lambda: any(row["iteration"] >= iteration for row in runlog.read(self.run.metrics)),
            timeout,
            f"iteration {iteration} was not reached",
            self.log,
        )

    def await_event(self, event: str, timeout: float) -> dict:
        """Wait for an event of this name and return the newest."""
        self.cluster.wait(lambda: self.events(event), timeout, f"no event {event}", self.log)
        return self.events(event)[-1]

    def events(self, event: str) -> list[dict]:
        return [each for each in runlog.read_events(self.run) if each["event"] == event]

    def losses(self, relative: float = 0.0) -> dict[int, dict[str, float]]:
        """Loss per modality of every iteration; trained twice, it must have been the same, up to a `relative` error.

        Megatron's own mean is left out: the second one after a start also contains the first.
        """
        found: dict[int, dict[str, float]] = {}
        for row in runlog.read(self.run.metrics):
            losses = {name: value for name, value in row.items() if name.startswith("loss_")}
            first = found.setdefault(row["iteration"], losses)
            assert losses == pytest.approx(first, rel=relative, abs=0), f"iteration {row['iteration']}"
        return found

    def last_metrics_time(self) -> float:
        """When training last logged, in seconds since the epoch; 0 when it has not."""
        return max((row["time"] for row in runlog.read(self.run.metrics)), default=0.0)

    def sample_keys(self) -> dict[int, list]:
        """Keys of every iteration's global batch, sorted; of an iteration trained twice those of the later time.

        Needs metrics of every iteration: they tell how many ranks the later time had.
        """
        starts = [(event["time"], event["world_size"]) for event in self.events("start")]
        ranks = {
            row["iteration"]: [world for began, world in starts if began < row["time"]][-1]
            for row in runlog.read(self.run.metrics)
        }
        logs = [
            {row["iteration"]: row["keys"] for row in runlog.read(path)}
            for path in sorted(self.run.samples.glob("*.jsonl"))
        ]
        return {
            iteration: sorted(key for log in logs[:count] for key in log[iteration])
            for iteration, count in ranks.items()
        }

    def log(self) -> str:
        """What the job and the ranks printed, and the events."""
        events = [json.dumps(event) for event in runlog.read_events(self.run)]
        return "\n".join([self.log_of_job(), *events])[-12000:]

    def log_of_job(self) -> str:
        """What the job and the ranks printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.run.logs.glob("*.out")))


@pytest.fixture
def submitted(cluster, tmp_path):
    return Submitted(cluster, Run(tmp_path / "run"))
