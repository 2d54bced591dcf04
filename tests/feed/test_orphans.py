"""Worker processes never outlive their rank, whenever it is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.feed import corpus

RANKS = """
import os, sys
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.loader import MicrobatchLoader
from megatron_anyexperts.media import MediaShape

blend, tokenizer = sys.argv[1:]
small = {"data_image_max_patches": 256, "data_video_max_patches": 256}
config = DataConfig(data_shuffle_buffer=12, data_packing_buffer=16, **small)
for _ in sys.stdin:  # each line starts a rank, which shares what is imported here
    if os.fork() == 0:
        os.setsid()
        loader = MicrobatchLoader(blend, config, MediaShape(patch_size=7), tokenizer, 256, 1, 0, 1, seed=7)
        print(os.getpid(), flush=True)  # from here on workers are forked
        while True:
            next(loader)
    os.wait()
"""


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, of, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(of) == session and state != "Z":
                found.append(int(entry.name))
    return found


def test_no_worker_outlives_a_rank_killed_at_any_moment_of_its_start(tmp_path):
    blend = corpus.build(tmp_path / "shards", {"text": 80})
    command = [sys.executable, "-c", RANKS, blend, corpus.write_tokenizer(tmp_path / "tokenizer")]
    draw, caught = random.Random(5), 0
    ranks = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(12):
            ranks.stdin.write("\n")
            ranks.stdin.flush()
            rank = int(ranks.stdout.readline())
            time.sleep(draw.uniform(0, 0.6))
            caught += len(members(rank)) > 1
            os.kill(rank, signal.SIGKILL)
            deadline = time.monotonic() + 5
            while (left := members(rank)) and time.monotonic() < deadline:
                time.sleep(0.02)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            assert not left
        assert caught >= 2  # workers were there to be orphaned; how often depends on how busy the machine is
    finally:
        ranks.kill()
        ranks.communicate()
