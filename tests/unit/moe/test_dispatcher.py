"""SlotDispatcher on one rank: alignment padding, empty inputs, refusals. Several ranks: tests/distributed."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.enums import Fp8Recipe

from megatron_anyexperts.moe.dispatcher import SlotDispatcher
from tests.distributed.dispatch_cases import config, dense, expert_weights, make_case, make_dispatcher, run_experts

EXPERTS, K_MAX, ALIGN = 4, 2, 16


def padding_dispatcher() -> SlotDispatcher:
    """FP8 itself needs Transformer Engine; where the slots go under its alignment does not."""
    cfg = config(EXPERTS, K_MAX)
    cfg.fp8, cfg.fp8_recipe, cfg.moe_router_padding_for_quantization = "hybrid", Fp8Recipe.delayed, True
    return make_dispatcher(cfg)


def test_alignment_padding_reaches_neither_output_nor_gradients_nor_load(one_rank):
    case, reference = (make_case(0, 2 * ALIGN, EXPERTS, K_MAX) for _ in range(2))
    routed = case.decision.routing_map_TE.clone()
    weights = expert_weights(EXPERTS)
    dispatcher = padding_dispatcher()
    sent = dispatcher.dispatch(case.hidden, case.decision)
    assert (sent.tokens_per_expert % ALIGN == 0).all() and len(sent.expert_input) == sent.tokens_per_expert.sum()
    assert len(sent.expert_input) > routed.sum()
    assert torch.equal(sent.load.received_E, routed.sum(0))
    assert torch.equal(case.decision.routing_map_TE, routed)

    output = dispatcher.combine(run_experts(sent, weights), sent)
    expected = dense(reference.hidden, reference.decision.gates_TE, weights)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(case.hidden.grad, reference.hidden.grad)
    torch.testing.assert_close(case.logits.grad, reference.logits.grad)


def test_gates_outside_the_map_do_not_enter_through_padding(one_rank):
    case = make_case(0, ALIGN, EXPERTS, K_MAX)
    leaky = torch.ones_like(case.decision.gates_TE)
    decision = case.decision.__class__(
        leaky, case.decision.routing_map_TE, None, case.decision.importance_T, None, None
    )
    dispatcher, weights = padding_dispatcher(), expert_weights(EXPERTS)
    sent = dispatcher.dispatch(case.hidden, decision)
    output = dispatcher.combine(run_experts(sent, weights), sent)
    torch.testing.assert_close(output, dense(case.hidden, leaky * case.decision.routing_map_TE, weights))


def test_tokens_that_do_not_fill_the_alignment_are_refused(one_rank):
    case = make_case(0, ALIGN + 1, EXPERTS, K_MAX)
    with pytest.raises(ValueError, match="17 local tokens are no multiple of the alignment 16"):
        padding_dispatcher().dispatch(case.hidden, case.decision)


def test_no_tokens_give_an_empty_output_and_a_gradient(one_rank):
    case = make_case(0, 0, EXPERTS, K_MAX)
    dispatcher = make_dispatcher(config(EXPERTS, K_MAX))
    sent = dispatcher.dispatch(case.hidden, case.decision)
    output = dispatcher.combine(run_experts(sent, expert_weights(EXPERTS)), sent)
    output.sum().backward()
    assert output.shape == case.hidden.shape == case.hidden.grad.shape


def test_half_precision_slots_keep_their_dtype_and_fp32_gates(one_rank):
    case = make_case(0, 6, EXPERTS, K_MAX)
    dispatcher = make_dispatcher(config(EXPERTS, K_MAX))
    sent = dispatcher.dispatch(case.hidden.bfloat16(), case.decision)
    assert (sent.expert_input.dtype, sent.expert_probs.dtype) == (torch.bfloat16, torch.float32)
    assert dispatcher.combine(sent.expert_input, sent).dtype == torch.bfloat16


def test_experts_that_are_no_equal_consecutive_share_are_refused(one_rank):
    dispatcher = make_dispatcher(config(EXPERTS, K_MAX))
    groups = SimpleNamespace(ep=dispatcher.ep_group, expt_tp=dispatcher.tp_group, tp_ep=dispatcher.tp_ep_group)
    with pytest.raises(ValueError, match="use an expert parallel size that divides"):
        SlotDispatcher(config(EXPERTS, K_MAX), 2, [0, 2], groups)
