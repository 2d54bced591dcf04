"""Hot experts computed on other ranks as well: the layer's outputs and gradients stay what they are without copies."""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from tests.multirank import run_ranks
from tests.unit.moe.builders import EXPERTS, HIDDEN
from tests.unit.moe.rank_cases import STATIC, build, initialize, wrap

ROUTED = STATIC | {"anyexperts_k_min": 2, "anyexperts_k_max": 2, "moe_router_topk": 2, "anyexperts_learn_alpha": False}
KEPT = {"anyexperts_copies_refresh": 2}
COPIES = {"anyexperts_balance": "copies", "anyexperts_copies_eps": 0.0, "anyexperts_copies_per_rank": 2}


@dataclass
class Case:
    """A layer and its tokens.

    Attributes:
        tokens: of each rank, repeated over the ranks; 0: one token of padding.
        hot: experts that every token prefers.
        options: of both configurations; `copies` of the one with copies.
        frozen: whether the experts are not trained.
        steps: microbatches whose gradients are added up.
    """

    tokens: list[int]
    hot: list[int]
    options: dict = field(default_factory=dict)
    copies: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    frozen: bool = False
    steps: int = 1


CASES = {
    "hot experts": Case([40], [0, 1]),
    "hot experts in fp32": Case([40], [0, 1], dtype=torch.float32),
    "hot experts in bf16": Case([40], [0, 1], dtype=torch.bfloat16),
    "burst": Case([200, 3], [3]),
    "an empty rank": Case([60, 0], [0, 1]),
    "no tokens at all": Case([0], [0]),
    "two microbatches": Case([40, 17], [0, 1], steps=2),
    "recomputed": Case([40], [0, 1], {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "frozen experts": Case([40], [0, 1], frozen=True),
    "few slots a copy": Case([40], [0, 1], copies={"anyexperts_copies_min_slots": 9}),
}


def _hidden(case: Case, rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [S, 1, H] and their padding mask [1, S]."""
    tokens = case.tokens[(rank + step) % len(case.tokens)]
    generator = torch.Generator().manual_seed(10 * rank + step)
    hidden = torch.randn(max(tokens, 1), 1, HIDDEN, generator=generator).to(case.dtype)
    return hidden, torch.full((1, len(hidden)), tokens == 0)


def _run(case: Case, rank: int, ranks: int, options: dict) -> tuple:
    """Outputs, gradients of the input and of all parameters, and what the dispatcher reported."""
    low = case.dtype == torch.bfloat16
    net = build(1, ranks, **ROUTED | case.options | options, params_dtype=case.dtype, bf16=low)
    with torch.no_grad():
        net.layer.router.expert_bias[case.hot] += 2
        for parameter in net.layer.experts.parameters():
            parameter.requires_grad_(not case.frozen)
    model, loads, dispatch = wrap(net, overlap_grad_reduce=True), [], net.layer.dispatcher.dispatch
    net.layer.dispatcher.dispatch = lambda *args: loads.append((sent := dispatch(*args)).load) or sent
    model.zero_grad_buffer()
    outputs, inputs = [], []
    for step in range(case.steps):
        hidden, padding = _hidden(case, rank, step)
        inputs.append(hidden.requires_grad_())
        outputs.append(model(hidden, padding))
        # Not reduced until the last microbatch, as Megatron's schedules do.
        with model.no_sync() if step < case.steps - 1 else torch.enable_grad():
            outputs[-1].float().square().sum().backward()
    model.finish_grad_sync()
    weights = {name: p.main_grad for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        evaluated = model.eval()(*_hidden(case, rank, 0))
    return outputs, [x.grad for x in inputs], weights, evaluated, loads


def _compare(rank: int, ranks: int, names: list[str]) -> dict[str, tuple[int, int]]:
    initialize(1, ranks)
    report = {}
    for name in names:
        case = CASES[name]
        plain = _run(case, rank, ranks, {})
        copied = _run(case, rank, ranks, COPIES | case.copies)
        again = _run(case, rank, ranks, COPIES | case.copies)
        # main_grad is fp32: gradients of fp64 and fp32 weights agree to its rounding, those of bf16 weights to theirs.
        close = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}[case.dtype]
        summed = 1e-2 if case.dtype == torch.bfloat16 else 2e-6
        for part, (a, b) in enumerate(zip(plain[:2], copied[:2], strict=True)):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(y, x, rtol=close, atol=close, msg=partial("{} {}: {}".format, name, part))
        torch.testing.assert_close(copied[3], plain[3], rtol=close, atol=close)
        assert copied[2].keys() == plain[2].keys() and bool(plain[2])
        for key, gradient in plain[2].items():
            scale = max(1.0, gradient.abs().max().item()) if gradient.numel() else 1.0
            torch.testing.assert_close(
                copied[2][key], gradient, rtol=summed, atol=summed * scale, msg=partial("{} {}: {}".format, name, key)
            )
            assert torch.equal(copied[2][key], again[2][key]), f"{name} {key}: not repeatable"
        loads = copied[4]
        for mine, theirs in zip(loads, plain[4], strict=True):
            assert torch.equal(mine.received_E, theirs.received_E) and not mine.rerouted and not mine.displaced
            assert torch.equal(mine.demanded_P, theirs.received_P) and mine.received_P.sum() == mine.demanded_P.sum()
        fullest = [int(load.received_P.max() - -(-load.received_P.sum() // ranks)) for load in loads]
        report[name] = (sum(int(load.copied) for load in loads), max(fullest))
    return report


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_without_copies_and_ranks_are_level(ranks):
    reports = run_ranks(_compare, ranks, list(CASES))
    assert all(report == reports[0] for report in reports)
    for name, (copied, over) in reports[0].items():
        if name == "no tokens at all":
            assert copied == 0
        else:
            assert copied > 0, f"{name}: no copy was made"
        kept = EXPERTS * (CASES[name].copies.get("anyexperts_copies_min_slots", 1) - 1)
        assert over <= kept, f"{name}: a rank is over the goal"


def _order(rank: int, ranks: int) -> list[str]:
    """What happens to the experts' gradients in a backward pass, in order."""
    initialize(1, ranks)
    layer, events = build(1, ranks, **ROUTED | COPIES, params_dtype=torch.float64).layer, []
    layer.router.expert_bias[:2] += 2
    layer.experts.register_full_backward_hook(lambda *_: events.append("own"))
    home = layer.copies.bring_home
    layer.copies.bring_home = lambda *args: events.append("copies") or home(*args)
    hidden, _ = _hidden(Case([40], [0, 1]), rank, 0)
    layer(hidden.requires_grad_())[0].sum().backward()
    return events


def test_gradients_of_copies_are_added_when_the_owner_has_written_its_own():
    # Fused GEMMs overwrite the buffer in the first microbatch of a step.
    assert run_ranks(_order, 2) == [["own", "copies"]] * 2


def _gathered(rank: int, ranks: int) -> list[bool]:
    """Whether each parameter of the rank's experts has been gathered when their weights are lent."""
    initialize(1, ranks)
    net = build(1, ranks, **ROUTED | COPIES)
    net.layer.router.expert_bias[:2] += 2
    model = wrap(net, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    copies, found = net.layer.copies, []
    groups, send = [model.param_to_bucket_group[parameter] for parameter in copies.own], copies.send

    def sent(*args):
        found.extend(group.param_gather_dispatched and group.param_gather_handle is None for group in groups)
        return send(*args)

    copies.send = sent
    model(*_hidden(Case([40], [0, 1], dtype=torch.float32), rank, 0))
    return found


def test_weights_are_lent_when_the_optimizer_has_handed_them_out():
    assert all(found and all(found) for found in run_ranks(_gathered, 2))


def _kept(rank: int, ranks: int) -> list[tuple[int, int]]:
    """Exchanges of weights, and slots that copies computed, of each of four steps of two microbatches."""
    initialize(1, ranks)
    nets = [build(1, ranks, **ROUTED | more) for more in ({}, COPIES | KEPT)]
    for net in nets:
        net.layer.router.expert_bias[:2] += 2
    models, copies, report = [wrap(net) for net in nets], nets[1].layer.copies, []
    counted, send, dispatch = [], copies.send, nets[1].layer.dispatcher.dispatch
    copies.send = lambda *args: counted.append("sent") or send(*args)
    loads = []
    nets[1].layer.dispatcher.dispatch = lambda *args: loads.append((sent := dispatch(*args)).load) or sent
    for step in range(4):
        outputs = []
        for model in models:
            model.zero_grad_buffer()
            for microbatch in range(2):
                outputs.append(model(*_hidden(Case([40, 64], [], dtype=torch.float32), rank, 2 * step + microbatch)))
                outputs[-1].square().sum().backward()
            model.finish_grad_sync()
        torch.testing.assert_close(outputs[2:], outputs[:2], rtol=1e-6, atol=1e-6)
        nets[1].layer.end_step()
        with torch.no_grad():
            for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
                torch.testing.assert_close(other.main_grad, one.main_grad, rtol=2e-6, atol=2e-5, msg=name)
                for parameter in (one, other):
                    parameter -= 1e-3 * parameter.main_grad
        report.append((len(counted), sum(int(load.copied) for load in loads)))
        counted.clear()
        loads.clear()
    return report


def test_weights_of_kept_copies_travel_once_a_step():
    report = run_ranks(_kept, 2)
    assert report[0] == report[1] and all(copied > 0 for _, copied in report[0])
    # Without places at first: forward and backward of each microbatch.
    assert [sent for sent, _ in report[0]] == [4, 1, 1, 1]


def _with_cap(rank: int, ranks: int) -> tuple[int, int, int, int]:
    initialize(1, ranks)
    # The rank that nobody prefers can hold one copy, and no expert has as many slots as it could compute.
    case = Case([64], [0, 1, 2, 3, 4, 5])
    few = COPIES | {"anyexperts_copies_per_rank": 1, "anyexperts_dispatch_eps": 0.0}
    *_, loads = _run(case, rank, ranks, few)
    load = loads[0]
    assert load.received_P.max() <= load.cap and load.received_P.sum() + load.displaced == load.demanded_P.sum()
    alone = _run(case, rank, ranks, {"anyexperts_dispatch_eps": 0.0})[4][0]
    return int(load.copied), int(load.rerouted), int(alone.rerouted), int(load.displaced)


def test_the_cap_takes_what_copies_leave_over():
    for copied, rerouted, alone, displaced in run_ranks(_with_cap, 4):
        assert copied > 0 and 0 < rerouted < alone and displaced == 0
