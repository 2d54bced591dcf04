"""Standard errors of held-out losses count documents, not tokens."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.evaluation.losses import loss_of


def test_known_answer():
    loss = loss_of([(2.0, 1.0), (4.0, 1.0), (6.0, 1.0)])
    assert (loss.mean, loss.documents, loss.targets) == (4.0, 3, 3)
    assert loss.error == pytest.approx(np.std([2, 4, 6], ddof=1) / math.sqrt(3))
    assert math.isnan(loss_of([(2.0, 1.0)]).error)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=2, max_size=40))
def test_twice_the_same_documents_have_the_same_mean_and_less_error(documents):
    once, twice = loss_of(documents), loss_of(documents * 2)
    assert twice.mean == pytest.approx(once.mean)
    count = len(documents)
    assert twice.error == pytest.approx(once.error * math.sqrt((count - 1) / (2 * count - 1)), abs=1e-9)


def test_the_error_is_the_spread_of_the_mean_over_samples_of_documents():
    rng = np.random.default_rng(0)
    errors, means = [], []
    for _ in range(400):
        targets = rng.integers(5, 100, 200)
        documents = [(float(n * rng.normal(3, 0.5)), float(n)) for n in targets]
        loss = loss_of(documents)
        errors.append(loss.error)
        means.append(loss.mean)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.12)
