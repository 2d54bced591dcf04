"""A bare assertion of Megatron becomes its condition and the values that break it."""

from types import SimpleNamespace

import pytest

from megatron_anyexperts.checks import doctor
from megatron_anyexperts.training.usage import reason


def test_an_error_that_says_something_says_it():
    assert reason(ValueError("as it is")) == "as it is" and reason(KeyError()) == "KeyError"


def test_the_values_of_the_flags_are_named():
    arguments = SimpleNamespace(min_lr=3e-5, lr=2e-5)
    code = compile("def validate(args):\n    if args.min_lr > args.lr: raise AssertionError", __file__, "exec")
    scope: dict = {}
    exec(code, scope)
    with pytest.raises(AssertionError) as caught:
        scope["validate"](arguments)
    assert reason(caught.value).startswith("Megatron requires ")


def test_a_learning_rate_below_its_minimum_is_explained(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = doctor.parse_config(["--config", "ling_mini_2_0_anyexperts", "--lr", "2e-5"])
    refusal = doctor.refused_by_training(args, 64, complete=True)
    assert refusal.endswith("Megatron requires args.min_lr <= args.lr (here --min-lr 3e-05, --lr 2e-05)")
