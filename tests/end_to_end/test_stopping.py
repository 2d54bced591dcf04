"""A signal ends a training with a checkpoint; a second Ctrl-C ends it at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_anyexperts.survival import checkpoints, runlog
from megatron_anyexperts.survival.run_directory import Run
from tests.end_to_end.launch import ENTRY, ROOT, TINY
from tests.multirank import free_port

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
NOTICE = "saving at the next step boundary, then ending"


def processes(folder: Path) -> list[int]:
    """Living processes with this folder in their command line: launcher, ranks and what they forked."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder) in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def start(corpus, tmp_path):
    """Starts an endless training; returns its launcher once a line of the output contains `until`."""

    def go(*launcher: str, until: str, flags: tuple[str, ...] = ()) -> subprocess.Popen:
        paths = ["--data-path", corpus / "shards/blend.yaml", "--tokenizer-model", corpus / "tokenizer"]
        words = [ENTRY, "--config", TINY, "--run-dir", tmp_path / "run", *paths, "--train-iters", "100000", *flags]
        extra = {"PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
        extra |= {} if launcher else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        process = subprocess.Popen(
            [sys.executable, *map(str, [*launcher, *words])], cwd=ROOT, env=os.environ | extra, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            # Under nohup, which the tests may run under, a training rightly ignores it.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )  # fmt: skip
        seen = []
        for line in process.stdout:
            seen.append(line)
            if until in line:
                return process
        raise AssertionError("".join(seen)[-4000:])

    yield go
    for pid in processes(tmp_path):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("launcher", "stop", "name"), [([], signal.SIGHUP, "SIGHUP"), ([*TORCHRUN, "1"], signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_saves_and_ends_with_one_line(start, tmp_path, launcher, stop, name):
    process = start(*launcher, until="step 2/")
    os.killpg(process.pid, stop)  # as a terminal does: it reaches torchrun, which starts its ranks in other groups
    output = process.communicate(timeout=120)[0]
    assert output.count(f"{name}: {NOTICE}") == 1
    assert "KeyboardInterrupt" not in output
    run = Run(tmp_path / "run")
    last = runlog.read_events(run)[-1]
    assert last["event"] == "exit" and last["iteration"] == runlog.read_metrics(run)[-1]["iteration"]
    saved = checkpoints.newest_sealed(run.checkpoints)
    assert saved == last["iteration"]
    assert f"saved iteration {saved} in " in output and f"ended at step {saved} of 100000" in output
    assert launcher or process.returncode == 0


def test_a_second_ctrl_c_kills_every_process_at_once(start, tmp_path):
    # A step of an hour: nothing else can end it.
    flags = ("--global-batch-size", "400000", "--verbose")
    process = start(*TORCHRUN, "2", until="start of training step", flags=flags)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=20)[0]  # torchrun itself would wait for 30 s
    assert output.count(f"Ctrl-C: {NOTICE}") == 1
    deadline = time.monotonic() + 5
    while processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(tmp_path)
    assert not checkpoints.sealed_iterations(Run(tmp_path / "run").checkpoints)
