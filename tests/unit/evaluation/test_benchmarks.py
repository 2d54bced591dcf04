"""Benchmarks are read in their published formats, and scored as published."""

import io
import json
import math
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_anyexperts.commands.evaluate import main
from megatron_anyexperts.evaluation.answers import AnswerScorer, Question
from megatron_anyexperts.evaluation.benchmarks import aro, gqa, nlvr2, science_qa
from megatron_anyexperts.evaluation.benchmarks.items import BenchmarkError, Rate, macro, rate
from megatron_anyexperts.evaluation.benchmarks.scorer import benchmark_table, chosen, document_of, evaluate
from megatron_anyexperts.evaluation.benchmarks.tasks import Task


def picture(colour: str, size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("n1", "n2", "test1-3-0-img0", "test1-3-0-img1", "test1-3-1-img0", "test1-3-1-img1"):
        (folder / f"{name}.png").write_bytes(picture("teal"))
    canvas = Image.new("RGB", (20, 10), "red")
    canvas.paste("blue", (10, 0, 20, 10))
    canvas.save(folder / "scene.png")
    return folder


def written(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def question(answer, **others):
    types = {"structural": "query", "semantic": "rel", "detailed": "relO"}
    return {"imageId": "n1", "question": "What is it?", "answer": answer, "isBalanced": True, "types": types} | others


def test_gqa(tmp_path, images):
    other = {"structural": "verify", "semantic": "attr", "detailed": "x"}
    rows = {"07": question("sea"), "08": question("no", types=other, imageId="n2")}
    rows["09"] = question("x", isBalanced=False)
    items = gqa.read(written(tmp_path / "questions.json", rows), images)
    assert [(item.key, item.candidates) for item in items] == [("07", ("sea",)), ("08", ("no",))]
    assert [len(item.images) for item in items] == [1, 1]
    assert items[0].prompt == "What is it?\nAnswer the question using a single word or phrase."
    rates = gqa.scores(items, [True, False])
    assert rates["accuracy"] == Rate(0.5, math.sqrt(0.125), 2)
    assert {name: each.value for name, each in rates.items()} == {
        "accuracy": 0.5, "structural query": 1, "structural verify": 0, "semantic attr": 0, "semantic rel": 1
    }  # fmt: skip
    table = pyarrow.Table.from_pylist([question("sea", id="07")])
    pyarrow.parquet.write_table(table, tmp_path / "instructions.parquet")
    assert gqa.read(tmp_path / "instructions.parquet", images) == items[:1]


def science(tmp_path):
    row = {"question": "Which?", "choices": ["one", "two", "three"], "answer": 1, "hint": ""}
    row["subject"] = "language science"
    image = {"bytes": picture("red"), "path": "image.png"}
    rows = [row | {"image": None}, row | {"image": image, "hint": "Look.", "subject": "natural science", "answer": 2}]
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_science_qa(tmp_path):
    items = science_qa.read(science(tmp_path))
    assert [len(item.images) for item in items] == [0, 1] and [item.right for item in items] == [1, 2]
    assert items[0].candidates == ("A", "B", "C")
    assert items[1].prompt == f"Context: Look.\nWhich?\nA. one\nB. two\nC. three\n{science_qa.INSTRUCTION}"
    rates = science_qa.scores(items, [True, False])
    assert {name: each.value for name, each in rates.items()} == {
        "accuracy": 0.5, "language science": 1, "natural science": 0, "with image": 0, "without image": 1
    }  # fmt: skip


def test_aro_crops_and_counts_every_relation_the_same(tmp_path, images):
    box = {"bbox_x": 10, "bbox_y": 2, "bbox_w": 6, "bbox_h": 5}
    row = {"image_path": "scene.png", "true_caption": "a is on b", "false_caption": "b is on a", **box}
    rows = [row | {"relation_name": name, "attributes": ["red", name]} for name in ("on", "on", "on", "under")]
    path = written(tmp_path / "relation.json", rows)
    items = aro.read("relation", path, images)
    assert items[0].candidates[items[0].right] == "a is on b" and items[0].prompt is None
    crop = Image.open(io.BytesIO(items[0].images[0].data))
    assert crop.size == (6, 5) and crop.getcolors() == [(30, (0, 0, 255))]
    rates = aro.scores("relation", items, [True, True, True, False])
    assert rates["macro accuracy"].value == 0.5 and rates["accuracy"].value == 0.75 and rates["on"].items == 3
    assert aro.read("attribution", path, images)[3].groups == {"attribution": "red_under"}


def test_nlvr2_is_consistent_only_if_every_pair_of_a_statement_is_right(tmp_path, images):
    lines = [
        {"sentence": "There are two.", "label": label, "identifier": f"test1-3-{pair}-{sentence}"}
        for pair, sentence, label in ((0, 0, "True"), (1, 0, "False"), (0, 1, "False"), (1, 1, "True"))
    ]
    items = nlvr2.read(written(tmp_path / "test.json", "\n".join(map(json.dumps, lines))), images)
    assert [item.right for item in items] == [0, 1, 1, 0] and {len(item.images) for item in items} == {2}
    rates = nlvr2.scores(items, [True, True, True, False])
    assert rates["accuracy"].value == 0.75 and rates["consistency"] == rate([True, False])


def test_the_error_of_a_macro_rate_is_that_of_its_parts():
    parts = [rate([True, False] * 8), rate([True] * 3 + [False])]
    assert macro(parts).value == pytest.approx((0.5 + 0.75) / 2)
    assert macro(parts).error == pytest.approx(math.hypot(parts[0].error, parts[1].error) / 2)
    assert math.isnan(rate([]).value) and math.isnan(macro([]).value)


def test_the_likeliest_candidate_is_chosen_by_sum_or_by_mean():
    losses, targets = [4.0, 6.0], [2.0, 6.0]
    assert chosen(losses, targets, normalised=False) == 0
    assert chosen(losses, targets, normalised=True) == 1


@pytest.mark.parametrize(
    ("read", "content", "why"),
    [
        (gqa.read, "{", "is not JSON"),
        (gqa.read, [], "not a mapping"),
        (gqa.read, {"1": {"imageId": "n1"}}, "question 1 has no question, answer"),
        (gqa.read, {"1": question("x", imageId="absent")}, "there is no image absent"),
        (nlvr2.read, '{"sentence": "a", "label": "yes", "identifier": "test1-3-0-0"}', "line 1 has label 'yes'"),
        (lambda *paths: aro.read("relation", *paths), {}, "not a list of captions"),
    ],
)
def test_another_file_is_refused(tmp_path, images, read, content, why):
    with pytest.raises(BenchmarkError, match=why):
        read(written(tmp_path / "file.json", content), images)


def test_tasks_are_named_with_their_files(tmp_path, images, capsys):
    path = written(tmp_path / "q.json", {})
    assert Task.parse(f"gqa={path}:{images}") == Task("gqa", path, images)
    for word, why in (
        (f"gqb={path}:{images}", "one of aro_attribution, aro_relation, gqa"),
        (f"gqa={path}", "names no folder of images"),
        (f"gqa={path}:{images}/absent", "absent of --tasks"),
    ):
        assert main(["--run-dir", str(tmp_path), "--tasks", word]) == 2
        assert why in capsys.readouterr().err


def test_a_model_answers_as_its_losses_say_however_rows_are_packed(encoder, model, tmp_path, images):
    args = SimpleNamespace(micro_batch_size=2)
    task = Task("scienceqa", science(tmp_path), None)
    result = evaluate(task, model, encoder, args)
    right = []
    for item in science_qa.read(task.path):
        losses = []
        for candidate in item.candidates:
            document = document_of(item, candidate)
            [planned] = encoder.plan(document)
            score = AnswerScorer(encoder, [Question("one", document, planned)], 1)(model)["one"]
            losses.append(score.loss)  # all letters have as many tokens
        right.append(losses.index(min(losses)) == item.right)
    assert result.rates["accuracy"] == rate(right) and result.unusable == 0
    # An exact answer, and an item that no row holds.
    rows = {"1": question("sea"), "2": question("sea", question="what? " * 200)}
    found = evaluate(Task("gqa", written(tmp_path / "q.json", rows), images), model, encoder, args)
    assert found.unusable == 1 and found.rates["accuracy"].items == 2
    assert "1 items do not fit a row" in benchmark_table({"gqa": found, "scienceqa": result})
    assert evaluate(task, model, encoder, args, limit=1).rates["accuracy"].items == 1
