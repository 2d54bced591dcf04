"""Questions with exchanged pictures, their scores, and where importance falls."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.data.chat import chat_parts
from megatron_anyexperts.data.informative import picture_id
from megatron_anyexperts.data.samples import Document, Media
from megatron_anyexperts.evaluation.answers import AnswerScorer, Question, Score, score_table, with_other_pictures
from megatron_anyexperts.evaluation.informative import auc, auc_by_place, semantics, semantics_table
from tests.feed.corpus import image_bytes


def question(encoder, task: str, number: int, pictures: int = 1, side: int = 16) -> Question:
    media = [Media("image", image_bytes(number + 100 * i, width=side, height=side), "jpg") for i in range(pictures)]
    content = [{"type": "image", "media": i} for i in range(pictures)] + [
        {"type": "text", "text": f"what {task} {number}?"}
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "the sea"}]
    document = Document(
        __key__=f"{task}{number}", __restore_key__=(), __subflavors__={}, __sources__=None, kind="chat",
        parts=chat_parts(messages, lambda item: media[item["media"]]),
    )  # fmt: skip
    [planned] = encoder.plan(document)
    return Question(task, document, planned)


def shown(asked: Question) -> list[bytes]:
    return [frames.media.data for frames in asked.planned.frames]


def test_every_question_gets_pictures_of_another_of_its_task_and_size(encoder):
    asked = [question(encoder, "a", number // 2) for number in range(6)]  # two questions about each picture
    asked += [question(encoder, "b", 7 + number, pictures=2) for number in range(3)]
    changed = with_other_pictures(asked)
    for before, after in zip(asked, changed, strict=True):
        assert shown(after) != shown(before)
        assert any(shown(after) == shown(one) for one in asked if one.task == before.task)
        assert after.planned.grids == before.planned.grids and after.planned.tokens is before.planned.tokens


def test_questions_without_another_picture_stay(encoder):
    asked = [question(encoder, "a", 1), question(encoder, "b", 2), question(encoder, "b", 3, side=8)]
    asked.append(question(encoder, "none", 4, pictures=0))
    assert all(after is before for before, after in zip(asked, with_other_pictures(asked), strict=True))


def test_other_pictures_change_the_loss_of_a_model_that_sees(encoder, model):
    asked = [question(encoder, "a", number) for number in range(4)]
    right = AnswerScorer(encoder, asked, micro_batch_size=2)(model)["a"]
    other = AnswerScorer(encoder, with_other_pictures(asked), micro_batch_size=2)(model)["a"]
    assert right.questions == other.questions == 4
    assert abs(right.loss - other.loss) > 1e-4


def test_the_table_weighs_tasks_by_questions():
    scores = {"a": Score(100, 0.5, 1.0, 0.2), "b": Score(300, 0.9, 2.0, 0.4)}
    shuffled = {"a": Score(100, 0.1, 3.0, 0.2), "b": Score(300, 0.3, 3.0, 0.4)}
    last = score_table(scores, shuffled).splitlines()[-1].split()
    assert last == ["all", "400", "80.0%", "+-", "2.0%", "35.0%", "25.0%", "+-", "2.2%", "1.750"]
    assert "other" not in score_table(scores)


values = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@given(values, values)
def test_auc_is_the_share_of_pairs_in_order(informative, background):
    pairs = [(a > b) + (a == b) / 2 for a in informative for b in background]
    assert auc(np.array(informative, float), np.array(background, float)) == pytest.approx(np.mean(pairs))


tokens = st.lists(st.tuples(st.integers(0, 5), st.sampled_from("ib-"), st.integers(0, 2)), max_size=14)


@given(tokens)
def test_auc_by_place_is_the_share_of_pairs_in_order_at_one_place(tokens):
    pairs = [
        (a > b) + (a == b) / 2
        for a, kind, place in tokens
        for b, other, there in tokens
        if (kind, other, place) == ("i", "b", there)
    ]
    values, kinds, places = (np.array(column) for column in zip(*tokens, strict=True)) if tokens else [np.zeros(0)] * 3
    found = auc_by_place(values, kinds == "i", kinds == "b", places)
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


def test_importance_of_informative_tokens_is_that_of_the_tokens_under_the_mask(encoder, model):
    asked = [question(encoder, "a", number) for number in range(3)]
    asked.append(replace(asked[0]))  # the same picture again counts once
    rows, columns = asked[0].planned.grids[0][1:]
    left = np.zeros((rows, columns))
    left[:, : columns // 2] = 1
    known = {picture_id(shown(one)[0]): left for one in asked[:2]}
    found = semantics(model, encoder, asked, known)
    mirrored = semantics(model, encoder, asked, {name: 1 - mask for name, mask in known.items()})
    assert len(found) == 2 and found.keys() == mirrored.keys()
    for layer, one in found.items():
        assert one.auc == pytest.approx(1 - mirrored[layer].auc)
        assert one.auc_same_place == pytest.approx(1 - mirrored[layer].auc_same_place, nan_ok=True)
        assert one.auc_real == pytest.approx(1 - mirrored[layer].auc_real)
        assert (one.real_informative, one.real_background) == (
            mirrored[layer].real_background, mirrored[layer].real_informative,
        )  # fmt: skip
    assert any(one.auc != 0.5 for one in found.values())
    assert len(semantics_table(found).splitlines()) == 3
    with pytest.raises(ValueError, match="mask of"):
        semantics(model, encoder, asked, {name: np.zeros((2, 2)) for name in known})
