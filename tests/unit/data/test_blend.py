"""Foreign shards are data: nothing that they name is imported or run."""

from pathlib import Path

import pytest
import yaml
from megatron.energon.epathlib import EPath

from megatron_anyexperts.data.blend import UntrustedBlend, check_blend, open_blend
from megatron_anyexperts.data.loader import WorkerConfig
from tests.feed import corpus
from tests.feed.conftest import CONFIG

ONE = WorkerConfig(rank=0, world_size=1, num_workers=1)
RUNS = "open({marker!r}, 'w').write('ran')\ndef f(*_): return True\n"


@pytest.fixture
def shards(tmp_path) -> Path:
    """A small blend, and Python files that leave a mark when they are run."""
    blend = corpus.build(tmp_path / "shards", {"text": 16})
    code = RUNS.format(marker=str(tmp_path / "ran"))
    (tmp_path / "shards" / "text" / ".nv-meta" / "filter.py").write_text(code)
    (tmp_path / "trap.py").write_text(code)
    return blend


def change(path: Path, edit) -> None:
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content))


def dataset(blend: Path) -> Path:
    return blend.parent / "text" / ".nv-meta" / "dataset.yaml"


BLENDS = {
    "another class": lambda c: c.update({"__module__": "trap", "__class__": "f"}),
    "a function": lambda c: (c.pop("__class__"), c.update({"__module__": "trap", "__function__": "f"})),
    "a class in a reference": lambda c: c["splits"]["train"]["blend"][0].update(
        path={"__module__": "trap", "__class__": "f"}
    ),
    "a class in subflavors": lambda c: c["splits"]["train"]["blend"][0].update(
        subflavors={"kind": {"__module__": "trap", "__class__": "f"}}
    ),
    "another description": lambda c: c["splits"]["train"]["blend"][0].update(dataset_config="../../other.yaml"),
    "an unknown key": lambda c: c.update(path="elsewhere"),
    "a split that is nothing": lambda c: c["splits"].update(train={}),
    "a weight that is none": lambda c: c["splits"]["train"]["blend"][0].update(weight=float("nan")),
    "no repetition": lambda c: c["splits"]["train"]["blend"][0].update(repetitions=0),
    "less than none": lambda c: c["splits"]["train"]["blend"][0].update(repetitions=-1.5),
}
DATASETS = {
    "a part filter": lambda c: c.update(part_filter="filter.py:f"),
    "a sample loader": lambda c: c.update(sample_loader="filter.py:f", part_filter="filter.py:f"),
    "another class": lambda c: c.update({"__module__": "trap", "__class__": "f"}),
    "a class in subflavors": lambda c: c.update(subflavors={"x": {"__module__": "trap", "__class__": "f"}}),
}


@pytest.mark.parametrize("edit", [pytest.param(edit, id=name) for name, edit in BLENDS.items()])
def test_a_blend_that_names_code_is_refused_and_runs_none(shards, tmp_path, monkeypatch, edit):
    monkeypatch.syspath_prepend(tmp_path)
    change(shards, edit)
    with pytest.raises(UntrustedBlend, match=r"blend.yaml: .* is not accepted .*accepted here: "):
        open_blend(shards, "train", CONFIG, ONE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("edit", [pytest.param(edit, id=name) for name, edit in DATASETS.items()])
def test_a_data_set_that_names_code_is_refused_and_runs_none(shards, tmp_path, monkeypatch, edit):
    monkeypatch.syspath_prepend(tmp_path)
    change(dataset(shards), edit)
    for blend in (shards, shards.parent / "text"):
        with pytest.raises(UntrustedBlend, match=r"dataset.yaml: .* is not accepted"):
            open_blend(blend, "train", CONFIG, ONE)
    assert not (tmp_path / "ran").exists()


def test_what_the_refusal_keeps_out_would_run_in_energon(shards, tmp_path):
    from megatron.energon import load_dataset

    change(dataset(shards), DATASETS["a part filter"])
    with pytest.raises(Exception):  # noqa: B017 - whatever Energon says of it afterwards
        load_dataset(str(shards)).get_datasets(training=True, split_part="train", worker_config=ONE, decoder=None)
        raise AssertionError
    assert (tmp_path / "ran").exists()


def test_blends_may_refer_to_blends_but_not_in_a_circle(shards):
    outer = shards.with_name("outer.yaml")
    entry = {"path": "blend.yaml", "weight": 1.0}
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"blend": [entry]}}}
    outer.write_text(yaml.safe_dump(content))
    assert open_blend(outer, "train", CONFIG, ONE).datasets
    entry["path"] = "outer.yaml"
    outer.write_text(yaml.safe_dump(content))
    with pytest.raises(UntrustedBlend, match="refers to itself"):
        check_blend(EPath(str(outer)))


def test_a_missing_part_and_a_file_that_is_no_yaml_are_named(shards):
    change(shards, lambda c: c["splits"]["train"]["blend"][0].update(path="gone"))
    with pytest.raises(FileNotFoundError, match=r"gone/.nv-meta/dataset.yaml does not exist"):
        open_blend(shards, "train", CONFIG, ONE)
    shards.write_text("a: [")
    with pytest.raises(UntrustedBlend, match="blend.yaml"):
        open_blend(shards, "train", CONFIG, ONE)
