"""Writes scenes as records that the shard builder reads, with pictures and masks beside them."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_anyexperts.corpus.scenes.art import Art
from megatron_anyexperts.corpus.scenes.draws import Draws
from megatron_anyexperts.corpus.scenes.png import png
from megatron_anyexperts.corpus.scenes.questions import Asked, captions, pair_statement, questions
from megatron_anyexperts.corpus.scenes.scene import PATCH, Scene, Split, draw_scene, render
from megatron_anyexperts.data.informative import mask_line

WEIGHTS = {
    "at": 4, "list": 2, "relation": 4, "steps": 2, "read": 4, "colour": 2, "count": 1, "exists": 1, "statement": 1,
}  # fmt: skip
"""How often a question of a task is drawn, where a scene has one."""


@dataclass(frozen=True)
class Order:
    """Scenes to write.

    Attributes:
        name: of their files.
        split: see `scene.Split`.
        scenes: how many.
        things: numbers of things in a scene, in turn.
        asked: most questions of a scene.
        tasks: of the questions, keys of `WEIGHTS`.
        single: whether each question is a conversation of its own, in a file of its task, as evaluations need it.
        square: three rows and columns of cells always, instead of two or three.
        seed: equal seeds give equal bytes.
    """

    name: str
    split: Split
    scenes: int
    things: tuple[int, ...] = (1, 2, 3, 4)
    asked: int = 4
    tasks: tuple[str, ...] = tuple(WEIGHTS)
    single: bool = False
    square: bool = False
    seed: int = 0


def write_scenes(folder: Path, art: Art, order: Order) -> Counter[str]:
    """Write an order; return how many records each file got.

    Files below `folder`:
        pictures/NAME/000000.png
        NAME.chats.jsonl     a conversation per scene, or NAME.TASK.jsonl with one per question
        NAME.pair.jsonl      a statement about each two scenes
        NAME.captions.jsonl  image, text, false_captions
        NAME.masks.jsonl     see `data.informative`; and scene, the description of the picture
    """
    pictures, lines = f"pictures/{order.name}", {}
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    waiting: tuple[str, Scene] | None = None
    for number in range(order.scenes):
        draws = Draws(f"{order.seed}/{order.name}/{order.split}/{number}")
        scene = draw_scene(draws, order.things[number % len(order.things)], order.split, order.square)
        path = f"{pictures}/{number:06d}.png"
        found = list(_records(folder, art, order, scene, path, draws))
        if waiting is None:
            waiting = path, scene
        else:
            found.append(("pair", chat([waiting[0], path], [pair_statement(waiting[1], scene, draws)])))
            waiting = None
        for kind, record in found:
            lines.setdefault(f"{order.name}.{kind}.jsonl", []).append(json.dumps(record) + "\n")
    for file, records in lines.items():
        (folder / file).write_text("".join(records), encoding="utf-8")
    return Counter({file: len(records) for file, records in lines.items()})


def _records(
    folder: Path, art: Art, order: Order, scene: Scene, path: str, draws: Draws
) -> Iterator[tuple[str, dict[str, Any]]]:
    pixels, covered = render(scene, art)
    data = png(pixels)
    (folder / path).write_bytes(data)
    yield "masks", mask_line(path, data, PATCH, covered) | {"scene": asdict(scene)}
    true, false = captions(scene, draws)
    yield "captions", {"image": path, "text": true, "false_captions": false}
    possible = [one for one in questions(scene, draws) if one.task in order.tasks]
    asked = choose(possible, order.asked, draws)
    if order.single:
        yield from ((one.task, chat([path], [one])) for one in asked)
    elif asked:
        yield "chats", chat([path], asked)


def choose(asked: list[Asked], count: int, draws: Draws) -> list[Asked]:
    """Draw up to `count` questions: a task by `WEIGHTS`, then one of its questions whose answer was not named before.

    Else one could answer the later turns of a conversation from the earlier ones, without the picture.
    """
    left, chosen = list(asked), []
    while left and len(chosen) < count:
        present = {one.task for one in left}
        task = draws.one([task for task, weight in WEIGHTS.items() for _ in range(weight) if task in present])
        chosen.append(draws.one([one for one in left if one.task == task]))
        said = " ".join(f"{one.question} {one.answer}" for one in chosen)
        left = [one for one in left if one not in chosen and not re.search(rf"\b{one.answer}\b", said)]
    return chosen


def chat(pictures: list[str], asked: list[Asked]) -> dict[str, Any]:
    """A conversation that begins with pictures."""
    messages = []
    for number, one in enumerate(asked):
        tags = "" if number else "<image>" * len(pictures)
        messages += [
            {"role": "user", "content": tags + one.question},
            {"role": "assistant", "content": one.answer},
        ]
    return {"images": pictures, "messages": messages}
