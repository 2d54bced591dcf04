"""The trace of an evaluation: the questions that count, with their tasks."""

from types import SimpleNamespace

import pandas as pd
import pytest

from megatron_anyexperts.evaluation import routing_trace
from megatron_anyexperts.evaluation.answers import AnswerScorer, Question
from megatron_anyexperts.training.arguments import UsageError
from tests.unit.evaluation.test_generation import prompts, with_answer


@pytest.fixture
def args(model, monkeypatch):
    """What `evaluation_tracer` reads of Megatron's arguments."""
    monkeypatch.setattr(routing_trace, "transformer_config", lambda _: model.config)
    return SimpleNamespace(anyexperts_stock_moe=False, anyexperts_trace_megabytes=1, rank=0, iteration=12)


def test_answers_are_traced_by_task(encoder, model, args, tmp_path):
    questions = []
    for number, document in enumerate(prompts()):
        [planned] = encoder.plan(document)
        questions.append(Question(f"task {number % 2}", document, with_answer(planned, [30, 31])))
    scorer = AnswerScorer(encoder, questions, micro_batch_size=1)
    folder = tmp_path / "answers"
    with routing_trace.evaluation_tracer(args, folder, None) as tracer:
        traced = scorer(model, tracer)
    assert traced == scorer(model)
    table = pd.read_parquet(folder / "routing").merge(pd.read_parquet(folder / "tokens"))
    tokens = {question.task: 0 for question in questions}
    for question in questions:
        tokens[question.task] += len(question.planned.tokens) - 1
    assert table.groupby("task", observed=True).size().to_dict() == {name: 2 * count for name, count in tokens.items()}
    assert set(table.modality) == {"text", "image", "audio"} and set(table.step) == {12}
    with (
        pytest.raises(UsageError, match="there is a routing trace in"),
        routing_trace.evaluation_tracer(args, folder, None),
    ):
        pass


def test_without_a_folder_there_is_no_trace(args):
    with routing_trace.evaluation_tracer(args, None, None) as tracer:
        assert tracer is None
