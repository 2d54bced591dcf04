"""Charts of one run or several, as matplotlib figures; whoever asks writes them as PNG or SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_anyexperts.analysis.run_record import RunRecord, number, series
from megatron_anyexperts.media import MODALITIES

COLOURS = dict(zip(MODALITIES, ("#4477AA", "#EE6677", "#228833", "#B8860B"), strict=True))
ALL = "#333333"
# All tokens or samples together are a wide band, because most of them are often text, whose line lies on it.
_ALL_STYLE = {"color": "#333333", "alpha": 0.35, "lw": 4.5, "solid_capstyle": "round"}
# Names of runs and flags are shown as they are, dollar signs too.
matplotlib.rcParams.update({"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
_MOST_POINTS = 500


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def thin(xs: list[int], ys: list[float], most: int = _MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means of neighbours, at the last of their places."""
    chunks = min(most, len(xs))
    if not chunks:
        return np.array([]), np.array([])
    parts = zip(np.array_split(xs, chunks), np.array_split(ys, chunks), strict=True)
    places, means = zip(*((x[-1], y.mean()) for x, y in parts), strict=True)
    return np.array(places), np.array(means)


def losses(record: RunRecord) -> Figure:
    """Training loss of each kind of sample as a line, its held-out loss as points."""
    figure, axes = _panels(1, (7.6, 3.8))
    for key, name, colour in _kinds("loss"):
        axes[0].plot(*thin(*series(record.metrics, key)), **_style(name, colour))
        axes[0].plot(*series(record.held_out, key), "o--", color=colour, lw=0.8, ms=5, mec="white")
    present = [(key, name, colour) for key, name, colour in _kinds("loss") if series(record.metrics, key)[0]]
    handles = [Line2D([], [], **_style(name, colour), label=name) for _, name, colour in present]
    handles.append(Line2D([], [], color="#777777", label="training"))
    if record.held_out:
        handles.append(Line2D([], [], color="#777777", marker="o", ls="--", lw=0.8, mec="white", label="held out"))
    _beside(axes[0], handles)
    _label(axes[0], "Loss by kind of sample", "nats per target token")
    return figure


def slots(record: RunRecord) -> Figure:
    """Slots per token over training, all and real ones, with the means that the run was told to keep."""
    figure, axes = _panels(2, (10.4, 3.6), share=True)
    for panel, (figure_name, title) in zip(axes, (("slots", "Slots"), ("real", "Real slots")), strict=True):
        for key, colour in (("all", ALL), *COLOURS.items()):
            xs, ys = series(record.metrics, "routing", key, figure_name)
            if xs:
                panel.plot(*thin(xs, ys), **_style(key, colour), label=f"{key} tokens")
        _target(panel, record.targets.get(figure_name))
        _label(panel, f"{title} per token", "mean over layers")
        panel.set_ylim(bottom=0)
    _beside(axes[-1])
    return figure


def slot_distribution(record: RunRecord) -> Figure | None:
    """How many slots the tokens of each modality got in the newest interval; None if it is not known."""
    routing = record.routing
    counts = {name: np.array(routing[name]["slots_histogram"], float) for name in COLOURS if name in routing}
    counts = {name: values for name, values in counts.items() if values.sum()}
    if not counts:
        return None
    used = np.flatnonzero(sum(counts.values()))
    choices = np.arange(used.min(), used.max() + 1)
    figure, axes = _panels(1, (7.6, 3.2))
    width = 0.8 / len(counts)
    for place, (name, values) in enumerate(counts.items()):
        shift = (place - (len(counts) - 1) / 2) * width
        axes[0].bar(choices + shift, values[choices] / values.sum(), width, color=COLOURS[name], label=f"{name} tokens")
    axes[0].set_xticks(choices)
    _label(axes[0], f"Slots of a token at iteration {record.last['iteration']}, all layers", "share of tokens", "slots")
    _beside(axes[0])
    return figure


