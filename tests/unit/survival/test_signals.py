"""A helper process survives SIGTERM and does not survive its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import multiprocessing, time
from multiprocessing.managers import SyncManager
from megatron_anyexperts.survival.signals import live_with_parent
manager = SyncManager(ctx=multiprocessing.get_context("fork"))
manager.start(initializer=live_with_parent)
queue = manager.Queue()
print(manager._process.pid, flush=True)
input()
queue.put("still there")
print(queue.get(), flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_helper_outlives_a_stop_signal_but_not_its_rank(stop):
    rank = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    helper = int(rank.stdout.readline())
    os.kill(helper, stop)
    time.sleep(0.3)
    rank.stdin.write("\n")
    rank.stdin.flush()
    assert rank.stdout.readline() == "still there\n"
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 10
    while alive(helper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(helper)
