import json
import math

import pytest
import torch
from megatron.core.transformer.moe import moe_logging

from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.moe.metrics import RoutingTracker, install_metrics, record_tokens, token_modality
from megatron_anyexperts.moe.summary import quantiles
from tests.unit.moe.builders import HIDDEN, config, layer

DYNAMIC = {"anyexperts_k_min": 2, "anyexperts_k_max": 6, "anyexperts_rho_max": 0.35, "moe_z_loss_coeff": 0.01}
KINDS = torch.tensor([[0] * 6 + [1] * 4 + [-1] * 2, [2] * 12], dtype=torch.int8)  # [B, S]
EMPTY = {"layers": {}, "nonfinite_tokens": 0}


class Writer:
    """Collects what TensorBoard would get."""

    def __init__(self):
        self.values, self.histograms = {}, {}

    def add_scalar(self, name, value, step):
        self.values[name] = float(value)

    def add_histogram_raw(self, tag, **fields):
        self.histograms[tag] = fields


@pytest.fixture(params=["off", "on"], ids=["operators", "kernel"])
def setup(one_rank, request):
    losses = {"anyexperts_spread_loss_coeff": 0.1, "anyexperts_spread_target": 0.5}
    cfg = config(**DYNAMIC, **losses, anyexperts_kernels=request.param)
    built = layer(cfg)
    built.importance.down.data.normal_()
    tracker = install_metrics(cfg, MODALITIES)
    yield built, tracker
    moe_logging.destroy_moe_metrics_tracker()


def forward(built, hidden=None):
    hidden = torch.randn(12, 2, HIDDEN, requires_grad=True) if hidden is None else hidden
    with token_modality(KINDS), record_tokens() as records:
        output = built(hidden)[0]
    return output, records[1]


def forward_of(built):
    with token_modality(KINDS):
        return built(torch.randn(12, 2, HIDDEN, requires_grad=True))[0]


def test_breakdown_equals_a_count_by_hand(setup):
    built, tracker = setup
    records = [forward(built)[1][0] for _ in range(2)]
    summary = tracker.collect("train")
    kinds = KINDS.t()
    for code, name in ((0, "text"), (1, "image"), (2, "audio")):
        chosen = kinds == code
        slots = torch.cat([record.slots_SB[chosen] for record in records]).double()
        real = torch.cat([record.real_SB[chosen] for record in records]).double()
        w = torch.cat([record.importance_SB[chosen] for record in records]).double()
        figures = summary[name]
        assert figures["tokens"] == len(slots)
        assert figures["slots"] == pytest.approx(slots.mean().item())
        assert figures["real"] == pytest.approx(real.mean().item())
        assert figures["virtual"] == pytest.approx((slots - real).mean().item())
        assert figures["importance"] == pytest.approx(w.mean().item(), rel=1e-5)
        assert figures["importance_std"] == pytest.approx(w.std(correction=0).item(), rel=1e-3, abs=1e-5)
        assert figures["slots_histogram"] == slots.long().bincount(minlength=7).tolist()
        assert figures["real_histogram"] == real.long().bincount(minlength=7).tolist()
    assert "video" not in summary
    assert summary["all"]["tokens"] == 2 * 22
    assert summary["layers"][1]["all"] == summary["all"]
    assert list(summary["layers"]) == [1]
    json.dumps(summary)


def test_collecting_clears(setup):
    built, tracker = setup
    forward(built)
    tracker.collect("train")
    assert tracker.collect("train") == EMPTY


def test_evaluation_has_a_tally_of_its_own(setup):
    built, tracker = setup
    built.eval()
    forward(built)
    assert tracker.collect("train") == EMPTY
    assert tracker.collect("eval")["all"]["tokens"] == 22


def test_outside_the_context_nothing_is_recorded(setup):
    built, tracker = setup
    built(torch.randn(12, 2, HIDDEN))
    assert tracker.collect("train") == EMPTY


