"""One training at a time in a run directory, on any file system and across nodes.

The lock is a file that appears with its content or not at all (a hard link, which NFS makes atomically). It names the
holder's host and process; the holder's sign of life is the file's modification time, which on a shared file system one
clock writes for all nodes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from .run_directory import Run

BEAT_S = 20.0
STALE_S = 180.0
"""A holder on another host that gave no sign of life for this long is taken for dead."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class RunInUse(RuntimeError):
    """Another training holds the run directory; the message names it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a run."""

    host: str
    boot: str
    """Of the host's kernel and of the process-id namespace: a process id means something only inside the same."""
    pid: int
    started: str
    """Of the process, in the kernel's ticks: process ids are used again."""
    job: str
    """Slurm's job id, "" outside: a requeued job keeps it, and Slurm ends the old processes before it starts anew."""
    token: str

    @classmethod
    def myself(cls) -> Holder:
        return cls(
            socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()), os.environ.get("SLURM_JOB_ID", ""),
            uuid.uuid4().hex,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


def why_stale(holder: Holder, me: Holder, silent_s: float, started_now: str) -> str:
    """Why a lock may be taken over, or "" when its holder has to be taken for alive.

    Args:
        holder: who holds it.
        me: who wants it.
        silent_s: seconds since the holder's last sign of life.
        started_now: `Holder.started` of the process that has the holder's id on this host, "" for none.
    """
    if holder.boot == me.boot and holder.started:
        return "" if started_now == holder.started else "its process has ended"
    if holder.job and holder.job == me.job:
        return "it is an earlier start of the same Slurm job"
    return f"no sign of life for {silent_s:.0f} s" if silent_s > STALE_S else ""


class RunLock:
    """Holds a run directory until `release`, by a thread that beats every `BEAT_S` seconds."""

    def __init__(self, run: Run):
        self.run = run
        self._path = run.lock
        self.me = Holder.myself()
        self._over = threading.Event()

    def acquire(self) -> str:
        """Take the run, or raise.

        Returns:
            what there is to say: of whom it was taken over, or that no lock could be written; usually "".

        Raises:
            RunInUse: another training holds it.
        """
        try:
            said = self._take()
        except OSError as error:
            return f"no lock in {self._path.parent}, so a second training there would not be noticed: {error}"
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        return said

    def _take(self) -> str:
        said = ""
        while not self._create():
            held = _read(self._path)
            if held is None:  # it ended just now
                continue
            holder, silent_s = held
            reason = "its content is unreadable"
            if holder is not None:
                reason = why_stale(holder, self.me, silent_s, _started(holder.pid))
            if not reason:
                raise RunInUse(
                    f"{self._path.parent} is in use by {holder}, last sign of life {max(silent_s, 0):.0f} s ago; stop "
                    f"it first or use another --run-dir (a holder on another host counts as dead after {STALE_S:.0f} s "
                    "of silence)"
                )
            if self._take_away(holder):
                said = f"lock of {holder or 'an unknown holder'} taken over: {reason}"
        return said

    def held(self) -> bool:
        """Whether the run is still ours: false once another training took this one for dead."""
        held = _read(self._path)
        return held is None or held[0] is None or held[0].token == self.me.token

    def release(self) -> None:
        """Give the run back; harmless when it is not held."""
        self._over.set()
        held = _read(self._path)
        if held and held[0] and held[0].token == self.me.token:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        text = json.dumps(asdict(self.me)).encode()
        draft = self._path.with_name(f"lock.{self.me.token}")
        try:
            draft.write_bytes(text)
            try:
                os.link(draft, self._path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in _NO_LINKS:
                    return _create_exclusively(self._path, text)
                if draft.stat().st_nlink != 2:  # otherwise NFS lost the answer, not the link
                    raise
            return True
        finally:
            draft.unlink(missing_ok=True)

    def _take_away(self, stale: Holder | None) -> bool:
        """Remove a stale lock; of several that try, one succeeds, and none removes the lock of the next holder."""
        token = stale.token if stale else "unreadable"
        claim = self._path.with_name(f"lock.{token}.claim")
        if not _create_exclusively(claim, b""):
            with contextlib.suppress(FileNotFoundError):
                if _now(claim.parent) - claim.stat().st_mtime > BEAT_S:  # who made it died on the way
                    claim.unlink()
            time.sleep(0.05)
            return False
        try:
            held = _read(self._path)
            if held is None or (held[0].token if held[0] else "unreadable") != token:
                return False
            self._path.unlink()
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a beat that is late is no reason to stop
                if not self.held():
                    print(f"WARNING: {self._path} was taken over by another training", file=sys.stderr, flush=True)
                    return
                os.utime(self._path)


def _create_exclusively(path: Path, text: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(text)
    return True


def _read(path: Path) -> tuple[Holder | None, float] | None:
    """The holder (None when unreadable) and the seconds since its last beat; None when there is no lock."""
    try:
        beat = path.stat().st_mtime
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    silent_s = _now(path.parent) - beat
    try:
        return Holder(**json.loads(text)), silent_s
    except (ValueError, TypeError):
        # Half written, where links do not exist: its writer gets the time to finish.
        return (None if silent_s > BEAT_S else Holder("an unknown host", "", 0, "", "", "")), silent_s


def _now(folder: Path) -> float:
    """The present by the clock that stamps files in this folder, as nodes' own clocks differ."""
    probe = folder / f"lock.{uuid.uuid4().hex}.now"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process of this host started, "" when there is none (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
