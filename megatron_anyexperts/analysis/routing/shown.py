"""Findings as a table of text, as JSON, and as pictures."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_anyexperts.analysis.routing.findings import Findings
from megatron_anyexperts.analysis.routing.intervals import Measured

PICTURES = {
    "signatures.png": "similarity of signatures",
    "specialisation.png": "domain specialisation",
    "modalities.png": "modality specialisation",
    "coactivation.png": "co-activation",
    "load_over_time.png": "load over time",
}
"""File to the beginning of the names of the matrices in it."""


def text(found: Findings) -> str:
    """A block for each quantity, a line for each thing it is of; ``*`` marks what lies outside its baseline's range."""
    width = max((len(name) for each in found.figures.values() for name in each), default=0)
    head = f"{'':{width}}  {'value':>8s}  {'95 % interval':>18s}  {'baseline':>8s}  {'its 95 % range':>18s}"
    lines = [head] if found.figures else []
    for quantity, each in found.figures.items():
        baselines = sorted({value.baseline for value in each.values()})
        lines.append(f"\n{quantity} (baseline: {', '.join(baselines)})")
        lines += [f"{name:{width}}  {_row(value)}" for name, value in each.items()]
    return "\n".join([*lines, *(f"left out: {reason}" for reason in found.left_out)])


def _row(value: Measured) -> str:
    def pair(low: float, high: float) -> str:
        return "-" if math.isnan(low) else f"{low:.4g} to {high:.4g}"

    mark = " *" if value.stands_out else ""
    return (
        f"{value.value:8.4g}  {pair(value.low, value.high):>18s}  {value.null:8.4g}  "
        f"{pair(value.null_low, value.null_high):>18s}{mark}"
    )


def as_json(found: Findings) -> dict[str, Any]:
    """Plain values; what is not finite becomes None."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    figures = {
        quantity: {name: {key: plain(part) for key, part in asdict(value).items()} for name, value in each.items()}
        for quantity, each in found.figures.items()
    }
    return {"figures": figures, "left_out": found.left_out}


def heat_maps(found: Findings, kind: str) -> Figure | None:
    """All matrices whose name begins with `kind`, with one scale; None without any."""
    chosen = {name: each for name, each in found.matrices.items() if name.startswith(kind)}
    if not chosen:
        return None
    columns = min(len(chosen), 3)
    rows = -(-len(chosen) // columns)
    figure = Figure((0.6 + 4.2 * columns, 0.4 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    known = np.concatenate([matrix[np.isfinite(matrix)] for matrix, _, _ in chosen.values()])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    for panel, (name, (matrix, sides, tops)) in zip(panels, chosen.items(), strict=False):
        image = panel.imshow(matrix, vmin=low, vmax=high, aspect="auto", cmap="viridis", interpolation="nearest")
        panel.grid(False)
        panel.set_title(name, fontsize=9)
        for axis, labels in ((panel.yaxis, sides), (panel.xaxis, tops)):
            step = max(1, len(labels) // 12)
            axis.set_ticks(range(0, len(labels), step), [label[:18] for label in labels[::step]], fontsize=7)
        if tops is not sides and len(tops) > len(sides):
            panel.set_xlabel("expert", fontsize=8)
    for panel in panels[len(chosen) :]:
        panel.set_visible(False)
    figure.colorbar(image, ax=list(panels), shrink=0.8)
    return figure
