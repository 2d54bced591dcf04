"""The preflight finds unfit nodes of a real allocation."""

from __future__ import annotations

import subprocess

import pytest

ITERATIONS = 3


@pytest.fixture
def counting(submitted):
    submitted.settings = {"ENTRY": "tests/slurm/counting_run.py"}
    return submitted


@pytest.fixture
def wrong_version(counting, tmp_path):
    """Node n2 has another webdataset first on its path."""
    package = tmp_path / "old" / "webdataset-0.0.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.0.1\n")
    counting.cluster.set_task_environment("n2", PYTHONPATH=str(package.parent))
    return "n2: webdataset is 0.0.1, not "


@pytest.fixture
def full_disk(counting, tmp_path):
    """Node n2 has a temporary directory without room."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], check=True)
    (mount / "rubbish").write_bytes(bytes(65536))
    counting.cluster.set_task_environment("n2", TMPDIR=str(mount))
    yield f"n2: cannot write to the temporary directory {mount}: No space left on device"
    subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("fault", ["wrong_version", "full_disk"])
def test_an_unfit_node_stops_the_job_with_one_line(counting, fault, request):
    reason = request.getfixturevalue(fault)
    counting.submit("--train-iters", ITERATIONS, NODES=2)
    counting.await_end(40, state="FAILED")
    (stop,) = counting.events("stop")
    assert stop["summary"].startswith(f"preflight: 1 of 2 nodes are fit, 2 are needed ({reason}")
    assert f"stopped: {stop['summary']}" in counting.log().splitlines()
    assert not counting.losses()


@pytest.mark.parametrize("fault", ["wrong_version", "full_disk"])
def test_a_spare_replaces_an_unfit_node(counting, fault, request):
    reason = request.getfixturevalue(fault)
    counting.submit("--train-iters", ITERATIONS, NODES=1, SPARE_NODES=1)
    counting.await_end(40)
    assert counting.events("preflight")[0]["reason"].startswith(reason)
    assert len(counting.losses()) == ITERATIONS


def test_a_slow_network_is_refused(counting):
    counting.submit("--train-iters", ITERATIONS, NODES=2, PREFLIGHT="full", MIN_GIGABYTES_PER_S=1000)
    counting.await_end(40, state="FAILED")
    assert "GB/s to its neighbours, not 1000" in counting.events("stop")[0]["summary"]
