import numpy as np

from megatron_anyexperts.corpus.plots import histograms, plot, token_bars

KINDS = {
    "image": {"train": {"tokens": {"text": 159, "image": 40_000, "audio": 0, "video": 0}}},
    "text": {"train": {"tokens": {"text": 159, "image": 0, "audio": 0, "video": 0}}},
}


def labels(axis) -> list[str]:
    axis.figure.draw_without_rendering()
    return [label.get_text() for label in axis.get_ticklabels(which="both") if label.get_text()]


def test_every_bar_has_its_number_and_nothing_covers_it():
    [axes] = token_bars({"name": "$a_b$", "kinds": KINDS}).axes
    assert [text.get_text() for text in axes.texts] == ["159", "40,000", "159"]
    assert labels(axes.yaxis) == ["image: text", "image: image", "text: text"]
    assert axes.get_legend() is None
    assert {"1", "10", "1 k"} <= set(labels(axes.xaxis))


def test_axes_are_labelled_with_plain_numbers():
    measures = {"width": np.array([158.5, 159.0, 160.0] * 9), "bytes": np.geomspace(20, 5e6, 50), "media": np.ones(9)}
    figure = histograms("image", measures)
    assert [axes.get_xlabel() for axes in figure.axes] == ["width", "bytes (logarithmic)"]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            assert labels(axis) and not any(set("^{$×") & set(label) for label in labels(axis))
        assert len(labels(axes.xaxis)) >= 3


def test_a_kind_whose_samples_are_all_alike_has_no_picture(tmp_path):
    measured = {"text": {"characters": np.full(5, 7.0)}, "image": {"width": np.array([1.0, 2.0])}}
    paths = plot({"name": "c", "kinds": KINDS}, measured, tmp_path / "plots")
    assert [path.name for path in paths] == ["tokens.png", "image.png"] and all(path.is_file() for path in paths)
