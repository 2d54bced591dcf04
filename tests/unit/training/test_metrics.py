from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

from megatron_anyexperts.moe.metrics import record_tokens, token_modality
from megatron_anyexperts.training.flops import WORK
from megatron_anyexperts.training.metrics import TrainingMetrics, loss_layers
from megatron_anyexperts.training.step_stats import Interval, StepStats
from tests.unit.models.small import DYNAMIC, small_arguments, text_batch


@pytest.mark.parametrize(
    "pattern, repeated, layers",
    [
        ("*E*E", False, 2),
        ("*-*E|*E", False, 2),
        ("*E*E/*E", False, 3),
        ("*E*E/*E/*E", False, 4),
        ("*E*E/*E/*E", True, 3),
    ],
)
def test_a_router_loss_is_averaged_over_the_layers_that_record_it(pattern, repeated, layers):
    assert loss_layers(pattern, repeated) == layers


def test_throughput_counts_the_real_slots_that_were_computed(make_model):
    options = {"hybrid_layer_pattern": "*E*E"}
    model = make_model(options, **DYNAMIC)
    args = SimpleNamespace(**small_arguments(**options), log_interval=1, peak_tflops_per_gpu=4.0)
    metrics = TrainingMetrics(args, model.config, StepStats(), None, None)
    set_moe_metrics_tracker(metrics)
    batch = text_batch([12])
    with token_modality(torch.zeros(1, 12, dtype=torch.int8)), record_tokens() as layers:
        model(tokens=batch["tokens"], position_ids=batch["position_ids"])
    slots = sum(int(record.real_SB.sum()) for records in layers.values() for record in records)
    assert slots != 2 * 12 * model.config.moe_router_topk
    metrics.report(1.0, 1)
    work = dict.fromkeys(WORK, 0.0) | {"tokens": 12.0}
    interval = Interval({}, {}, seconds=0.5, data_wait=0.1, work=work, first_step_s=None)
    figures = metrics._throughput(interval)
    assert figures["tokens_per_s"] == 24 and figures["data_wait_share"] == 0.2
    assert figures["tflops_per_gpu"] == pytest.approx(metrics.flops.training(work, slots) / 0.5e12)
    assert figures["mfu"] == figures["tflops_per_gpu"] / 4
    # What the dispatch cap displaces is a real slot in the decision, and is not computed.
    metrics.snapshot()["load"]["displaced_share"] = 0.25
    fewer = metrics._throughput(interval)["tflops_per_gpu"]
    assert fewer == pytest.approx(metrics.flops.training(work, slots / 1.25) / 0.5e12)


def test_weights_and_biases_gets_losses_routing_and_speed(make_model, tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    model = make_model({"hybrid_layer_pattern": "*E*E"}, **DYNAMIC)
    args = SimpleNamespace(**small_arguments(hybrid_layer_pattern="*E*E"), log_interval=1, peak_tflops_per_gpu=None)
    stats = StepStats()
    metrics = TrainingMetrics(args, model.config, stats, None, None)
    set_moe_metrics_tracker(metrics)
    wandb.init(mode="offline", project="anyexperts", dir=tmp_path)
    batch = text_batch([12])
    with token_modality(torch.zeros(1, 12, dtype=torch.int8)):
        model(tokens=batch["tokens"], position_ids=batch["position_ids"])
    stats.add_losses(torch.tensor([[20.0, 10.0], [0, 0], [0, 0], [0, 0]]))
    metrics.report(1.0, 1, wandb_writer=wandb)
    wandb.finish()
    wandb.teardown()  # its own process writes the file
    [log] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    sent = (b"loss/all", b"loss/text", b"slots/text", b"load/rank_max_over_mean")
    assert [name for name in sent if name not in log.read_bytes()] == []
