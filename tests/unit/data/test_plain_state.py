"""Stream states survive JSON exactly, and JSON is all that is ever read."""

import json
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRng
from megatron.energon.savable_loader import SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

from megatron_anyexperts.data import plain_state

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
SLICES = st.builds(SliceState, index=st.integers(), current=st.integers())
TREES = st.recursive(
    SCALARS | SLICES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.text(), inner).map(FlexState)
    ),
)


def same(a, b) -> bool:
    """Equal in type and value at every depth, which `==` alone does not say (True == 1, FlexState() == {})."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@given(TREES)
def test_any_state_comes_back_as_it_was(state):
    assert same(plain_state.loads(plain_state.dumps(state)), state)


def test_generators_continue_where_they_were():
    SystemRng.seed(5)
    random.gauss(0, 1)  # leaves a second value in Python's generator
    dataset = FlexState(datasets=[SliceState(index=1, current=2)])
    state = SavableDatasetState(rng=SystemRng.save_state(), dataset_state=dataset, sample_index=9)
    text = plain_state.dumps(SavableDatasetCheckpoint(state=state, offset=3))
    expected = random.gauss(0, 1), random.random(), np.random.rand(4).tolist(), torch.rand(4).tolist()
    SystemRng.seed(6)
    back = plain_state.loads(text)
    SystemRng.restore_state(back.state.rng)
    assert (random.gauss(0, 1), random.random(), np.random.rand(4).tolist(), torch.rand(4).tolist()) == expected
    assert (back.offset, back.state.sample_index, back.state.dataset_state) == (3, 9, dataset)


@pytest.mark.parametrize("value", [{1: 2}, {1, 2}, object(), np.array([None]), [FlexState(a=[{}, 2j])]])
def test_what_has_no_plain_form_is_refused_with_its_place_when_it_is_saved(value):
    with pytest.raises(TypeError, match="state"):
        plain_state.dumps(value)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


CRAFTED = [
    pickle.dumps(Bomb()),
    b"",
    b"{",
    b'{"os.system": {"command": "true"}}',
    b'{"SliceState": {"index": 1}}',
    b'{"SliceState": {"index": 1, "current": 2, "more": 3}}',
    b'{"tensor": {"dtype": "object", "shape": [1], "data": ""}}',
    b'{"array": {"dtype": "uint8", "shape": [9], "data": ""}}',
    b'{"tuple": [], "list": []}',
    b'{"bytes": "?"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("text", CRAFTED)
def test_crafted_states_are_refused_and_run_nothing(text):
    with pytest.raises(ValueError, match="no stream state"):
        plain_state.loads(text)


@given(
    st.recursive(
        SCALARS.filter(lambda x: not isinstance(x, bytes)), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_gives_a_state_or_a_value_error(document):
    try:
        plain_state.loads(json.dumps(document).encode())
    except ValueError as error:
        assert "no stream state" in str(error)
