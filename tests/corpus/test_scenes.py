"""Stamp scenes: the same bytes everywhere, answers that are right, combinations that training never shows, masks."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_anyexperts.corpus.scenes.art import COLOURS, STAMPS, WORDS, Art, ArtError, shrink
from megatron_anyexperts.corpus.scenes.draws import Draws
from megatron_anyexperts.corpus.scenes.png import png
from megatron_anyexperts.corpus.scenes.questions import captions, pair_statement, questions
from megatron_anyexperts.corpus.scenes.records import Order, write_scenes
from megatron_anyexperts.corpus.scenes.scene import CELL, Scene, draw_scene, is_held_out, render
from megatron_anyexperts.data.informative import picture_id, read_masks
from tests.corpus.raw import corpus_of, items
from tests.corpus.scenes_art import write_stamps

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_stamps(tmp_path_factory.mktemp("raw") / "images")


@pytest.fixture(scope="module")
def art(images) -> Art:
    return Art(images)


scenes = st.builds(
    lambda seed, count, split, square: draw_scene(Draws(str(seed)), count, split, square),
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.sampled_from(("train", "held_out", "combinations")),
    st.booleans(),
)


def digest(folder: Path) -> str:
    """Of all files below a folder, names included."""
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_every_process_and_version(images, tmp_path):
    def make(name: str, seed: int, hash_seed: str) -> str:
        command = [sys.executable, "data_tools/make_stamp_scenes.py", images.parent, "--output", tmp_path / name]
        command += ["--name", "train", "--scenes", "12", "--seed", str(seed)]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment)
        return digest(tmp_path / name)

    first = make("a", 7, "1")
    assert first == make("b", 7, "2")
    assert first != make("c", 8, "1")
    assert first == "c6a3ed8c2d91affd705c12c2a46bffd5"


def test_orders_of_other_names_and_splits_share_no_picture(art, tmp_path):
    orders = [Order(name, split, 40) for name, split in (("a", "train"), ("b", "train"), ("c", "held_out"))]
    known = set()
    for order in orders:
        write_scenes(tmp_path, art, order)
        own = set(read_masks(tmp_path / f"{order.name}.masks.jsonl"))
        assert len(own) == 40 and not own & known
        known |= own


def grid_answer(scene: Scene, question: str) -> set[str]:
    """All answers to a question, found by looking through a table of cells: another way than `questions` goes."""
    stamps = {(thing.row, thing.column): thing.name for thing in scene.things if thing.name in STAMPS}
    word = {(thing.row, thing.column): thing for thing in scene.things if thing.name in WORDS}

    def beyond(relation: str, anchors: set[str]) -> set[str]:
        cells = [cell for cell, name in stamps.items() if name in anchors]
        cells += list(word) if "word" in anchors else []
        found = set()
        for row, column in cells:
            inside = {
                "left of": [(r, c) for r in range(scene.rows) for c in range(column)],
                "right of": [(r, c) for r in range(scene.rows) for c in range(column + 1, scene.columns)],
                "above": [(r, c) for r in range(row) for c in range(scene.columns)],
                "below": [(r, c) for r in range(row + 1, scene.rows) for c in range(scene.columns)],
            }[relation]
            found |= {stamps[cell] for cell in inside if cell in stamps}
        return found

    relation = r"(left of|right of|above|below)"
    if match := re.fullmatch(r"Which stamp is in row (\d), column (\d)\?", question):
        return {stamps[int(match[1]) - 1, int(match[2]) - 1]}
    if match := re.fullmatch(rf"Which stamp is {relation} the one {relation} the (\w+)\?", question):
        return beyond(match[1], beyond(match[2], {match[3]}))
    if match := re.fullmatch(rf"Which stamp is {relation} the (\w+)\?", question):
        return beyond(match[1], {match[2]})
    if question == "Which stamps are there, row by row?":
        return {", ".join(stamps[cell] for cell in sorted(stamps))}
    if question == "Which word is written?":
        return {thing.name for thing in word.values()}
    if question == "Which colour has the word?":
        return {thing.colour for thing in word.values()}
    if question == "How many stamps are there?":
        return {str(len(stamps))}
    if match := re.fullmatch(r"Is there an? (\w+)\?", question):
        return {"yes" if match[1] in stamps.values() else "no"}
    match = re.fullmatch(r"Is this right\? (.*)", question)
    return {"yes" if caption_is_true(scene, match[1]) else "no"}


def caption_is_true(scene: Scene, caption: str) -> bool:
    """Whether every clause of a caption is so."""
    by_name = {thing.name: thing for thing in scene.things}
    for clause in caption.removesuffix(".").split(", "):
        if match := re.fullmatch(r'the word "(\w+)" in (\w+)', clause, re.IGNORECASE):
            true = match[1] in by_name and by_name[match[1]].colour == match[2]
        elif match := re.fullmatch(r"an? (\w+)(?: (left of|right of|above|below) an? (\w+))?", clause, re.IGNORECASE):
            one, relation, other = by_name.get(match[1]), match[2], by_name.get(match[3])
            true = one is not None
            if relation in ("left of", "right of"):
                true &= other is not None and (one.column - other.column) * (1 if relation == "right of" else -1) > 0
            elif relation:
                true &= other is not None and (one.row - other.row) * (1 if relation == "below" else -1) > 0
        else:
            raise AssertionError(f"unknown clause {clause!r}")
        if not true:
            return False
    return True


@given(scenes, st.integers(0, 99))
def test_every_answer_is_the_only_right_one(scene, seed):
    asked = questions(scene, Draws(str(seed)))
    assert len({(one.task, one.question) for one in asked}) == len(asked)
    for one in asked:
        found = grid_answer(scene, one.question)
        if one.task == "steps":  # the one in the middle is itself the only one, so what lies beyond it is too
            middle = re.search(r"the one (left of|right of|above|below) the (\w+)\?", one.question)
            assert len(grid_answer(scene, f"Which stamp is {middle[1]} the {middle[2]}?")) == 1
        assert found == {one.answer}, one


@given(scenes, st.integers(0, 99))
def test_captions_are_true_and_false_captions_are_false(scene, seed):
    true, false = captions(scene, Draws(str(seed)))
    assert caption_is_true(scene, true)
    assert not any(caption_is_true(scene, text) for text in false)
    assert false or (len(scene.stamps) < 2 or len({(t.row, t.column) for t in scene.stamps}) == 1) and not scene.word


@given(scenes, scenes, st.integers(0, 99))
def test_statements_about_two_pictures_are_right(first, second, seed):
    asked = pair_statement(first, second, Draws(str(seed)))
    shown = [{thing.name for thing in scene.things if thing.name in STAMPS} for scene in (first, second)]
    text = asked.question.removeprefix("Is this right? ")
    if text == "The first picture shows more stamps than the second.":
        true = len(shown[0]) > len(shown[1])
    else:
        match = re.fullmatch(r"(Both pictures|The first picture|The second picture) shows? an? (\w+)\.", text)
        seen = [match[2] in names for names in shown]
        true = {"Both pictures": all(seen), "The first picture": seen[0], "The second picture": seen[1]}[match[1]]
    assert asked.answer == ("yes" if true else "no")


@given(scenes)
def test_things_lie_in_cells_of_their_own_and_have_names_of_their_own(scene):
    assert len({(thing.row, thing.column) for thing in scene.things}) == len(scene.things)
    assert len({thing.name for thing in scene.things}) == len(scene.things)
    assert sum(thing.colour is not None for thing in scene.things) <= 1
    assert all(thing.row < scene.rows and thing.column < scene.columns for thing in scene.things)


def combined(folder: Path, name: str) -> list[set[frozenset[str]]]:
    """Of each scene what meets in it, from its description on disk."""
    found = []
    for line in (folder / f"{name}.masks.jsonl").read_text().splitlines():
        things = json.loads(line)["scene"]["things"]
        met = {frozenset(pair) for pair in combinations([t["name"] for t in things if t["colour"] is None], 2)}
        found.append(met | {frozenset((t["name"], t["colour"])) for t in things if t["colour"]})
    return found


def test_held_out_combinations_are_in_every_scene_of_theirs_and_in_no_other(art, tmp_path):
    for name in ("train", "held_out", "combinations"):
        write_scenes(tmp_path, art, Order(name, name, 200, seed=3))
    seen = set().union(*combined(tmp_path, "train"), *combined(tmp_path, "held_out"))
    assert all(pairs - seen for pairs in combined(tmp_path, "combinations"))
    assert {name for pair in seen for name in pair} == {*STAMPS, *WORDS, *COLOURS}, "each thing alone is known"
    every = [*combinations(STAMPS, 2), *((word, colour) for word in WORDS for colour in COLOURS)]
    assert 0.08 < sum(is_held_out(*pair) for pair in every) / len(every) < 0.17


@given(scene=scenes)
def test_masks_cover_the_things_and_nothing_else(art, scene):
    pixels, covered = render(scene, art)
    empty, nothing = render(replace(scene, things=(), corners=()), art)
    assert pixels.shape == (scene.rows * CELL, scene.columns * CELL, 3) and not nothing.any()
    changed = (pixels != empty).any(2).reshape(covered.shape[0], 8, covered.shape[1], 8).sum((1, 3))
    assert (changed[covered > 0] > 0).all() and (covered <= 64).all()
    cells = covered.reshape(scene.rows, 4, scene.columns, 4).sum((1, 3))
    assert {*map(tuple, np.argwhere(cells).tolist())} == {(thing.row, thing.column) for thing in scene.things}


def test_masks_are_found_again_by_the_bytes_of_a_picture(art, tmp_path):
    write_scenes(tmp_path, art, Order("some", "train", 5))
    masks = read_masks(tmp_path / "some.masks.jsonl")
    for path in (tmp_path / "pictures/some").iterdir():
        mask = masks[picture_id(path.read_bytes())]
        size = Image.open(path).size
        assert mask.shape == (size[1] // 8, size[0] // 8) and 0 < mask.max() <= 1


@given(st.integers(1, 300), st.integers(1, 90), st.integers(0, 255))
def test_a_png_holds_its_pixels(height, width, value):
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[height // 2, width // 2] = (1, 2, 3)
    assert (np.asarray(Image.open(io.BytesIO(png(pixels)))) == pixels).all()


def test_shrinking_averages_what_is_seen():
    opaque_red = np.array([255 * 255, 0, 0, 255])
    picture = np.zeros((40, 20, 4), np.int64)
    picture[::2] = opaque_red
    small = shrink(picture, 20)
    assert small.shape == (20, 10, 4)
    assert (small == opaque_red // 2).all()
    assert shrink(picture, 40) is picture


def test_stamps_that_are_missing_are_named(tmp_path):
    with pytest.raises(ArtError, match=r"lacks 24 of 24 stamps \(frog, crow"):
        Art(tmp_path)


def test_a_conversation_does_not_give_its_later_answers_away(art, tmp_path):
    write_scenes(tmp_path, art, Order("train", "train", 200, asked=6))
    for line in (tmp_path / "train.chats.jsonl").read_text().splitlines():
        said = ""
        for message in json.loads(line)["messages"]:
            if message["role"] == "assistant":
                assert not re.search(rf"\b{message['content']}\b", said)
                said += " " + message["content"]
            elif message["content"]:
                said += " " + message["content"]


def test_the_shard_builder_reads_all_records_and_the_masks_know_their_pictures(art, tmp_path):
    write_scenes(tmp_path, art, Order("one", "train", 6))
    write_scenes(tmp_path, art, Order("two", "held_out", 6, single=True))
    chats = [path.name for path in tmp_path.glob("*.jsonl") if not re.search("masks|captions", path.name)]
    captions_of_one = {"path": "one.captions.jsonl", "media_field": "image", "text_field": "text"}
    corpus = corpus_of(
        tmp_path, {"type": "media_table", **captions_of_one}, *({"type": "chat", "path": name} for name in chats)
    )
    samples = list(items(corpus))
    masks = read_masks(tmp_path / "one.masks.jsonl") | read_masks(tmp_path / "two.masks.jsonl")
    lines = sum(len((tmp_path / name).read_text().splitlines()) for name in chats)
    assert len(samples) == lines + 6
    assert all(picture_id(medium.data) in masks for sample in samples for medium in sample.media)
