from types import SimpleNamespace

import pytest

from megatron_anyexperts.training import batch_sizes


def arguments(**changes) -> SimpleNamespace:
    defaults = {
        "rampup_batch_size": None, "step_batch_size_schedule": None, "train_iters": None, "train_samples": 64,
        "global_batch_size": 8, "eval_global_batch_size": 8, "micro_batch_size": 2, "data_streams": 4,
        "seq_length": 128,
    }  # fmt: skip
    return SimpleNamespace(**defaults | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rampup_batch_size": [8, 8, 64]}, "--rampup-batch-size 8 8 64: .* --step-batch-size-schedule"),
        ({"global_batch_size": 12}, "global_batch_size=12 .* = 8; use 8 or 16"),
        ({"step_batch_size_schedule": "0:8 1K:16", "train_iters": 9}, "--train-iters=9.*--train-samples"),
        ({"step_batch_size_schedule": "0:8 1K:16 1M:20"}, "0:8 1K:16 1M:20.*=20 is not .* = 8; use 16 or 24"),
        ({"step_batch_size_schedule": "0:4 1K:16"}, "=4 is not a multiple .* = 8; use 8"),
        ({"step_batch_size_schedule": "0:16 1K:8"}, "a batch of 8 follows one of 16"),
    ],
)
def test_what_would_be_ignored_or_end_training_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batch_sizes.check(arguments(**changes))


def test_with_a_schedule_the_held_out_set_does_not_depend_on_the_ranks():
    for ranks in (1, 2, 4):
        derived = 2 * ranks
        args = arguments(
            step_batch_size_schedule="0:8 1K:24", global_batch_size=derived, eval_global_batch_size=derived
        )
        batch_sizes.check(args)
        assert args.eval_global_batch_size == 24
