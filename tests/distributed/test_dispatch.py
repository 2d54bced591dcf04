"""SlotDispatcher on real expert-parallel ranks: exact without a cap, within the cap with one."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_anyexperts.moe.cap import fit_sources
from tests.distributed.dispatch_cases import config, dense, expert_weights, make_case, make_dispatcher, run_experts
from tests.multirank import run_ranks

EXPERTS, K_MAX = 8, 3


def _init(world_size: int, expert_tp: int = 1) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=expert_tp,
        expert_model_parallel_size=world_size // expert_tp,
        expert_tensor_parallel_size=expert_tp,
    )


def _check_step(rank: int, dispatcher, eps: float | None, tokens: list[int], skew: float) -> torch.Tensor:
    """One forward and backward pass against every expert on every token; all ranks' tokens are known by their seeds."""
    mine = make_case(rank, tokens[rank], EXPERTS, K_MAX, skew)
    weights = expert_weights(EXPERTS)
    local, full = weights[dispatcher.local].clone().requires_grad_(), weights.clone().requires_grad_()
    sent = dispatcher.dispatch(mine.hidden, mine.decision)
    # An expert-tensor rank computes its share of the expert's output, here an equal part of the sum.
    output = dispatcher.combine(run_experts(sent, local) / dispatcher.tp_size, sent)
    loss = output.square().sum()
    if sent.displaced_gate_T is not None:
        output = output + sent.displaced_gate_T[:, None] * mine.hidden
        loss = output.square().sum()
    loss.backward()

    cases = [make_case(source, n, EXPERTS, K_MAX, skew) for source, n in enumerate(tokens)]
    demand = torch.stack([case.decision.routing_map_TE.sum(0) for case in cases])
    demand_SP = demand.view(len(tokens), dispatcher.ep_size, -1).sum(2)
    fitted = [case.decision for case in cases]
    if eps is not None:
        fitted = fit_sources(fitted, dispatcher.ep_size, K_MAX, eps).fitted
    expected = [dense(case.hidden, fit.gates_TE, full) for case, fit in zip(cases, fitted, strict=True)]
    if eps is not None:
        virtual = [0.0 if fit.displaced_gate_T is None else fit.displaced_gate_T[:, None] for fit in fitted]
        expected = [y + v * case.hidden for y, v, case in zip(expected, virtual, cases, strict=True)]
    sum(y.square().sum() for y in expected).backward()

    torch.testing.assert_close(output, expected[rank])
    torch.testing.assert_close(mine.hidden.grad, cases[rank].hidden.grad)
    torch.testing.assert_close(mine.logits.grad, cases[rank].logits.grad)
    torch.testing.assert_close(local.grad * dispatcher.tp_size, full.grad[dispatcher.local], rtol=2e-5, atol=2e-5)

    load, received_E = sent.load, sum(fit.routing_map_TE.sum(0) for fit in fitted)
    assert torch.equal(load.demanded_P, demand_SP.sum(0))
    assert torch.equal(load.received_E, received_E)
    assert torch.equal(load.received_P, received_E.view(dispatcher.ep_size, -1).sum(1))
    assert torch.equal(sent.tokens_per_expert, received_E[dispatcher.local])
    assert load.received_P.sum() + load.displaced == load.demanded_P.sum()
    if eps is None:
        assert load.cap is None and not load.rerouted and not load.displaced
    else:
        assert load.received_P.max() <= load.cap
    return torch.stack([load.demanded_P.max(), load.received_P.max(), load.rerouted, load.displaced])


def _steps(rank: int, world_size: int, expert_tp: int, steps: list) -> list:
    _init(world_size, expert_tp)
    return [
        _check_step(
            rank, make_dispatcher(config(EXPERTS, K_MAX, anyexperts_dispatch_eps=eps)), eps, tokens, skew
        ).tolist()
        for eps, tokens, skew in steps
    ]


@pytest.mark.parametrize(
    ("world_size", "expert_tp", "tokens_per_rank"),
    [
        (2, 1, [[13, 13], [0, 9]]),
        (4, 1, [[17, 17, 17, 17], [17, 0, 12, 1]]),
        (4, 2, [[17, 17, 17, 17], [17, 0, 12, 1]]),
    ],
)
def test_output_gradients_and_counts_equal_a_dense_reference_with_and_without_cap(
    world_size, expert_tp, tokens_per_rank
):
    steps = [(eps, tokens, skew) for tokens in tokens_per_rank for skew in (0.0, 6.0) for eps in (None, 0.0, 0.05)]
    results = run_ranks(_steps, world_size, expert_tp, steps)
    assert all(result == results[0] for result in results)
    acted = [rerouted > 0 for _, _, rerouted, _ in results[0]]
    assert any(acted), "no step was skewed enough to be rerouted"


def _against_stock(rank: int, world_size: int) -> None:
    _init(world_size)
    cfg = config(EXPERTS, K_MAX)
    dispatcher = make_dispatcher(cfg)
    case = make_case(rank, 12, EXPERTS, K_MAX)
    # Equal slots for every token: the stock dispatcher sizes its buffers as tokens x top-k.
    chosen = case.logits.detach().topk(K_MAX, dim=1).indices
    routed = torch.zeros(12, EXPERTS, dtype=torch.bool).scatter(1, chosen, True)
    gates = torch.sigmoid(case.logits) * routed
    decision = case.decision.__class__(gates, routed, None, case.decision.importance_T, None, None)
    weights = expert_weights(EXPERTS)[dispatcher.local]
    ours = dispatcher.dispatch(case.hidden, decision)
    output = dispatcher.combine(run_experts(ours, weights), ours)
    ours_grads = torch.autograd.grad(output.square().sum(), (case.hidden, case.logits), retain_graph=True)

    stock = MoEAlltoAllTokenDispatcher(
        dispatcher.num_local_experts,
        list(range(EXPERTS))[dispatcher.local],
        cfg,
        type(
            "Groups", (), {"ep": dispatcher.ep_group, "expt_tp": dispatcher.tp_group, "tp_ep": dispatcher.tp_ep_group}
        ),
    )
    slots, probs = stock.dispatch_preprocess(case.hidden, routed, gates)
    # Only on a GPU does the stock class turn these into lists before it uses them.
    stock.input_splits, stock.output_splits = list(stock.input_splits), list(stock.output_splits)
    slots, tokens_per_expert, probs = stock.dispatch_postprocess(*stock.token_dispatch(slots, probs))
    assert torch.equal(slots, ours.expert_input) and torch.equal(probs, ours.expert_probs)
    assert torch.equal(tokens_per_expert, ours.tokens_per_expert)
    received = type(
        "Received",
        (),
        {"expert_input": slots, "tokens_per_expert": tokens_per_expert, "expert_probs": probs},
    )
    expected = stock.combine_postprocess(stock.token_combine(stock.combine_preprocess(run_experts(received, weights))))
    assert torch.equal(output, expected)
    expected_grads = torch.autograd.grad(expected.square().sum(), (case.hidden, case.logits))
    assert all(torch.equal(a, b) for a, b in zip(ours_grads, expected_grads, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_static_slots_are_bit_equal_to_the_stock_dispatcher(world_size):
    run_ranks(_against_stock, world_size)
