"""A job array builds shards; one of its tasks is killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.corpus.raw import raw_corpus, tree_bytes
from tests.slurm.conftest import ROOT, Submitted


@pytest.mark.timeout(600)
def test_an_array_with_a_killed_task_builds_the_bytes_of_one_process(submitted: Submitted, tmp_path):
    corpus = raw_corpus(tmp_path / "raw", scale=8)
    tool = [sys.executable, ROOT / "data_tools" / "build_shards.py", corpus, "--quiet", "--output"]
    subprocess.run([*tool, tmp_path / "one", "--workers", "2"], check=True, capture_output=True)

    cluster = submitted.cluster
    array = submitted.submit(corpus, "--quiet", "--output", tmp_path / "many", kind="build_shards", ARRAY="0-1")
    # Part 0 writes the corpus' metadata at the end: without it nothing is finished.
    victim, other = f"{array}_0", f"{array}_1"
    cluster.wait(lambda: (tmp_path / "many" / ".build").is_dir(), 120, "the build did not begin", submitted.log)
    job_id = cluster.job(victim)["JobId"]
    cluster.wait(lambda: cluster.pid(job_id, 0, "build_shards"), 60, "no process", submitted.log)
    os.kill(cluster.pid(job_id, 0, "build_shards"), signal.SIGKILL)
    cluster.await_state(victim, "FAILED", timeout=60)
    assert not (tmp_path / "many" / "manifest.json").exists()
    cluster.control("requeue", victim)
    for task in (other, victim):
        cluster.await_state(task, "COMPLETED", timeout=400)
    assert tree_bytes(tmp_path / "many") == tree_bytes(tmp_path / "one")
