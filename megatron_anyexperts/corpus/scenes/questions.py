"""Questions about scenes, captions and statements: right by construction, since they are made from the description."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_anyexperts.corpus.scenes.art import COLOURS, STAMPS
from megatron_anyexperts.corpus.scenes.draws import Draws
from megatron_anyexperts.corpus.scenes.scene import Scene, Thing

RELATIONS = ("left of", "right of", "above", "below")
_OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))


@dataclass(frozen=True)
class Asked:
    """A question about a scene, or about two.

    Attributes:
        task: ``at``, ``list`` (all stamps), ``relation``, ``steps`` (two relations in a row), ``read``, ``colour``,
            ``count``, ``exists`` or ``statement`` (a caption that may be false); ``pair`` of two pictures.
        question, answer: text.
    """

    task: str
    question: str
    answer: str


def holds(relation: str, one: Thing, other: Thing) -> bool:
    """Whether `one` is `relation` `other`: by columns alone for left and right, by rows alone for above and below."""
    return {
        "left of": one.column < other.column,
        "right of": one.column > other.column,
        "above": one.row < other.row,
        "below": one.row > other.row,
    }[relation]


def only(scene: Scene, relation: str, anchor: Thing) -> Thing | None:
    """The one stamp that is `relation` `anchor`, if there is exactly one."""
    found = [stamp for stamp in scene.stamps if holds(relation, stamp, anchor)]
    return found[0] if len(found) == 1 else None


def questions(scene: Scene, draws: Draws) -> list[Asked]:
    """All questions with one answer about where things are and what is written; of the others one each, drawn."""
    return [*_where(scene), *_written(scene), *_how_many(scene, draws), *_statement(scene, draws)]


def named(thing: Thing) -> str:
    """A thing as it is called after `the`."""
    return "word" if thing.colour else thing.name


def _where(scene: Scene) -> Iterator[Asked]:
    in_order = sorted(scene.stamps, key=lambda stamp: (stamp.row, stamp.column))
    if in_order:
        yield Asked("list", "Which stamps are there, row by row?", ", ".join(stamp.name for stamp in in_order))
    for stamp in scene.stamps:
        yield Asked("at", f"Which stamp is in row {stamp.row + 1}, column {stamp.column + 1}?", stamp.name)
    for anchor in scene.things:
        for relation in RELATIONS:
            near = only(scene, relation, anchor)
            if near is None:
                continue
            yield Asked("relation", f"Which stamp is {relation} the {named(anchor)}?", near.name)
            for second in RELATIONS:
                far = only(scene, second, near)
                if far not in (None, anchor):
                    text = f"Which stamp is {second} the one {relation} the {named(anchor)}?"
                    yield Asked("steps", text, far.name)


def _written(scene: Scene) -> Iterator[Asked]:
    if scene.word:
        yield Asked("read", "Which word is written?", scene.word.name)
        yield Asked("colour", "Which colour has the word?", scene.word.colour)


def _how_many(scene: Scene, draws: Draws) -> Iterator[Asked]:
    yield Asked("count", "How many stamps are there?", str(len(scene.stamps)))
    present = [stamp.name for stamp in scene.stamps]
    absent = [name for name in STAMPS if name not in present]
    there = bool(present) and draws.below(2) == 0
    name = draws.one(present if there else absent)
    yield Asked("exists", f"Is there {article(name)}?", "yes" if there else "no")


def _statement(scene: Scene, draws: Draws) -> Iterator[Asked]:
    true, false = captions(scene, draws)
    if false:
        correct = draws.below(2) == 0
        text = true if correct else draws.one(false)
        yield Asked("statement", f"Is this right? {text}", "yes" if correct else "no")


def article(name: str) -> str:
    """The name with `a` or `an`."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def captions(scene: Scene, draws: Draws) -> tuple[str, list[str]]:
    """A true caption of a scene, and false ones made from it by exchanging the relation, the order or the colour."""
    stamps, word, false = scene.stamps, scene.word, []
    related = [(a, relation, b) for a in stamps for b in stamps for relation in RELATIONS if holds(relation, a, b)]
    written = f'the word "{word.name}" in {word.colour}' if word else ""
    if related:
        one, relation, other = draws.one(related)
        shown = f"{article(one.name)} {relation} {article(other.name)}"
        swapped = [f"{article(one.name)} {_OPPOSITE[relation]} {article(other.name)}"]
        swapped.append(f"{article(other.name)} {relation} {article(one.name)}")
        false += [_sentence(text, written) for text in swapped]
    else:
        shown = article(stamps[0].name) if stamps else ""
    if word:
        colour = draws.one([colour for colour in COLOURS if colour != word.colour])
        false.append(_sentence(shown, f'the word "{word.name}" in {colour}'))
    return _sentence(shown, written), false


def _sentence(*clauses: str) -> str:
    text = ", ".join(filter(None, clauses))
    return f"{text[0].upper()}{text[1:]}."


def pair_statement(first: Scene, second: Scene, draws: Draws) -> Asked:
    """A statement about two pictures, true or false with equal chances where both can be said."""
    texts: dict[bool, list[str]] = {True: [], False: []}
    sets = [{stamp.name for stamp in scene.stamps} for scene in (first, second)]
    for name in sorted(sets[0] | sets[1]):
        texts[name in sets[0] and name in sets[1]].append(f"Both pictures show {article(name)}.")
        texts[name in sets[0]].append(f"The first picture shows {article(name)}.")
        texts[name in sets[1]].append(f"The second picture shows {article(name)}.")
    more = len(sets[0]) > len(sets[1])
    texts[more].append("The first picture shows more stamps than the second.")
    correct = draws.below(2) == 0
    chosen = texts[correct] or texts[not correct]
    answer = "yes" if chosen is texts[True] else "no"
    return Asked("pair", f"Is this right? {draws.one(chosen)}", answer)
