"""An exception that nobody expected costs the item that caused it, and too many of them end the build."""

import json
from pathlib import Path

import pytest

from megatron_anyexperts.corpus import scan, write
from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.corpus import CorpusError, Tolerance
from megatron_anyexperts.corpus.sources.folders import TextFolder
from megatron_anyexperts.corpus.tolerance import Unforeseen
from megatron_anyexperts.corpus.unforeseen import UNFORESEEN
from megatron_anyexperts.corpus.workers import Share
from tests.corpus.raw import corpus_of
from tests.corpus.raw import write as write_file

ROOT = Path(__file__).resolve().parents[2]


def texts(root, count: int, **options):
    for number in range(count):
        write_file(root / f"text/{number}.txt", f"Document {number}.")
    return corpus_of(root, {"type": "text_folder", "path": "text"}, validation_fraction=0, **options)


def failing_for(function, *numbers):
    """`function`, which raises for the samples of some documents."""

    def wrapped(sample, *arguments):
        if any(sample.origin == f"text:{number}.txt" for number in numbers):
            raise LookupError(f"nobody thought of\n{sample.origin}")
        return function(sample, *arguments)

    return wrapped


def test_one_item_of_each_stage_is_rejected_with_its_place_and_the_exception(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "check", failing_for(scan.check, 3))
    monkeypatch.setattr(write, "transform", failing_for(write.transform, 5))
    manifest = build(texts(tmp_path, 9), tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["samples"] == 7 and manifest["rejected"] == {UNFORESEEN: 2}
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {line["origin"] for line in lines} == {"text:3.txt", "text:5.txt"}
    assert all("LookupError: nobody thought of (test_unforeseen.py:" in line["detail"] for line in lines)


def test_a_source_that_fails_in_between_keeps_what_it_gave(tmp_path, monkeypatch):
    items = TextFolder._items

    def failing(self, name, max_bytes):
        yield from items(self, name, max_bytes)
        if name == "3.txt":
            raise RuntimeError("the source has a fault")

    monkeypatch.setattr(TextFolder, "_items", failing)
    manifest = build(texts(tmp_path, 9, chunk_items=4), tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["rejected"] == {UNFORESEEN: 1} and manifest["items"] == manifest["samples"] + 1
    assert "the source has a fault" in (tmp_path / "out/rejected.jsonl").read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_end_the_build_until_the_limit_is_raised(tmp_path, monkeypatch, workers):
    write_file(tmp_path / "plugin/sitecustomize.py", FAILING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/plugin:{ROOT}", prepend=":")
    monkeypatch.setattr(scan, "check", failing_for(scan.check, 1, 2))
    strict = texts(tmp_path, 9, tolerance={"unforeseen_items": 1, "unforeseen_share": 0.1})
    with pytest.raises(CorpusError, match=r"2 of \d items .*unforeseen_items=1 .*the last one: text:.*LookupError"):
        build(strict, tmp_path / "out", Share(), workers, quiet=True)
    raised = texts(tmp_path, 9, tolerance={"unforeseen_items": 2, "unforeseen_share": 0.1})
    assert build(raised, tmp_path / "out", Share(), workers, quiet=True)["rejected"] == {UNFORESEEN: 2}


FAILING = """
import megatron_anyexperts.corpus.scan as scan
from tests.corpus.test_unforeseen import failing_for

scan.check = failing_for(scan.check, 1, 2)
"""


def test_a_rate_below_the_share_is_tolerated():
    lines = [{"reason": UNFORESEEN, "origin": "a", "detail": "b"}] * 3 + [{"reason": "empty text"}] * 9
    tally = Unforeseen(Tolerance(unforeseen_items=2, unforeseen_share=0.1))
    tally.add(30, lines)
    with pytest.raises(CorpusError, match="4 of 31 items"):
        tally.add(1, lines[:1])
