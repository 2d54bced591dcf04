"""Pictures of what routing does to held-out media, and of losses by budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from megatron_anyexperts.analysis.charts import COLOURS

if TYPE_CHECKING:
    from megatron_anyexperts.evaluation.budgets import Evaluation
    from megatron_anyexperts.evaluation.media_importance import ImageImportance, MediaImportance

_IMPORTANCE, _SLOTS = "magma", "viridis"
_MOST_WORDS = 28


def importance_heatmaps(media: MediaImportance) -> Figure:
    """Draw each image beside its importance and its slots, and the text beside it below; one scale for all.

    Args:
        media: with a few images.
    """
    images = media.images
    figure = Figure(figsize=(9.5, 3.7 * len(images) + 0.9), layout="constrained")
    figure.suptitle(f"Importance and slots of held-out tokens, {media.source}", fontsize=10)
    grid = figure.add_gridspec(3 * len(images) + 1, 3, height_ratios=[0.12, *[3, 0.22, 0.22] * len(images)])
    weights = np.concatenate([np.append(image.importance, image.word_importance) for image in images])
    scales = (
        ScalarMappable(Normalize(weights.min(), weights.max()), _IMPORTANCE),
        ScalarMappable(Normalize(*media.slot_range), _SLOTS),
    )
    for column, (scale, name) in enumerate(zip(scales, ("importance", "slots of a token"), strict=True), start=1):
        bar = figure.colorbar(scale, cax=figure.add_subplot(grid[0, column]), orientation="horizontal", label=name)
        bar.ax.tick_params(labelsize=8)
    for row, image in enumerate(images):
        panels = [figure.add_subplot(grid[3 * row + 1, column]) for column in range(3)]
        panels[0].imshow(image.pixels)
        panels[0].set_title(image.title, fontsize=8, loc="left")
        height, width = image.pixels.shape[:2]
        shown = ((panels[1], image.importance, "importance"), (panels[2], image.slots, "slots"))
        for (axes, values, name), scale in zip(shown, scales, strict=True):
            axes.imshow(values, cmap=scale.cmap, norm=scale.norm, extent=(0, width, height, 0))
            axes.set_title(f"{name}: {values.min():.2f} to {values.max():.2f}", fontsize=8, loc="left")
        for axes in panels:
            axes.set_axis_off()
        _words(image, [figure.add_subplot(grid[3 * row + place, :]) for place in (2, 3)], scales)
    return figure


def _words(image: ImageImportance, strips: list[Axes], scales: tuple[ScalarMappable, ScalarMappable]) -> None:
    """The text tokens as two strips of cells, importance above slots, with the tokens below."""
    left_out = len(image.words) - _MOST_WORDS
    title = f"its text, {len(image.words)} tokens" + (f", of which the first {_MOST_WORDS}" if left_out > 0 else "")
    shown = (("importance", image.word_importance), ("slots", image.word_slots))
    for axes, (name, values), scale in zip(strips, shown, scales, strict=True):
        cells = values[None, :_MOST_WORDS]
        axes.imshow(cells, cmap=scale.cmap, norm=scale.norm, aspect="auto")
        axes.set(xticks=[], xlim=(-0.5, _MOST_WORDS - 0.5))
        axes.set_yticks([0], [name], fontsize=7)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    strips[0].set_title(title, fontsize=8, loc="left")
    words = [repr(word)[1:-1] for word in image.words[:_MOST_WORDS]]
    strips[1].set_xticks(range(len(words)), words, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)


def frame_bars(media: MediaImportance) -> Figure:
    """Draw each video's frames, and below each frame its importance as a bar and its slots as a point.

    Args:
        media: with a few videos.
    """
    videos = media.videos
    figure = Figure(figsize=(10, 3.6 * len(videos) + 0.4), layout="constrained")
    figure.suptitle(f"Frames of held-out videos, mean over a frame's tokens and {media.source}", fontsize=10)
    rows = figure.subplots(2 * len(videos), 1)
    for video, strip, bars in zip(videos, rows[::2], rows[1::2], strict=True):
        count = len(video.frames)
        strip.imshow(np.concatenate(video.frames, axis=1), extent=(-0.5, count - 0.5, 0, 1), aspect="auto")
        strip.set_axis_off()
        strip.set_title(video.title, fontsize=9, loc="left")
        bars.bar(np.arange(count), video.importance, color=COLOURS["video"])
        bars.set(xlim=(-0.5, count - 0.5), ylim=(0, 1), xticks=range(count), xlabel="frame")
        bars.set_ylabel("importance (bars)", color=COLOURS["video"])
        slots = bars.twinx()
        slots.plot(np.arange(count), video.slots, "o", color="#555555")
        low, high = media.slot_range
        slots.set(ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low) or high + 1), ylabel="slots (points)")
        slots.grid(False)
    return figure


def budget_curves(evaluations: list[Evaluation]) -> Figure:
    """Draw what each budget costs on held-out data, beside the model as trained, against real slots per token.

    Args:
        evaluations: the first is the model as trained, a star at zero; error bars are standard errors of the
            difference to it, over microbatches.
    """
    trained = evaluations[0]
    kinds = list(trained.losses)
    figure = Figure(figsize=(3.8 * len(kinds), 4.2), layout="constrained")
    figure.suptitle("Held-out loss under other budgets, beside the model as trained; bars: standard error", fontsize=10)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds, strict=True):
        percent = 100 / trained.losses[kind]
        for static, style, label in ((True, "s--", "static top-k"), (False, "o-", "dynamic")):
            points = sorted(
                (one.real, (one.losses[kind] - trained.losses[kind]) * percent, one.errors[kind] * percent)
                for one in evaluations[1:]
                if one.static == static
            )
            if points:
                xs, ys, errors = zip(*points, strict=True)
                colour = "#888888" if static else COLOURS["image"]
                axes.errorbar(xs, ys, errors, fmt=style, label=label, color=colour, capsize=3, elinewidth=1)
        axes.plot(trained.real, 0, "*", ms=13, color=COLOURS["text"], label="as trained")
        axes.axhline(0, color=COLOURS["text"], lw=1)
        axes.set_title(f"samples: {kind} ({trained.losses[kind]:.3f} nats)", fontsize=10)
        axes.set_xlabel("real slots per token")
        axes.set_xlim(left=0)
    figure.axes[0].set_ylabel("loss, % above the trained budget")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
