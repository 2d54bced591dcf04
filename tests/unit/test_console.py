"""The screen of a command: its own lines, warnings and errors of anybody; its log: everything."""

import contextlib
import logging
import os
import pty
import sys
import termios
import time
import warnings

import pytest

from megatron_anyexperts import console
from megatron_anyexperts.console import own_lines_only, say
from megatron_anyexperts.survival.lost_writes import LostWrites
from megatron_anyexperts.training.progress import Progress, span, step_line

HIDDEN = (
    "  num_layers ............ 4",
    "INFO:megatron.core.optimizer:Setting up optimizer",
    "WARNING: one_logger package is required to enable e2e metrics tracking.",
    "WARNING:megatron.core.dist_checkpointing.serialization:Overwriting old incomplete / corrupted checkpoint...",
    " iteration 2/ 6 | loss: 1.0 | number of skipped iterations:   0 | number of nan iterations:   0 |",
)
SHOWN = (
    "WARNING: checkpoint of iteration 3 not saved: no space left",
    "WARNING:megatron.core.rerun_state_machine:Unexpected result nan on rank 3",
    "ERROR:megatron.core.dist_checkpointing.serialization:cannot write",
    " iteration 2/ 6 | loss: 1.0 | number of skipped iterations:   1 | number of nan iterations:   0 |",
    " tokens that are NaN or Inf, without experts: 3 |",
)


def command(verbose=False, log=None, fail=False):
    @own_lines_only
    def main() -> int:
        for line in HIDDEN + SHOWN:
            print(line)
        console.begin(verbose, log, LostWrites("log") if log else None)
        say("an answer")
        print("No CUDA runtime is found, using CUDA_HOME", file=sys.stderr)
        print("error: no such file", file=sys.stderr)
        warnings.warn("Please specify --split when", stacklevel=1)
        warnings.warn("to those who write libraries", FutureWarning, stacklevel=1)
        warnings.warn("the disk is slow", stacklevel=1)
        if fail:
            raise KeyError("val")
        return 0

    return main


def test_the_screen_has_what_matters_and_the_log_has_all(capsys, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert command(log=tmp_path / "logs/output")() == 0
    output, errors = capsys.readouterr()
    assert output.splitlines() == [*SHOWN, "an answer"]
    assert errors.splitlines()[0] == "error: no such file" and "the disk is slow" in errors
    assert not any(hidden in errors for hidden in ("CUDA", "--split", "libraries"))
    log = (tmp_path / "logs/output").read_text()
    for text in (*HIDDEN, *SHOWN, *errors.splitlines(), "an answer", "CUDA_HOME", "--split", "who write libraries"):
        assert text in log


def test_verbose_shows_also_what_was_said_before_it_was_read(capsys, tmp_path):
    command(verbose=True, log=tmp_path / "output")()
    output = capsys.readouterr().out
    assert all(output.count(line) == 1 for line in (*HIDDEN, "an answer"))


def test_a_crash_is_in_the_log(tmp_path):
    streams = sys.stdout, sys.stderr
    with pytest.raises(KeyError):
        command(log=tmp_path / "output", fail=True)()
    assert (sys.stdout, sys.stderr) == streams
    assert "KeyError: 'val'" in (tmp_path / "output").read_text()


def test_a_command_that_has_no_log_writes_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command()()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_the_log_and_nothing_else(capsys, tmp_path):
    (tmp_path / "output").symlink_to("/dev/full")
    assert command(log=tmp_path / "output")() == 0
    output, errors = capsys.readouterr()
    assert "an answer" in output and errors.count("WARNING: log: 1 write(s) lost, training goes on") == 1


def test_handlers_made_before_go_through_the_console(tmp_path):
    """Megatron and torch make theirs when they are imported."""
    root, read, write = logging.getLogger(), *os.pipe()
    before = os.dup(2)
    os.dup2(write, 2)
    stream = os.fdopen(2, "w", closefd=False)
    handler = logging.StreamHandler(stream)
    root.addHandler(handler)
    try:

        @own_lines_only
        def main() -> int:
            console.begin(False, tmp_path / "output", LostWrites("log"))
            root.warning("Setting RerunStateMachine mode")
            return 0

        main()
    finally:
        root.removeHandler(handler)
        os.dup2(before, 2)
    os.close(write)
    assert os.read(read, 1000) == b""
    assert "Setting RerunStateMachine mode" in (tmp_path / "output").read_text()


def test_a_bar_lives_below_the_lines_of_a_terminal(monkeypatch):
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 80))
    with open(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        progress = Progress(2, 6)
        assert progress.left(3) == ""
        progress.step(3)
        time.sleep(0.11)
        progress.step(4)
        assert progress.left(4) == "0 s"
        progress.say("step 4/6")
        progress.close()
    shown = b""
    with contextlib.suppress(OSError):  # at the end
        while part := os.read(main, 10_000):
            shown += part
    os.close(main)
    shown = shown.decode()
    assert "4/6" in shown and "%" in shown and "step 4/6\r\n" in shown


def test_a_line_of_steps():
    figures = {"loss": 5.1234, "loss_text": 5.0, "loss_image": 5.5, "tokens_per_s": 12345.6, "samples_lost": 2}
    routing = {"all": {"slots": 2.004, "real": 1.8}}
    assert step_line(10, 160, figures, routing, 5e-3, "3 min 2 s") == (
        "step 10/160 | loss 5.123 (text 5.000, image 5.500) | slots 2.00, real 1.80 per token | 12,346 tokens/s | "
        "lr 5.00e-03 | 2 samples lost | ETA 3 min 2 s"
    )
    assert step_line(1, 2, {"loss": float("nan")}, {}, None, "") == "step 1/2 | loss nan"
    assert [span(seconds) for seconds in (59, 61, 7300, 190_000)] == ["59 s", "1 min 1 s", "2 h 1 min", "2 d 4 h"]
