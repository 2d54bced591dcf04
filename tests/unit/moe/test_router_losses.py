"""What router losses weigh, by how many tokens are targets. Layouts: test_layer_ranks.py and tests/distributed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.moe.losses import token_weights
from tests.unit.moe.builders import HIDDEN
from tests.unit.moe.rank_cases import LOSSES, STATIC
from tests.unit.moe.test_router import router

TOKENS, ROWS = 16, 2
CASES = {name: loss | {"anyexperts_target_slots": 3.0} for name, loss in LOSSES.items()}
CASES |= {f"static {name}": LOSSES[name] | STATIC for name in ("aux", "seq", "global", "z", "spread")}


def gradient(case: str, mask_SB: torch.Tensor | None, **options) -> torch.Tensor:
    """Gradient of one microbatch's router losses, before Megatron divides by the targets of the step."""
    torch.manual_seed(5)
    built = router(**({"calculate_per_token_loss": True} | CASES[case] | options))
    hidden = torch.randn(TOKENS, ROWS, HIDDEN)
    importance = torch.rand(TOKENS * ROWS).requires_grad_()
    (built(hidden, mask_SB, importance).gates_TE * 0).sum().backward()
    weight = torch.zeros_like(built.weight) if built.weight.grad is None else built.weight.grad
    return torch.cat([weight.flatten(), importance.grad if importance.grad is not None else torch.zeros(1)])


@pytest.mark.parametrize("case", CASES)
@given(st.integers(0, 10**6), st.integers(0, 12), st.sampled_from([0, 1, 3, 17, 40]))
@settings(max_examples=12)
def test_a_microbatch_weighs_its_targets(world, case, seed, padded, targets):
    """The gradient per target does not depend on how many targets there are, nor on where they are."""
    generator = torch.Generator().manual_seed(seed)
    padding = (torch.arange(TOKENS) >= TOKENS - padded).expand(ROWS, -1)
    real = (~padding).nonzero()
    chosen = real[torch.randperm(len(real), generator=generator)[:targets]]
    loss_mask = torch.zeros(ROWS, TOKENS)
    loss_mask[chosen[:, 0], chosen[:, 1]] = 1
    got = gradient(case, token_weights(padding, loss_mask).t())
    all_targets = gradient(case, padding.t())
    torch.testing.assert_close(got, all_targets * (len(chosen) / len(real)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_mean_over_microbatches_does_not_know_targets(one_rank, case):
    padding = torch.arange(TOKENS).expand(ROWS, -1) > 12
    loss_mask = (torch.rand(ROWS, TOKENS) < 0.3) * ~padding
    masks = padding.t(), token_weights(padding, loss_mask).t()
    plain, weighted = (gradient(case, mask, calculate_per_token_loss=False) for mask in masks)
    assert plain.abs().max() > 0
    torch.testing.assert_close(weighted, plain)
