"""What counts as a launch and as a wait."""

import torch

from megatron_anyexperts.checks.operator_counts import count_operators

X = torch.arange(12.0).view(3, 4)


def waits(work) -> int:
    with count_operators() as counts:
        work()
    return counts.waits.total()


def test_every_way_to_ask_a_gpu_is_a_wait():
    for work in (
        lambda: X[0, 0].item(),
        lambda: bool(X.sum() > 0),
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: X.to("cpu", non_blocking=True),
        lambda: X.numpy(),
        lambda: X.nonzero(),
        lambda: X[X > 1],
        lambda: X[: X[0, 1].long()],
        lambda: X.masked_select(X > 1),
        lambda: X.unique_consecutive(),
        lambda: torch.tensor([1, 2], device=torch.device("cpu")),
        lambda: X.new_tensor([1, 2]),
        lambda: torch.arange(3).to(X.device),
        lambda: torch.arange(3).repeat_interleave(X[0, :3].long()),
    ):
        assert waits(work) == 1, work
    source = torch.ones(3, 4, requires_grad=True)
    assert waits(lambda: X.masked_scatter(X > 1, source).sum().backward()) == 1  # in the backward pass


def test_what_the_host_has_can_be_asked_without_waiting():
    def work():
        copy = X.cpu()
        copy.sum(0).tolist(), copy[copy > 1], bool(copy[0, 0] > 0)
        torch.arange(3).to(X.device, non_blocking=True) + 1
        torch.tensor([1, 2]).tolist(), torch.nonzero_static(X > 1, size=3)

    assert waits(work) == 1


def test_launches_are_operators_on_the_gpu_that_are_no_views():
    weight = torch.ones(4, requires_grad=True)
    with count_operators() as counts:
        (X.view(-1).view(3, 4).transpose(0, 1)[1:] * weight[:3, None]).sum().backward()
        torch.arange(5).add(1).tolist()
    # mul, sum; backward: ones_like, mul, sum over what was expanded, slice_backward
    assert counts.launches.total() == 6, counts.launches
