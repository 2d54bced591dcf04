"""One HTML file about a run: nothing in it is loaded from elsewhere, and nothing in it runs."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import io
import time
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from megatron_anyexperts.analysis import charts
from megatron_anyexperts.analysis.data_facts import data_facts
from megatron_anyexperts.analysis.run_files import files_of
from megatron_anyexperts.analysis.run_record import RunRecord, number
from megatron_anyexperts.files import write_text

NAME = "report.html"
PICTURES = {
    "importance.png": "Importance and slots of the tokens of held-out images and of their captions",
    "frames.png": "Importance of the frames of held-out videos",
    "signatures.png": "Mean cosine similarity of the routing signatures of two tasks",
    "specialisation.png": "Share of a domain's tokens that each expert serves, by layer",
    "modalities.png": "Share of a modality's tokens that each expert serves, by layer",
    "coactivation.png": "Of an expert's tokens (row), the share that another one (column) serves too, by layer",
    "load_over_time.png": "Load of each expert over the mean, by traced step and layer",
    "budgets.png": "Held-out loss under other slot budgets",
}
_PLAIN_EVENTS = ("start", "load", "saved", "finished", "attempt", "answers", "task")


def write_report(record: RunRecord, folder: Path, now: float | None = None) -> Path:
    """Write ``report.html`` into a folder.

    Args:
        record: of the run.
        folder: made where it is missing.
        now: seconds since the epoch; the present by default.

    Returns:
        The file.
    """
    path = folder / NAME
    write_text(path, report(record, time.time() if now is None else now))
    return path


def report(record: RunRecord, now: float) -> str:
    """The text of the file."""
    template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"figure": _figure, "clock": clock, "short": _short}
    return environment.from_string(template).render(
        name=record.run.root.resolve().name,
        folder=str(record.run.root.resolve()),
        row=record.row(now),
        drawn=[chart for chart in _charts(record) if chart[1] is not None],
        targets=record.targets,
        data=data_facts(record),
        pictures=_pictures(record),
        faults=[event for event in record.events if event.get("event") not in _PLAIN_EVENTS],
        starts=[event for event in record.events if event.get("event") == "start"],
        nonfinite=[row for row in record.metrics if number(row, "routing", "nonfinite_tokens")],
        config=record.config,
        versions=record.versions,
        files=files_of(record.run),
        now=now,
    )


def _charts(record: RunRecord) -> list[tuple[str, Figure | None, str]]:
    """Section, figure and what to know about it."""
    if not record.metrics:
        return []
    held_out = "Training: all steps of a log interval. Held out: the same samples each time."
    layered = "Each mixture layer has its own importance: a modality may get many slots in one and few in the next."
    return [
        ("Losses", charts.losses(record), held_out),
        ("Slots", charts.slots(record), "A controller keeps the mean of all tokens at the target, not that of a kind."),
        ("Slots", charts.slot_distribution(record), ""),
        ("Slots", charts.by_layer(record), layered),
        ("Load", charts.expert_load(record), "1 is an even share; 0 is an expert that got nothing."),
        ("Load", charts.rank_load(record), ""),
        ("Speed", charts.speed(record), "Steps only: no start-up, evaluation or save."),
    ]


def _figure(figure: Figure) -> Markup:
    """An inline SVG; its texts stay texts, and matplotlib escapes what they hold."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def _pictures(record: RunRecord) -> list[tuple[str, str]]:
    """Title and data URL of the pictures that other commands have left in the run."""
    found = []
    for name, title in PICTURES.items():
        path = record.run.root / "pictures" / name
        if path.is_file():
            found.append((title, f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"))
    return found


def clock(seconds: Any) -> str:
    """Time of day in UTC; "unknown" for what is no time."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError, OverflowError, OSError):
        return "unknown"


def _short(value: Any, digits: str = ".4g") -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else format(value, digits)