def by_layer(record: RunRecord) -> Figure | None:
    """Slots and real slots by layer and modality in the newest interval; None if they are not known."""
    layers = record.routing.get("layers") or {}
    if not layers:
        return None
    figure, axes = _panels(2, (10.4, 3.4), share=True)
    places = np.arange(len(layers))
    for panel, (key, title) in zip(axes, (("slots", "Slots"), ("real", "Real slots")), strict=True):
        for name, colour in (("all", ALL), *COLOURS.items()):
            values = [number(layer, name, key) for layer in layers.values()]
            if any(value is not None for value in values):
                ys = [np.nan if value is None else value for value in values]
                dots = {} if name == "all" else {"marker": "o", "ls": ":", "ms": 5}
                panel.plot(places, ys, **_style(name, colour) | dots, label=f"{name} tokens")
        _target(panel, record.targets.get(key))
        when = f"at iteration {record.last['iteration']}"
        _label(panel, f"{title} per token {when}", "mean of the layer", "mixture layer")
        step = -(-len(places) // 16)
        panel.set_xticks(places[::step], list(layers)[::step])
        panel.set_ylim(bottom=0)
    _beside(axes[-1])
    return figure


def expert_load(record: RunRecord) -> Figure | None:
    """Load of every expert in every layer, over the layer's mean; None if it is not known."""
    iteration, layers = record.expert_load
    if not layers:
        return None
    width = max(map(len, layers.values()))
    loads = np.full((len(layers), width), np.nan)
    for row, experts in zip(loads, layers.values(), strict=True):
        row[: len(experts)] = experts
    figure, axes = _panels(1, (9, 1.3 + 0.32 * min(len(layers), 24)))
    highest = max(2.0, float(np.nanmax(loads)))
    norm = TwoSlopeNorm(1.0, 0.0, highest)
    shown = axes[0].imshow(loads, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes[0].grid(False)
    step = -(-len(layers) // 24)
    axes[0].set_yticks(range(0, len(layers), step), list(layers)[::step])
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(shown, ax=axes[0], label="load over mean", ticks=[0, 0.5, 1, *_above_one(highest)])
    bar.ax.tick_params(labelsize=8)
    _label(axes[0], f"Load of each expert, interval up to iteration {iteration}", "mixture layer", "expert")
    return figure


def rank_load(record: RunRecord) -> Figure:
    """The busiest expert rank, and the busiest expert, over the mean."""
    figure, axes = _panels(1, (7.6, 2.8))
    for key, name, colour in (
        ("expert_max_over_mean", "busiest expert (mean over layers)", "#AA3377"),
        ("rank_max_over_mean_peak", "busiest rank, worst step", "#EE7733"),
        ("rank_max_over_mean", "busiest rank, mean", "#0077BB"),
    ):
        axes[0].plot(*thin(*series(record.metrics, "routing", "load", key)), color=colour, label=name)
    axes[0].axhline(1, color="#999999", ls="--", lw=1, label="even")
    axes[0].set_ylim(bottom=0)
    _label(axes[0], "Load over mean", "max over mean")
    _beside(axes[0])
    return figure


def speed(record: RunRecord) -> Figure:
    """Tokens a second, and what part of the time went into waiting for data."""
    figure, axes = _panels(2, (10.4, 2.8))
    axes[0].plot(*thin(*series(record.metrics, "tokens_per_s")), color="#0077BB")
    _label(axes[0], "Tokens a second, all ranks", "tokens/s")
    xs, ys = series(record.metrics, "data_wait_share")
    axes[1].plot(*thin(xs, [100 * y for y in ys]), color="#EE7733")
    _label(axes[1], "Waiting for data", "% of step time")
    for panel in axes:
        panel.set_ylim(bottom=0)
    return figure


def comparison(records: Mapping[str, RunRecord]) -> Figure:
    """Losses, slots and speed of several runs, a colour each.

    Args:
        records: by the name to show.
    """
    colours = matplotlib.colormaps["tab10"]
    panels = (
        ("Training loss", "nats per target token", ("loss",)),
        ("Held-out loss", "nats per target token", ("held out",)),
        ("Slots per token", "mean; dotted: target", ("routing", "all", "slots")),
        ("Real slots per token", "mean; dotted: target", ("routing", "all", "real")),
        ("Tokens a second, all ranks", "tokens/s", ("tokens_per_s",)),
        ("Busiest expert rank", "load over mean", ("load_max_over_mean",)),
    )
    figure = Figure(figsize=(11.5, 9.5), layout="constrained")
    axes = figure.subplots(3, 2).flat
    for panel, (title, unit, path) in zip(axes, panels, strict=True):
        for place, (name, record) in enumerate(records.items()):
            held_out = path == ("held out",)
            xs, ys = series(record.held_out, "loss") if held_out else thin(*series(record.metrics, *path))
            panel.plot(xs, ys, "o-" if held_out else "-", color=colours(place % 10), ms=4, label=name)
            if (target := record.targets.get(path[-1])) is not None and path[0] == "routing":
                panel.axhline(target, color=colours(place % 10), ls=":", lw=1)
        _label(panel, title, unit)
        if path[0] not in ("loss", "held out"):
            panel.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    return figure


def _panels(count: int, size: tuple[float, float], share: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=share)[0])


def _kinds(prefix: str) -> list[tuple[str, str, str]]:
    """Key in ``metrics.jsonl``, name and colour of all samples together and of each kind."""
    return [(prefix, "all", ALL), *((f"{prefix}_{name}", name, colour) for name, colour in COLOURS.items())]


def _style(name: str, colour: str) -> dict[str, Any]:
    return _ALL_STYLE if name == "all" else {"color": colour, "lw": 1.3}


def _target(axes: Axes, value: float | None) -> None:
    if value is not None:
        axes.axhline(value, color=ALL, ls="--", lw=1.2, label="target")
        axes.annotate(
            f"target {value:g}", (0, value), xycoords=("axes fraction", "data"), xytext=(4, 4), fontsize=8, color=ALL,
            textcoords="offset points", bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5},
        )  # fmt: skip


def _label(axes: Axes, title: str, unit: str, along: str = "iteration") -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel(unit)
    axes.set_xlabel(along)


def _beside(axes: Axes, handles: list[Any] | None = None) -> None:
    """A legend that covers nothing."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "fontsize": 8, "frameon": False}
    axes.legend(**({"handles": handles} if handles else {}), **place)


def _above_one(highest: float) -> list[float]:
    return [float(f"{1 + share * (highest - 1):.2g}") for share in (0.5, 1)]


