"""Run tasks in any number of processes, on any number of machines, without a coordinator.

A task knows whether its result is on disk. Every participant does its own share of the tasks and then helps with
whatever is still missing, so nobody waits for long for a participant that died, and a single one can do everything.
A claim keeps two from doing the same task at the same time; should it happen after all, it does no harm, since
results are deterministic and appear atomically.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

PATIENCE_SECONDS = 120.0
"""Age from which a claim of another participant is taken for that of a dead one."""

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Handled:
    """What a task did; nothing, when another participant or an earlier run did it."""

    items: int = 0
    rejected: list[dict] = field(default_factory=list)
    """Lines of the list of rejected samples."""


class Task(Protocol):
    """A piece of work whose result is a file."""

    @property
    def claim(self) -> Path:
        """A file whose age says when somebody who does this was last seen."""

    def done(self) -> bool:
        """Whether the result is on disk."""

    def run(self) -> Handled:
        """Do it."""

    def after_crash(self, signal_number: int) -> None:
        """Note that running it killed its process, so that the next attempt avoids the cause.

        Raises:
            RuntimeError: there is nothing to avoid.
        """


@dataclass(frozen=True)
class Share:
    """Participant `part` of `parts`."""

    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part={self.part} is outside 0..{self.parts - 1}; --part counts from 0")


def in_turn[T](tasks: Sequence[T], share: Share) -> Iterator[T]:
    """Own tasks first, then those of the others, latest first and starting at different places."""
    yield from tasks[share.part :: share.parts]
    for distance in range(1, share.parts):
        yield from reversed(tasks[(share.part + distance) % share.parts :: share.parts])


def to_do(tasks: Sequence[Task], share: Share) -> Iterator[Task | None]:
    """Every task once, own ones first; None while all that is left is being done by others."""
    own = len(tasks[share.part :: share.parts])
    order = list(in_turn(tasks, share))
    yield from order[:own]
    left = order[own:]
    while left:
        claimed = []
        for task in left:
            if task.done() or not _is_claimed(task):
                yield task
            else:
                claimed.append(task)
        if len(claimed) == len(left):
            yield None
        left = claimed


def _is_claimed(task: Task) -> bool:
    try:
        return time.time() - task.claim.stat().st_mtime < PATIENCE_SECONDS
    except FileNotFoundError:
        return False


class _Claims:
    """The claims of tasks under way, which a thread keeps young until they are done.

    Args:
        share: a single participant claims nothing.
    """

    def __init__(self, share: Share) -> None:
        self._shared, self._held, self._ended = share.parts > 1, set(), threading.Event()

    def __enter__(self) -> Self:
        if self._shared:
            threading.Thread(target=self._keep_young, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def take(self, task: Task) -> None:
        """Say that a task is being done here."""
        if self._shared:
            task.claim.parent.mkdir(parents=True, exist_ok=True)
            task.claim.touch()
            self._held.add(task.claim)

    def release(self, task: Task) -> None:
        """Say no longer so."""
        self._held.discard(task.claim)

    def _keep_young(self) -> None:
        while not self._ended.wait(PATIENCE_SECONDS / 4):
            for path in self._held.copy():
                with contextlib.suppress(OSError):
                    os.utime(path)


def run_tasks(tasks: Sequence[Task], share: Share, workers: int, on_done: Callable[[Handled], None]) -> None:
    """Make sure that every task is done.

    Args:
        tasks: the same list for every participant.
        share: which tasks to begin with.
        workers: processes to use; 0 runs in this process.
        on_done: called once per task.
    """
    queue = to_do(tasks, share)
    with _Claims(share) as claims:
        if workers == 0:
            _run_here(queue, claims, on_done)
            return
        while unfinished := _run_in_pool(queue, claims, min(workers, len(tasks)), on_done):
            for task in unfinished:
                on_done(_run_alone(task))
                claims.release(task)


def _run_here(queue: Iterator[Task | None], claims: _Claims, on_done: Callable[[Handled], None]) -> None:
    for task in queue:
        if task is None:
            time.sleep(POLL_SECONDS)
        elif task.done():
            on_done(Handled())
        else:
            claims.take(task)
            on_done(task.run())
            claims.release(task)


def _run_in_pool(
    queue: Iterator[Task | None], claims: _Claims, workers: int, on_done: Callable[[Handled], None]
) -> list[Task]:
    """Run until the queue is empty, or until a worker dies: then return the tasks that were under way."""
    running: dict[Future, Task] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, workers), mp_context=context, initializer=_start_worker) as pool:
        try:
            empty = False
            while not empty or running:
                # A short queue keeps the question whether a task is done fresh.
                while not empty and len(running) <= workers:
                    try:
                        task = next(queue)
                    except StopIteration:
                        empty = True
                        break
                    if task is None:
                        time.sleep(POLL_SECONDS)
                        break
                    if task.done():
                        on_done(Handled())
                        continue
                    claims.take(task)
                    running[pool.submit(task.run)] = task
                for future in wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    handled = future.result()
                    claims.release(running.pop(future))
                    on_done(handled)
            return []
        except BrokenProcessPool:
            return list(running.values())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    # An interrupt from the keyboard reaches the parent, which ends the pool in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        # Without this, workers of a killed parent would wait for work for ever.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _run_alone(task: Task) -> Handled:
    """Run a task in a process of its own, again after each crash, avoiding what crashed."""
    context = multiprocessing.get_context("spawn")
    while not task.done():
        process = context.Process(target=_run_and_exit, args=(task,))
        process.start()
        process.join()
        if process.exitcode and process.exitcode < 0:
            task.after_crash(-process.exitcode)
        elif process.exitcode:
            raise RuntimeError(f"{task} failed in a process of its own; the reason is printed above")
    return Handled()


def _run_and_exit(task: Task) -> None:
    _start_worker()
    task.run()
