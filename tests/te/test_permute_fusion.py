"""`--moe-permute-fusion`: Transformer Engine's Triton kernels, interpreted, lay out and sum slots as torch does."""

import pytest
import torch
from triton.runtime.autotuner import Autotuner

from tests.multirank import run_ranks
from tests.te.test_expert_copies import HIDDEN, build
from tests.unit.moe.rank_cases import initialize

TOKENS = 16
DYNAMIC = {"anyexperts_k_min": 1, "anyexperts_k_max": 4, "anyexperts_rho_max": 0.4, "anyexperts_alpha": 0.2}


def _first_configuration(tuner, *arguments, **options):
    """There is no device to time configurations on."""
    chosen = tuner.configs[0].all_kwargs()
    of_launch = ("num_warps", "num_ctas", "num_stages", "maxnreg")
    return tuner.fn.run(*arguments, **options, **{key: chosen[key] for key in chosen if key not in of_launch})


def both(rank: int, ranks: int, options: dict) -> list[list[torch.Tensor]]:
    """Output and gradients unfused and fused; the last tokens are padding and have no slots."""
    Autotuner.run = _first_configuration
    initialize(1, ranks)
    padding = torch.arange(TOKENS)[None] >= TOKENS - 3
    results = []
    for fused in (False, True):
        net = build(rank, ranks, torch.float32, **options, moe_permute_fusion=fused)
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(TOKENS, 1, HIDDEN, generator=generator).requires_grad_()
        y = net(x, padding)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    return results


@pytest.mark.parametrize(("ranks", "options"), [(1, DYNAMIC), (2, {}), (2, DYNAMIC)])
def test_fused_is_unfused(ranks, options):
    for plain, fused in run_ranks(both, ranks, options):
        assert len(plain) == len(fused) > 3
        for ours, theirs in zip(fused, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
