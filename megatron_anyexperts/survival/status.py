"""One screen about a run, from its files alone."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from typing import Any

from . import runlog
from .checkpoints import newest_sealed, set_aside
from .heartbeat import Beat, read_beats
from .manifest import MANIFEST, iteration_directory
from .run_directory import Run

_SILENT_S = 600
_NOTED = (
    *("exit", "hang", "crash", "fallback", "save_failed", "not_saved"),
    *("room", "lock", "config", "preflight", "stop"),
)


def screen(run: Run, now: float | None = None) -> str:
    """The status of a run as text, one fact a line.

    Args:
        run: an existing run directory.
        now: seconds since the epoch; the present by default.

    Raises:
        FileNotFoundError: there is no such run.
    """
    if not run.root.is_dir():
        raise FileNotFoundError(f"no run directory {run.root}")
    now = time.time() if now is None else now
    events, metrics, beats = runlog.read_events(run), runlog.read_metrics(run), read_beats(run)
    last = metrics[-1] if metrics else {}
    rows = [("run", str(run.root)), ("state", state(events, beats, now)), ("iteration", _iteration(last))]
    rows += [
        ("loss", _losses(last)),
        ("tokens/s", _number(last.get("tokens_per_s"), ",.0f")),
        ("expected end", _expected_end(metrics, now)),
        ("checkpoint", _checkpoint(run, now)),
        ("expert load", _load(last)),
        ("data wait", _share(last.get("data_wait_share"))),
        ("last metrics", _ago(now - last["time"]) if "time" in last else "none yet"),
    ]
    lines = [f"{name:<13} {value}" for name, value in rows]
    return "\n".join(map(printable, lines + _restarts(events, now))) + "\n"


def printable(line: str) -> str:
    """The line with control and formatting characters escaped: whoever writes into a run could command a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def seconds_per_iteration(metrics: list[dict[str, Any]], window: int = 50) -> float | None:
    """Median over the last log intervals; pauses between restarts therefore hardly count. None when unknown."""
    recent = metrics[-window - 1 :]
    paces = sorted(
        (after["time"] - before["time"]) / (after["iteration"] - before["iteration"])
        for before, after in zip(recent, recent[1:], strict=False)
        if after["time"] > before["time"]
    )
    return paces[len(paces) // 2] if paces else None


def state(events: list[dict[str, Any]], beats: dict[int, Beat], now: float) -> str:
    """What the run is doing, or how it ended, in a few words."""
    marks = [event for event in events if event.get("event") in ("attempt", "start", "exit", "finished", "stop")]
    if not marks:
        return _tasks(events) or "not started"
    last = marks[-1]
    if any(event["event"] == "finished" for event in marks[-2:]):
        return "finished"
    if last["event"] == "stop":
        return f"stopped: {last.get('summary', last.get('reason'))}"
    if last["event"] == "exit":
        if last.get("reason") is None:  # written by a training that was started by hand
            return f"left at iteration {last.get('iteration')}, exit code {last.get('code')}"
        return f"waiting to restart: {last['reason']}"
    newest = max((beat.time for beat in beats.values()), default=last["time"])
    if now - newest > _SILENT_S:
        return f"silent: no sign of life for {_span(now - newest)}"
    if not beats:
        return f"starting: no rank has given a sign of life yet, {_span(now - newest)} after the start"
    phases = sorted({beat.phase for beat in beats.values()})
    names = {"start": "starting", "train": "training", "save": "saving", "end": "ending"}
    return f"{', '.join(names.get(phase, phase) for phase in phases)} on {_nodes(beats)} ({len(beats)} ranks)"


def _tasks(events: list[dict[str, Any]]) -> str:
    """How far the newest job array is that builds shards here; "" when none was started."""
    states = [event for event in events if event.get("event") == "task"]
    latest = {event.get("index"): event.get("state") for event in states if event.get("job") == states[-1].get("job")}
    if not latest:
        return ""
    counted = ", ".join(f"{count} {state}" for state, count in sorted(Counter(latest.values()).items()))
    return f"building shards with {states[-1].get('count')} tasks: {counted}"


def _nodes(beats: dict[int, Beat]) -> str:
    nodes = sorted({beat.node for beat in beats.values()})
    return ", ".join(nodes) if len(nodes) <= 4 else f"{len(nodes)} nodes"


def _iteration(last: dict[str, Any]) -> str:
    if "iteration" not in last:
        return "none yet"
    total = last.get("train_iters")
    share = f" of {total:,} ({last['iteration'] / total:.1%})" if total else ""
    return f"{last['iteration']:,}{share}"


def _losses(last: dict[str, Any]) -> str:
    parts = [
        f"{name.removeprefix('loss_')} {value:.4f}"
        for name, value in sorted(last.items())
        if name.startswith("loss_") and isinstance(value, float)
    ]
    return _number(last.get("loss"), ".4f") + (f"  ({', '.join(parts)})" if parts else "")


def _expected_end(metrics: list[dict[str, Any]], now: float) -> str:
    pace = seconds_per_iteration(metrics)
    total = metrics[-1].get("train_iters") if metrics else None
    if pace is None or not total:
        return "unknown"
    left = (total - metrics[-1]["iteration"]) * pace
    if left <= 0:
        return "reached"
    return f"{_clock(now + left)} UTC, in {_span(left)} at {pace:.3g} s an iteration, without waiting in the queue"


def _checkpoint(run: Run, now: float) -> str:
    iteration = newest_sealed(run.checkpoints)
    aside = "".join(f"; set aside: {name}" for name in set_aside(run.checkpoints))
    if iteration is None:
        return f"none yet{aside}"
    written = (iteration_directory(run.checkpoints, iteration) / MANIFEST).stat().st_mtime
    return f"iteration {iteration:,}, {_ago(now - written)}{aside}"


def _load(last: dict[str, Any]) -> str:
    value = last.get("load_max_over_mean")
    return "unknown" if value is None else f"{value:.3f} max over mean"


def restarts(events: list[dict[str, Any]]) -> int:
    """How often the run was started again."""
    # Training run by hand, without the launcher, knows no attempts.
    kind = "attempt" if any(event.get("event") == "attempt" for event in events) else "start"
    return max(0, sum(event.get("event") == kind for event in events) - 1)


def _restarts(events: list[dict[str, Any]], now: float, shown: int = 5) -> list[str]:
    notes = [
        event
        for event in events
        if event.get("event") in _NOTED
        and (event.get("reason") or event.get("summary"))
    ]
    lines = [f"{'restarts':<13} {restarts(events)}"]
    for event in notes[-shown:]:
        where = f" at iteration {event['iteration']}" if event.get("iteration") is not None else ""
        why = event.get("reason") or event["summary"]
        lines.append(f"  {_clock(event['time'])}  {event['event']}{where}: {why}")
    return lines


def _number(value: Any, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _share(value: Any) -> str:
    return "unknown" if value is None else f"{value:.1%} of step time"


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def _span(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _ago(seconds: float) -> str:
    return f"{_span(max(0.0, seconds))} ago"
