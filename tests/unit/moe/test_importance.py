import pytest
import torch

from megatron_anyexperts.moe.importance import Importance
from tests.unit.moe.builders import HIDDEN, config


def plain(module: Importance, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, left to autograd."""
    inner = torch.nn.functional.silu(hidden.reshape(-1, HIDDEN).float() @ module.down.t() + module.down_bias)
    importance = torch.sigmoid(inner @ module.up + module.up_bias)
    alpha = module.config.anyexperts_alpha if module.alpha is None else module.alpha
    return importance, hidden + (alpha * importance).view(*hidden.shape[:-1], 1).to(hidden.dtype) * hidden


@pytest.mark.parametrize("options", [{"anyexperts_alpha": 0.5}, {"anyexperts_learn_alpha": True}], ids=str)
@pytest.mark.parametrize("use", ["both", "importance", "fused"])
def test_gradients_are_those_of_the_definition(one_rank, options, use):
    module = Importance(config(anyexperts_k_max=6, **options))
    for parameter in module.parameters():
        parameter.data.normal_()
    results = []
    for run in (module, lambda x: plain(module, x)):
        hidden = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        importance, fused = run(hidden)
        loss = 0.0
        if use != "fused":
            loss = loss + (importance * torch.arange(10)).sum()
        if use != "importance":
            loss = loss + (fused * torch.linspace(-1, 1, fused.numel()).view_as(fused)).sum()
        module.zero_grad()
        loss.backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
        results.append([importance, fused, hidden.grad, *grads])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_alpha_zero_returns_the_very_hidden_states(one_rank):
    module = Importance(config(anyexperts_k_max=6, anyexperts_alpha=0.0))
    hidden = torch.randn(5, 2, HIDDEN, requires_grad=True)
    importance, fused = module(hidden)
    assert fused is hidden
    importance.sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_parameters_and_result_stay_fp32_in_a_bf16_model(one_rank):
    module = Importance(config(anyexperts_k_max=6))
    values = [parameter.clone() for parameter in module.parameters()]
    module.bfloat16()
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(values, module.parameters(), strict=True))
    hidden = torch.randn(5, 2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    importance, fused = module(hidden)
    assert (importance.dtype, fused.dtype) == (torch.float32, torch.bfloat16)
    (importance.sum() + fused.float().sum()).backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_the_input_of_several_uses_keeps_its_gradient(one_rank):
    """The backward pass writes in place: a residual connection around the layer must not feel it."""
    module = Importance(config(anyexperts_k_max=6, anyexperts_alpha=0.5))
    hidden = torch.randn(5, 2, HIDDEN, requires_grad=True)
    direction = torch.randn(5, 2, HIDDEN)
    ((hidden + module(hidden)[1]) * direction).sum().backward()
    mine = hidden.grad.clone()
    hidden.grad = None
    ((hidden + plain(module, hidden)[1]) * direction).sum().backward()
    torch.testing.assert_close(mine, hidden.grad)