def test_recomputation_records_once(setup):
    built, tracker = setup
    hidden = torch.randn(12, 2, HIDDEN, requires_grad=True)
    with token_modality(KINDS):
        output = torch.utils.checkpoint.checkpoint(lambda x: built(x)[0], hidden, use_reentrant=True)
    output.sum().backward()
    assert tracker.collect("train")["all"]["tokens"] == 22


def test_report_logs_losses_breakdown_and_distribution(setup):
    built, tracker = setup
    forward(built)[0].sum().backward()
    writer, totals = Writer(), {}
    line = tracker.report(
        1.0, 7, writer, per_layer_logging=True, force_initialize=True, track_names=["z_loss"], num_layers=1,
        total_loss_dict=totals,
    )  # fmt: skip
    assert "text: slots" in line and "rank load max/mean: 1.000" in line
    assert totals["z_loss"] > 0 and totals["importance_spread_loss"] > 0
    assert writer.values["slots/text"] == tracker.snapshot()["text"]["slots"]
    assert writer.values["layer_1/real/image"] == tracker.snapshot()["layers"][1]["image"]["real"]
    assert writer.histograms["slots_distribution/audio"]["num"] == 12
    assert all(math.isfinite(value) for value in writer.values.values())


def test_an_interval_is_reported_once_and_whole(setup):
    built, tracker = setup
    tracker.log_interval = 3
    lines = []
    for iteration in range(1, 4):
        for _ in range(iteration):
            forward(built)
        lines.append(tracker.report(1.0, iteration, writer := Writer(), num_layers=1))
        assert ("slots/text" in writer.values) == (iteration == 3)
    assert ["text: slots" in line for line in lines] == [False, False, True]
    assert tracker.snapshot()["all"]["tokens"] == (1 + 2 + 3) * 22


def test_tokens_that_are_not_finite_are_one_figure_and_in_no_other(setup):
    built, tracker = setup
    hidden = torch.randn(12, 2, HIDDEN)
    hidden[3, 0, 0], hidden[5, 1, 2], hidden[11, 0, 1] = math.nan, math.inf, math.nan  # the last one is padding
    forward(built, hidden)
    line = tracker.report(1.0, 1, writer := Writer(), num_layers=1)
    assert tracker.snapshot()["nonfinite_tokens"] == writer.values["load/nonfinite_tokens"] == 2
    assert "tokens that are NaN or Inf, without experts: 2 |" in line
    assert tracker.snapshot()["all"]["tokens"] == 20
    assert 2 <= tracker.snapshot()["all"]["slots"] <= 6
    assert all(math.isfinite(value) for value in writer.values.values())


def test_a_layer_without_a_number_has_no_figures(setup):
    _, tracker = setup
    built = layer(config(**DYNAMIC, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1))
    built.layer_number = built.router.layer_number = None
    assert forward_of(built).shape == (12, 2, HIDDEN)
    assert tracker.collect("train") == EMPTY


def test_a_rank_without_mixture_layers_reduces_the_same_shapes(one_rank):
    tracker = RoutingTracker(config(**DYNAMIC, num_layers=5), MODALITIES)
    tracker.ensure_initialized("z_loss", 1)
    assert tracker.metrics["z_loss"].values.shape == (5,)


def test_token_records_do_not_depend_on_later_tokens(setup):
    built, _ = setup
    built.eval()
    hidden = torch.randn(12, 2, HIDDEN)
    changed = hidden.clone()
    changed[8:] += 1
    first, second = forward(built, hidden)[1][0], forward(built, changed)[1][0]
    for name in ("importance_SB", "slots_SB", "real_SB"):
        assert torch.equal(getattr(first, name)[:8], getattr(second, name)[:8])
        assert getattr(first, name).shape == (12, 2)


def test_quantiles_of_a_histogram():
    assert quantiles([0, 0, 1, 8, 1]) == [2, 3, 3]
    assert quantiles([0, 10]) == [1, 1, 1]
