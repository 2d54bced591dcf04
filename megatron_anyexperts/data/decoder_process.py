"""Runs decoders in a process of its own, so that one that dies or hangs costs the medium it was given and nothing else.

A fresh process, not a fork: it carries none of the threads, locks and connections of the process that uses it.
"""

import contextlib
import fcntl
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np

from megatron_anyexperts.data.media_forms import MediaError

DECODE_SECONDS = 120.0
"""Time after which decoding one medium counts as endless."""

_MEMORY_BYTES = 2**34  # address space; a medium that needs more is refused instead of ending the machine
_PIPE_BYTES = 2**20  # a message that does not fit makes the two processes take turns
_SHARED_BYTES = 2**25  # for arrays, which would be copied four times through a pipe; no memory until it is used

_START = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {__name__} as d; d.serve(*sys.argv[2:])"


@dataclass(frozen=True)
class _SharedArray:
    """An array that lies at the start of the shared memory."""

    shape: tuple[int, ...]
    dtype: np.dtype


class DecoderDied(MediaError):
    """A medium whose decoding killed the decoder process, or did not end."""


class DecoderProcess:
    """Calls functions in a child process, which starts with the first call and again after it died.

    It may be handed to forked processes: each of them starts a child of its own.

    Args:
        seconds: for one call.
    """

    def __init__(self, seconds: float = DECODE_SECONDS):
        self._seconds = seconds
        self._owner = 0
        self._process: subprocess.Popen | None = None
        self._calls: Connection | None = None
        self._answers: Connection | None = None
        self._shared: mmap.mmap | None = None

    def run[T](self, function: Callable[..., T], *arguments) -> T:
        """Call a function of a module; arguments, result and exceptions are copied.

        A call whose child dies is made once more: only who kills two is taken for the cause.

        Raises:
            DecoderDied: a signal ended the child, or it took too long, twice.
            RuntimeError: the child cannot be started.
            Exception: whatever the function raises; its attribute `place` says where.
        """
        try:
            return self._run(function, arguments)
        except DecoderDied:
            return self._run(function, arguments)

    def _run(self, function: Callable, arguments: tuple):
        if self._owner != os.getpid():
            self._start()
        try:
            self._calls.send((function, arguments))
            if not self._answers.poll(self._seconds):
                self.close()
                raise DecoderDied("decoding does not end", f"stopped after {self._seconds:g} s")
            done, result = self._answers.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            self.close()
            if code >= 0:
                raise RuntimeError(f"the decoder process ended with code {code}; its message is above") from None
            raise DecoderDied("decoding kills the process", _signal_name(-code)) from None
        if not done:
            raise result
        if isinstance(result, _SharedArray):
            return np.ndarray(result.shape, result.dtype, self._shared).copy()
        return result

    def _start(self) -> None:
        (read_calls, write_calls), (read_answers, write_answers) = _wide_pipe(), _wide_pipe()
        shared = os.memfd_create("decoder")
        os.ftruncate(shared, _SHARED_BYTES)
        theirs = read_calls, write_answers, shared
        command = [sys.executable, "-c", _START, json.dumps(sys.path), *map(str, theirs), str(os.getpid())]
        try:
            self._process = subprocess.Popen(command, pass_fds=theirs, stdin=subprocess.DEVNULL)
            self._shared = mmap.mmap(shared, _SHARED_BYTES)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._calls = Connection(write_calls, readable=False)
        self._answers = Connection(read_answers, writable=False)
        self._owner = os.getpid()
        # Also runs when a worker process ends in order, which calls no destructors.
        Finalize(self, _end, (self._process,), exitpriority=10)

    def close(self) -> None:
        """End the child; the next call starts another."""
        if self._owner == os.getpid():
            self._owner = 0
            _end(self._process)
            self._calls.close()
            self._answers.close()
            self._shared.close()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def _put(result, shared: mmap.mmap):
    if not isinstance(result, np.ndarray) or not 0 < result.nbytes <= _SHARED_BYTES:
        return result
    np.ndarray(result.shape, result.dtype, shared)[...] = result
    return _SharedArray(result.shape, result.dtype)


def _wide_pipe() -> tuple[int, int]:
    read, write = os.pipe()
    with contextlib.suppress(OSError):  # the system may allow less
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return read, write


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def serve(calls: str, answers: str, shared: str, parent: str) -> None:
    """Answer calls until the other end is closed; the main function of the child."""
    # Whoever signals the process group means the parent, which ends this one in time.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # a file that fills the memory ends this process first
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its death is no news
    threading.Thread(target=_follow, args=(int(parent),), daemon=True).start()
    shared = mmap.mmap(int(shared), _SHARED_BYTES)
    calls, answers = Connection(int(calls), writable=False), Connection(int(answers), readable=False)
    while True:
        try:
            function, arguments = calls.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = True, _put(function(*arguments), shared)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            error.place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            answer = False, error
        answers.send(answer)


def _follow(parent: int) -> None:
    # A decoder that hangs would not notice that the other end is closed.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
