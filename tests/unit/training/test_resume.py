"""A run that has checkpoints of its own continues them, whatever its command says of the first start."""

from argparse import Namespace

import pytest

from megatron_anyexperts.training import resume


@pytest.mark.parametrize(
    "given",
    [
        {"finetune": True},
        {"load": "elsewhere"},
        {"load": "elsewhere", "finetune": True},
        {"load": "elsewhere", "ckpt_step": 2, "no_load_rng": True, "no_load_optim": True},
    ],
    ids=lambda given: " ".join(given),
)
def test_flags_of_the_first_start_are_named_and_do_nothing_later(world, tmp_path, given):
    plain = {"save": str(tmp_path), "load": str(tmp_path), "finetune": False, "ckpt_step": None}
    plain |= {"no_load_optim": False, "no_load_rng": False}
    args = Namespace(**plain | given)
    notes = resume.go_on(args, 5)
    assert vars(args) == plain
    assert {note.split()[0] for note in notes} == {f"--{name.replace('_', '-')}" for name in given}
