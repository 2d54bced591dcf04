"""Pictures a person can read: losses and slots over training, where importance falls, and losses by budget."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster

import matplotlib.pyplot as plt
import numpy as np

from megatron_anyexperts.media import MODALITIES

if TYPE_CHECKING:
    from megatron_anyexperts.evaluation.budgets import Evaluation
    from megatron_anyexperts.evaluation.media_importance import ImageImportance, VideoImportance

COLOURS = dict(zip(MODALITIES, ("#4477AA", "#EE6677", "#228833", "#CCBB44"), strict=True))


def _series(metrics: list[dict[str, Any]], *path: str) -> tuple[list[int], list[float]]:
    points = []
    for record in metrics:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            points.append((record["iteration"], value))
    return [x for x, _ in points], [y for _, y in points]


def loss_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw the training loss of each modality.

    Args:
        metrics: records of ``metrics.jsonl``, by iteration.
        path: PNG file to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, colour in COLOURS.items():
        iterations, losses = _series(metrics, f"loss_{name}")
        if iterations:
            axes.plot(iterations, losses, color=colour, label=name)
    axes.set(xlabel="iteration", ylabel="loss (nats per target token)", title="Training loss by kind of sample")
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, path)


def slot_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw mean slots per token by modality over training, and the distribution at the end.

    Args:
        metrics: records of ``metrics.jsonl``, by iteration.
        path: PNG file to write.
    """
    figure, (over_time, final) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    last = metrics[-1]["routing"]
    present = [name for name in COLOURS if name in last]
    for offset, name in enumerate(present):
        for key, style in (("slots", "-"), ("real", "--")):
            iterations, values = _series(metrics, "routing", name, key)
            label = {"slots": name, "real": f"{name}, real only"}[key]
            over_time.plot(iterations, values, style, color=COLOURS[name], label=label)
        counts = np.array(last[name]["slots_histogram"], dtype=float)
        slots = np.arange(len(counts))
        width = 0.8 / len(present)
        position = slots + (offset - (len(present) - 1) / 2) * width
        final.bar(position, counts / counts.sum(), width, color=COLOURS[name], label=name)
    over_time.set(xlabel="iteration", ylabel="slots per token", title="Expert slots per token")
    over_time.grid(alpha=0.3)
    over_time.legend(fontsize=8)
    final.set(xlabel="slots of a token", ylabel="share of tokens", title="Distribution at the end")
    final.set_xticks(slots)
    final.legend()
    _write(figure, path)


def importance_heatmaps(images: Iterable[ImageImportance], path: Path) -> None:
    """Draw each image beside its importance and its slots.

    Args:
        images: a few; one row each.
        path: PNG file to write.
    """
    images = list(images)
    figure, grid = plt.subplots(len(images), 3, figsize=(9, 3.1 * len(images)), layout="constrained", squeeze=False)
    for row, image in zip(grid, images, strict=True):
        row[0].imshow(image.pixels)
        row[0].set_title(image.title, fontsize=9)
        height, width = image.pixels.shape[:2]
        for axes, values, name in ((row[1], image.importance, "importance"), (row[2], image.slots, "slots")):
            axes.imshow(image.pixels.mean(2), cmap="gray", alpha=0.35, extent=(0, width, height, 0))
            shown = axes.imshow(values, cmap="magma", alpha=0.75, extent=(0, width, height, 0))
            figure.colorbar(shown, ax=axes, shrink=0.8)
            axes.set_title(f"{name}: {values.min():.2f} to {values.max():.2f}", fontsize=9)
        for axes in row:
            axes.set_axis_off()
    _write(figure, path)


def frame_bars(videos: Iterable[VideoImportance], path: Path) -> None:
    """Draw each video's frames, and below each frame its importance as a bar and its slots as a point.

    Args:
        videos: a few; one strip each.
        path: PNG file to write.
    """
    videos = list(videos)
    figure, rows = plt.subplots(2 * len(videos), 1, figsize=(10, 3.6 * len(videos)), layout="constrained")
    for video, strip, bars in zip(videos, rows[::2], rows[1::2], strict=True):
        count = len(video.frames)
        strip.imshow(np.concatenate(video.frames, axis=1), extent=(-0.5, count - 0.5, 0, 1), aspect="auto")
        strip.set_axis_off()
        strip.set_title(video.title, fontsize=9)
        bars.bar(np.arange(count), video.importance, color=COLOURS["video"])
        bars.set(xlim=(-0.5, count - 0.5), ylim=(0, 1), xticks=range(count), xlabel="frame", ylabel="importance")
        slots = bars.twinx()
        slots.plot(np.arange(count), video.slots, "o", color="#555555")
        slots.set_ylabel("slots (points)")
    _write(figure, path)


def budget_curves(evaluations: list[Evaluation], path: Path) -> None:
    """Draw held-out loss against real slots per token: a fixed top-k as squares, dynamic budgets as circles.

    Args:
        evaluations: the first is the model as trained, a star.
        path: PNG file to write.
    """
    kinds = list(evaluations[0].losses)
    figure, panels = plt.subplots(1, len(kinds), figsize=(3.8 * len(kinds), 3.8), layout="constrained", squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        for static, style, label in ((True, "s--", "static top-k"), (False, "o-", "dynamic")):
            points = sorted((one.real, one.losses[kind]) for one in evaluations[1:] if one.static == static)
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, color="#888888" if static else "#EE6677")
        axes.plot(evaluations[0].real, evaluations[0].losses[kind], "*", ms=13, color="#4477AA", label="as trained")
        axes.set(xlabel="real slots per token", title=f"samples: {kind}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("held-out loss (nats per target token)")
    panels[0][0].legend()
    _write(figure, path)


def _write(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
