"""Every flag is classed once, and what differs from a checkpoint is refused or named by its flag."""

import argparse
import json
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_anyexperts.data.tokenizer import adopt_tokenizer, train_tokenizer
from megatron_anyexperts.training import comparison, identity
from megatron_anyexperts.training.arguments import UsageError, add_arguments
from megatron_anyexperts.training.flag_classes import EXECUTION_GROUPS, KINDS, TABLE, Kind
from megatron_anyexperts.training.identity import Difference


def groups() -> dict[str, set[str]]:
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}


def test_every_flag_that_can_matter_is_classed_exactly_once():
    listed = Counter(name for _, _, names in TABLE for name in names.split())
    assert [name for name, count in listed.items() if count > 1] == []
    matter = {name for title, names in groups().items() if title not in EXECUTION_GROUPS for name in names}
    matter |= {field.name for field in fields(TransformerConfig)} & set().union(*groups().values())
    assert matter - listed.keys() == set(), "class these in training/flag_classes.py"
    assert listed.keys() - set().union(*groups().values()) == set(), "no such flags"
    assert groups().keys() >= EXECUTION_GROUPS


some_settings = st.dictionaries(st.sampled_from(sorted(KINDS)), st.none() | st.integers(0, 2) | st.booleans())


@given(some_settings, some_settings)
def test_differences_are_those_of_shared_flags(saved, now):
    found = identity.differences(saved, now)
    assert len({each.name for each in found}) == len(found)
    for name in saved.keys() & now.keys():
        differs = saved[name] != now[name] and KINDS[name] is not Kind.EXECUTION
        assert differs == (Difference(name, saved[name], now[name]) in found)
    assert identity.differences(saved, saved) == []


@given(some_settings, some_settings, st.sets(st.sampled_from(sorted(KINDS))), st.booleans(), st.booleans())
def test_what_is_refused_depends_on_the_class_alone(saved, now, accepted, resumed, change_schedule):
    found = identity.differences(saved, now)
    wrong = identity.refused(found, resumed, accepted, change_schedule)
    for each in found:
        expected = {
            Kind.SHAPES: True,
            Kind.MEANING: each.name not in accepted,
            Kind.DIALS: False,
            Kind.SCHEDULE: resumed and not change_schedule,
            Kind.STATE: resumed,
        }[each.kind]
        assert (each in wrong) == expected


@pytest.mark.parametrize(
    "difference, said",
    [
        (Difference("hidden_size", 128, 96), "--hidden-size 128 in the checkpoint, 96 now"),
        (
            Difference("moe_router_enable_expert_bias", True, False),
            "--moe-router-enable-expert-bias given in the checkpoint, not given now",
        ),
        (Difference("add_bias_linear", True, False), "--disable-bias-linear not given in the checkpoint, given now"),
        (Difference("n_mels", 80, 128), "--audio-n-mels 80 in the checkpoint, 128 now"),
        (
            Difference("anyexperts_target_slots", None, 2.5),
            "--anyexperts-target-slots not given in the checkpoint, 2.5 now",
        ),
        (Difference("tokenizer_model", "ab", "cd"), "--tokenizer-model of content ab in the checkpoint, cd now"),
    ],
)
def test_differences_are_named_by_flag(difference, said):
    assert identity.describe(difference) == said


def test_names_to_accept_are_those_of_flags_with_meaning():
    assert identity.acceptable(["rotary-base", "--norm-epsilon"]) == {"rotary_base", "layernorm_epsilon"}
    for name, why in (("rotary-bse", "no such flag"), ("hidden-size", "shapes"), ("log-interval", "execution")):
        with pytest.raises(UsageError, match=f"--accept-change {name}: .*{why}"):
            identity.acceptable([name])


def test_equal_tokenizers_are_equal_wherever_they_lie(tmp_path):
    first, moved, other = (tmp_path / name for name in ("first", "elsewhere/moved", "other"))
    train_tokenizer(["red boats sail over the wide blue sea"] * 3, 300, first)
    train_tokenizer(["old birds sing while two red boats sail"] * 3, 300, other)
    adopt_tokenizer(first, moved)
    content = json.loads((moved / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 7, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (moved / "tokenizer.json").write_text(json.dumps(content))
    assert identity.tokenizer_fingerprint(str(first)) == identity.tokenizer_fingerprint(str(moved))
    assert identity.tokenizer_fingerprint(str(first)) != identity.tokenizer_fingerprint(str(other))
    assert identity.tokenizer_fingerprint(None) is None


def test_flags_of_a_converted_model_are_settings():
    flags = {"hidden-size": 64, "rotary-base": 600_000, "norm-epsilon": 1e-6, "disable-bias-linear": True}
    idle = {"max-position-embeddings": 4096, "position-embedding-type": "rope", "log-interval": 5}
    assert identity.of_flags(flags | idle) == {
        "hidden_size": 64, "rotary_base": 600_000, "layernorm_epsilon": 1e-6, "add_bias_linear": False,
        "position_embedding_type": "rope",
    }  # fmt: skip


def test_what_acts_on_nothing_is_no_difference():
    silent, seeing = ({"vision_num_layers": layers, "vision_hidden_size": 8} for layers in (0, 1))
    assert identity._plain(silent) == {"vision_num_layers": 0}
    assert identity._plain(seeing) == seeing
    learned = {"anyexperts_learn_alpha": True, "anyexperts_alpha": 0.2}
    assert identity._plain(learned) == {"anyexperts_learn_alpha": True}
    growing = {"step_batch_size_schedule": "0:2 1K:4", "global_batch_size": 1}
    assert identity._plain(growing) == {"step_batch_size_schedule": "0:2 1K:4"}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint folder that says what it was saved with, and the arguments of a run that names it."""
    folder = tmp_path / "checkpoints/iter_0000004"
    values = {"hidden_size": 32, "rotary_base": 10000, "lr": 0.1, "seed": 1, "hidden_dropout": 0.0, "train_iters": 9}
    identity.write(folder, values)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("4")
    args = SimpleNamespace(
        save=None, load=str(folder.parent), finetune=False, ckpt_step=None, pretrained_checkpoint=None,
        accept_change=[], change_schedule=False, override_opt_param_scheduler=False, train_iters=9,
    )  # fmt: skip
    return folder, values, args


def test_the_weights_alone_may_be_trained_in_another_way(saved):
    folder, values, args = saved
    args.finetune = True
    start = comparison.starting_point(args)
    assert (start.folder, start.resumed) == (folder, False)
    other = values | {"lr": 0.2, "seed": 2, "hidden_dropout": 0.1}
    assert "--hidden-dropout 0.0 in the checkpoint, 0.1 now" in str(comparison.compare(args, other, start))
    with pytest.raises(UsageError, match=r"--rotary-base 10000 .* 500 now .*--accept-change rotary-base"):
        comparison.compare(args, values | {"rotary_base": 500}, start)


def test_a_run_that_is_further_than_its_new_length_is_refused(saved):
    _, values, args = saved
    args.train_iters, args.change_schedule = 3, True
    with pytest.raises(UsageError, match="--train-iters 3: .*1 iterations further; use 4 or more"):
        comparison.compare(args, values | {"train_iters": 3}, comparison.starting_point(args))


def test_a_checkpoint_without_settings_is_loaded_and_said_to_be_unchecked(saved):
    folder, values, args = saved
    (folder / identity.FILE).unlink()
    start = comparison.starting_point(args)
    assert "not checked" in str(comparison.compare(args, values, start))
    (folder / identity.FILE).write_text("{}")
    with pytest.raises(UsageError, match=r"identity\.json holds no settings"):
        comparison.compare(args, values, start)
