import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.analysis import charts
from megatron_anyexperts.analysis.pictures import budget_curves, frame_bars, importance_heatmaps
from megatron_anyexperts.analysis.run_record import RunRecord
from megatron_anyexperts.evaluation.budgets import Evaluation, loss_statistics
from megatron_anyexperts.evaluation.media_importance import ImageImportance, MediaImportance, VideoImportance
from tests.unit.analysis.made_run import make_run


def media(images: int = 2, videos: int = 0) -> MediaImportance:
    grid = np.linspace(0.2, 0.6, 12).reshape(3, 4)
    found = MediaImportance([2, 4, 6], 160, (1, 4))
    for number in range(images):  # the second one has other extremes
        values = grid + 0.2 * number
        words = ["a", " $x$", "\n", "boat"]
        text = (words, np.full(4, 0.1), np.full(4, 2.0))
        found.images.append(ImageImportance(np.zeros((24, 32, 3)), values, 4 * values, f"image {number}", *text))
    frames = [np.zeros((8, 8, 3))] * 3
    found.videos += [VideoImportance(frames, np.full(3, 0.5), np.array([1.0, 4.0, 2.0]), "video")] * videos
    return found


def shown(figure) -> list:
    """What each panel with a heat map shows."""
    return [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2]


def test_all_images_and_texts_of_a_figure_share_one_scale():
    figure = importance_heatmaps(media())
    limits = {(image.get_cmap().name, image.norm.vmin, image.norm.vmax) for image in shown(figure)}
    assert limits == {("magma", 0.1, 0.8), ("viridis", 1, 4)}
    assert len(shown(figure)) == 2 * (2 + 2)
    bars = {axes.get_xlabel() for axes in figure.axes}
    assert {"importance", "slots of a token"} <= bars
    assert "mean over mixture layers 2, 4, 6; iteration 160" in figure.get_suptitle()
    words = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert words == ["a", " $x$", r"\n", "boat"]
    figure.draw_without_rendering()


def test_frames_share_the_range_of_slots():
    figure = frame_bars(media(images=0, videos=2))
    ranges = {axes.get_ylim() for axes in figure.axes if axes.get_ylabel().startswith("slots")}
    assert len(ranges) == 1 and ranges.pop() == pytest.approx((0.7, 4.3))
    assert "iteration 160" in figure.get_suptitle()


def test_curves_show_targets_and_held_out_losses_and_no_empty_category(tmp_path):
    record = RunRecord.read(make_run(tmp_path).root)
    for axes, target in zip(charts.slots(record).axes, (2.0, 1.8), strict=True):
        assert [target, target] in [list(line.get_ydata()) for line in axes.lines]
        assert axes.get_ylim()[0] == 0
    lines = [line.get_xydata().tolist() for line in charts.losses(record).axes[0].lines]
    assert [[20, 5.5], [40, 5.0]] in lines
    ticks = charts.slot_distribution(record).axes[0].get_xticks()
    assert list(ticks) == [1, 2, 3]


def evaluation(budget: str, real: float, loss: float, error: float) -> Evaluation:
    losses, errors = {"all": loss, "text": loss}, {"all": error, "text": error}
    return Evaluation(budget, budget.startswith("static"), real, real, losses, errors, {"text": real}, 0.0)


def test_budgets_are_drawn_as_differences_with_errors_from_zero():
    others = [evaluation("static 2", 2, 5.05, 0.01), evaluation("1 to 4", 1.5, 4.9, 0.02)]
    figure = budget_curves([evaluation("trained", 1.8, 5.0, 0.1), *others])
    for axes in figure.axes:
        assert axes.get_xlim()[0] == 0 and axes.get_ylim()[0] < 0 < axes.get_ylim()[1]
        spans = [np.ptp(segments[0][:, 1]) for bar in axes.containers for segments in [bar[2][0].get_segments()]]
        assert spans == [pytest.approx(2 * 0.01 / 5 * 100), pytest.approx(2 * 0.02 / 5 * 100)]


sums = st.lists(st.tuples(st.floats(1, 50), st.integers(1, 9)), min_size=2, max_size=8)


@given(sums, st.floats(-0.5, 0.5))
def test_a_budget_that_costs_the_same_everywhere_has_no_error(rows, cost):
    trained = torch.zeros(len(rows), 4, 2, dtype=torch.float64)
    trained[:, 1] = torch.tensor(rows, dtype=torch.float64)
    other = trained.clone()
    other[:, 1, 0] += cost * trained[:, 1, 1]
    before, errors = loss_statistics(trained, None)
    after, paired = loss_statistics(other, trained)
    assert set(before) == {"all", "image"} and before["all"] == before["image"]
    assert after["all"] - before["all"] == pytest.approx(cost, abs=1e-9)
    assert paired["all"] == pytest.approx(0, abs=1e-6) and errors["all"] >= 0


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_with_equal_microbatches_the_error_is_that_of_a_mean(differences):
    trained = torch.zeros(len(differences), 4, 2, dtype=torch.float64)
    trained[:, 0, 1] = 3
    other = trained.clone()
    other[:, 0, 0] = 3 * torch.tensor(differences, dtype=torch.float64)
    error = loss_statistics(other, trained)[1]["text"]
    assert error == pytest.approx(np.std(differences, ddof=1) / len(differences) ** 0.5, abs=1e-9)
