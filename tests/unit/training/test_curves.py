import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_anyexperts.training.curve_names import grouped
from megatron_anyexperts.training.curves import Curves


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("loss", "loss/all"),
        ("loss_image", "loss/image"),
        ("lm loss", "loss/one_step"),
        ("mtp_2 loss", "loss/mtp_2"),
        ("lm loss validation", "loss_held_out/all"),
        ("audio loss validation", "loss_held_out/audio"),
        ("audio loss validation ppl", "loss_held_out/audio ppl"),
        ("load_balancing_loss", "loss_router/load_balancing"),
        ("lm loss vs samples", "vs_samples/lm loss"),
        ("grad-norm", "optimizer/grad-norm"),
        ("tokens_per_s", "speed/tokens_per_s"),
        ("world-size", "megatron/world-size"),
        ("slots/text", "slots/text"),
    ],
)
def test_each_curve_has_its_group(tag, name):
    assert grouped(tag) == name


@given(st.text(min_size=1, max_size=30))
def test_no_curve_is_without_a_group_and_none_gets_two(tag):
    assert "/" in grouped(tag) and grouped(grouped(tag)) == grouped(tag)


def test_the_text_tab_holds_the_configuration_and_nothing_else(tmp_path):
    curves = Curves(str(tmp_path), 10)
    curves.add_text("num_layers", "4", global_step=0)  # as Megatron does, 900 times
    curves.add_configuration("hidden-size: 128\n")
    curves.add_scalar("lm loss", 2.5, 3)
    curves.flush()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert read.Tags()["tensors"] == ["configuration/text_summary"]
    [event] = read.Tensors("configuration/text_summary")
    assert b"```yaml\nhidden-size: 128\n```" in event.tensor_proto.string_val[0]
    assert [(each.step, each.value) for each in read.Scalars("loss/one_step")] == [(3, 2.5)]
