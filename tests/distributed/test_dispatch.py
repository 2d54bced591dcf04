"""SlotDispatcher on real expert-parallel ranks: exact without a cap, within the cap with one."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from tests.distributed.dispatch_cases import (
    config,
    dense,
    expert_weights,
    make_case,
    make_dispatcher,
    run_experts,
)
from tests.multirank import run_ranks

EXPERTS, K_MAX = 8, 3


def _init(world_size: int, expert_tp: int = 1) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=expert_tp,
        expert_model_parallel_size=world_size // expert_tp,
        expert_tensor_parallel_size=expert_tp,
    )


def _local(weights, dispatcher):
    return weights[dispatcher.local].clone().requires_grad_()


def _against_dense(rank: int, world_size: int, tokens_per_rank: list[int]) -> None:
    _init(world_size)
    dispatcher = make_dispatcher(config(EXPERTS, K_MAX))
    weights = expert_weights(EXPERTS)
    cases = [make_case(seed, tokens, EXPERTS, K_MAX) for seed, tokens in enumerate(tokens_per_rank)]
    mine, local = cases[rank], _local(weights, dispatcher)
    dispatched = dispatcher.dispatch(mine.hidden, mine.decision)
    output = dispatcher.combine(run_experts(dispatched, local), dispatched)
    output.square().sum().backward()

    counts = [case.decision.routing_map_TE.sum(0) for case in cases]
    torch.testing.assert_close(dispatched.load.received_E, sum(counts))
    torch.testing.assert_close(dispatched.tokens_per_expert, sum(counts)[dispatcher.local])
    full = weights.clone().requires_grad_()
    expected = [make_case(seed, tokens, EXPERTS, K_MAX) for seed, tokens in enumerate(tokens_per_rank)]
    outputs = [dense(case.hidden, case.decision.gates_TE, full) for case in expected]
    sum(x.square().sum() for x in outputs).backward()
    torch.testing.assert_close(output, outputs[rank])
    torch.testing.assert_close(mine.hidden.grad, expected[rank].hidden.grad)
    torch.testing.assert_close(mine.logits.grad, expected[rank].logits.grad)
    torch.testing.assert_close(local.grad, full.grad[dispatcher.local])


@pytest.mark.parametrize("tokens_per_rank", [[13, 13], [13, 5], [0, 9], [7, 0, 12, 1]])
def test_without_cap_output_and_gradients_equal_a_dense_reference(tokens_per_rank):
    run_ranks(_against_dense, len(tokens_per_rank), tokens_per_rank)


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
        "Received", (), {"expert_input": slots, "tokens_per_expert": tokens_per_expert, "expert_probs": probs}
    )
    expected = stock.combine_postprocess(stock.token_combine(stock.combine_preprocess(run_experts(received, weights))))
    assert torch.equal(output, expected)
    expected_grads = torch.autograd.grad(expected.square().sum(), (case.hidden, case.logits))
    assert all(torch.equal(a, b) for a, b in zip(ours_grads, expected_grads, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_static_slots_are_bit_equal_to_the_stock_dispatcher(world_size):
    run_ranks(_against_stock, world_size)
