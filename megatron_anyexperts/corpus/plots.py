"""Plots of a finished corpus: tokens by kind of sample, and how its samples are spread over sizes and lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_anyexperts.corpus.stats import Measured
from megatron_anyexperts.media import MODALITIES

_COLOURS = dict(zip(MODALITIES, ("#4477AA", "#EE6677", "#228833", "#B8860B"), strict=True))
_WIDE = 30
"""Measures whose largest value is this many times the smallest get a logarithmic axis."""


def plot(manifest: dict, measured: Measured, folder: Path) -> list[Path]:
    """Write plots: tokens by modality, and a histogram of every measure of every kind.

    Returns:
        The PNG files.
    """
    figures = {"tokens": token_bars(manifest)}
    figures |= {kind: figure for kind, measures in measured.items() if (figure := histograms(kind, measures))}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    return [folder / f"{name}.png" for name in figures]


def token_bars(manifest: dict) -> Figure:
    """A bar for the tokens of each modality in each kind of sample, on one logarithmic axis, with its number."""
    rows = []
    for kind, splits in manifest["kinds"].items():
        counts = {name: sum(entry["tokens"][name] for entry in splits.values()) for name in MODALITIES}
        rows += [(f"{kind}: {name}", count, _COLOURS[name]) for name, count in counts.items() if count]
    figure = Figure(figsize=(8, 1.3 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names, counts, colours = zip(*rows, strict=True)
    bars = axes.barh(range(len(rows)), counts, color=colours)
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=4, fontsize=9)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(1, 10 * max(counts)), xlabel="tokens (logarithmic)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_title(f"Tokens by kind of sample: {manifest['name']}", loc="left", parse_math=False)
    return figure


def histograms(kind: str, measures: dict[str, np.ndarray]) -> Figure | None:
    """How many samples have which size or length; None where all are alike."""
    shown = {name: values for name, values in measures.items() if len(values) and np.ptp(values) > 0}
    if not shown:
        return None
    figure = Figure(figsize=(3.4 * len(shown), 3.3), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        wide = values.min() > 0 and values.max() > _WIDE * values.min()
        bins = np.geomspace(values.min(), values.max(), 40) if wide else _bins(values)
        axes.hist(values, bins=bins, color=_COLOURS["text"])
        axes.axvline(np.median(values), color="#EE6677", lw=1.2, label="median")
        _readable(axes, name, wide)
    figure.axes[0].set_ylabel("samples")
    figure.suptitle(f"{kind}: {len(next(iter(shown.values()))):,} samples; line: median", fontsize=10)
    return figure


def _bins(values: np.ndarray) -> np.ndarray | int:
    """A bar for each whole number where there are few of them."""
    whole = np.all(values == np.round(values)) and np.ptp(values) <= 40
    return np.arange(values.min() - 0.5, values.max() + 1) if whole else 40


def _readable(axes: Axes, name: str, wide: bool) -> None:
    axes.set(xlabel=f"{name} (logarithmic)" if wide else name, ylim=(0, None))
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0), numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
