"""Decoding is the forward pass of training, token by token; held-out scores are what decoding would give."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_anyexperts.commands.generate import why_empty
from megatron_anyexperts.data.microbatch import LOGIT_INPUTS, collate
from megatron_anyexperts.data.packing import assemble_row
from megatron_anyexperts.data.samples import Media, SampleError
from megatron_anyexperts.evaluation.answers import AnswerScorer, Question
from megatron_anyexperts.evaluation.generation import (
    STOPS,
    Generated,
    GeneratedToken,
    decode,
    generate,
    media_file,
    prompt_document,
)
from megatron_anyexperts.moe.metrics import record_tokens
from tests.feed.corpus import image_bytes, wav_bytes
from tests.unit.models.small import SHAPE

NEW = 6


def prompts() -> list:
    picture, clip = Media("image", image_bytes(3), "jpg"), Media("audio", wav_bytes(5, seconds=0.2), "wav")
    return [
        prompt_document("the wide blue sea", []),
        prompt_document("what is it?", [picture]),
        prompt_document("what is being said?", [clip]),
        prompt_document("and both?", [picture, clip]),
    ]


@pytest.mark.parametrize("document", prompts(), ids=["text", "image", "audio", "both"])
def test_prefill_and_steps_give_the_logits_and_slots_of_one_pass(encoder, model, document):
    [planned] = encoder.plan(document)
    with record_tokens() as steps:
        tokens, logits = zip(*decode(model, encoder, planned, NEW), strict=True)
    pad = encoder.vocabulary.special["<|pad|>"]
    whole = with_answer(planned, list(tokens))
    row = assemble_row([encoder.decode(whole)], whole.size[0], SHAPE, pad)
    with torch.no_grad(), record_tokens() as once:
        expected = model(**collate([row], []).select(LOGIT_INPUTS))
    ids = sorted(encoder.vocabulary.ids())
    torch.testing.assert_close(torch.stack(logits)[:, ids], expected[0, -NEW:, ids], rtol=1e-4, atol=1e-4)
    assert steps.keys() == once.keys() and len(steps) == 2
    for layer, records in steps.items():
        assert torch.equal(torch.cat([record.slots_SB for record in records]), once[layer][0].slots_SB)


def with_answer(planned, answer: list[int]):
    """The prompt with an answer after it instead of the end of text, and the answer as target."""
    prompt = planned.tokens[:-1]
    return dataclasses.replace(
        planned,
        tokens=np.concatenate([prompt, answer]),
        target=np.arange(len(prompt) + len(answer)) >= len(prompt),
        modality=np.concatenate([planned.modality[:-1], np.zeros(len(answer), np.int8)]),
    )


def test_an_answer_counts_exactly_if_greedy_decoding_gives_it(encoder, model):
    questions = []
    for document in prompts():
        [planned] = encoder.plan(document)
        right = [token for token, _ in decode(model, encoder, planned, NEW)]
        for place in range(NEW):
            wrong = [*right[:place], (right[place] + 1) % 256 + 20, *right[place + 1 :]]
            questions.append(Question(f"wrong at {place}", document, with_answer(planned, wrong)))
        questions.append(Question("right", document, with_answer(planned, right)))
    scores = AnswerScorer(encoder, questions, micro_batch_size=2)(model)
    assert scores["right"].questions == len(prompts())
    assert {task: score.exact for task, score in scores.items()} == {
        **{f"wrong at {place}": 0.0 for place in range(NEW)},
        "right": 1.0,
    }
    assert all(score.loss > scores["right"].loss for task, score in scores.items() if task != "right")


def test_every_read_token_has_its_slots(encoder, model):
    generated = generate(model, encoder, prompts()[1], NEW)
    [planned] = encoder.plan(prompts()[1])
    assert [part.token for part in generated.prompt] == planned.tokens[:-1].tolist()
    assert all(1 <= part.slots <= 3 for part in generated.prompt)
    assert [part.slots is None for part in generated.answer] == [False] * (NEW - 1) + [True]
    assert generated.text == encoder.vocabulary.decode([part.token for part in generated.answer])


def test_an_answer_without_text_says_why():
    blank = GeneratedToken(7, "", None)
    assert "the first token was <|im_end|>" in why_empty(Generated([], [], "", "<|im_end|>"))
    assert "none of its 1 tokens is text" in why_empty(Generated([], [blank], "", "<|im_end|>"))
    assert "--max-new-tokens" in why_empty(Generated([], [], ""))


def test_an_answer_names_the_token_that_ended_it(encoder, model):
    ends = {name: encoder.vocabulary.special[name] for name in STOPS}
    for seed in range(100):
        generated = generate(model, encoder, prompts()[0], NEW, temperature=50.0, seed=seed)
        assert len(generated.answer) == NEW if generated.stop is None else generated.stop in ends
        if generated.stop:
            return
    raise AssertionError("no seed ended an answer")


def test_sampling_repeats_with_its_seed_only(encoder, model):
    texts = [generate(model, encoder, prompts()[0], NEW, temperature=5.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_columns_that_are_no_token_are_never_chosen_and_cost_nothing(encoder, model):
    ids = sorted(encoder.vocabulary.ids())
    padding = sorted(set(range(model.language_model.vocab_size)) - set(ids))
    assert padding
    [planned] = encoder.plan(prompts()[0])
    right = [token for token, _ in decode(model, encoder, planned, NEW)]
    questions = [Question("right", prompts()[0], with_answer(planned, right))]
    before = AnswerScorer(encoder, questions, micro_batch_size=1)(model)["right"]
    with torch.no_grad():  # now a column of the padding is the most likely one wherever a token was
        weight = model.language_model.output_layer.weight
        weight[padding] = 2 * weight[ids].mean(0) + torch.randn(len(padding), weight.size(1))
        weight[padding[0]] = 3 * weight[right[0]]
    assert [token for token, _ in decode(model, encoder, planned, NEW)] == right
    generator = torch.Generator().manual_seed(0)
    sampled = [token for token, _ in decode(model, encoder, planned, 60, 5.0, generator)]
    assert set(sampled) <= set(ids)
    assert AnswerScorer(encoder, questions, micro_batch_size=1)(model)["right"] == before
    assert before.exact == 1


def test_what_does_not_fit_is_refused(encoder, model, tmp_path):
    [planned] = encoder.plan(prompts()[0])
    with pytest.raises(ValueError, match="exceed seq_length=160"):
        next(decode(model, encoder, planned, 150))
    with pytest.raises(SampleError, match="exceed the 160"):
        list(encoder.plan(prompt_document("sea " * 200, [])))
    with pytest.raises(ValueError, match="not one of the image formats"):
        media_file(tmp_path / "notes.txt", "image")
