"""The repairs of Megatron-Core, and the faults in the installed release that make them necessary."""

import inspect

import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.optimizer import distrib_optimizer

from megatron_anyexperts.training.upstream import expand_to_padded_offsets


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=6))
def test_padding_returns_each_bucket_to_its_offset(buckets):
    sizes = [size for size, _ in buckets]
    offsets, end = [], 0
    for size, padding in buckets:
        offsets.append(end)
        end += size + padding
    compact = torch.arange(1.0, sum(sizes) + 1)
    padded = expand_to_padded_offsets(compact, offsets, sizes, end)
    assert torch.equal(torch.cat([padded[o : o + s] for o, s in zip(offsets, sizes, strict=True)]), compact)
    assert padded.sum() == compact.sum()


def test_upstream_still_strips_the_padding_between_buckets():
    # When this fails, look whether `upstream.install` is still needed: release notes of upstream pull request 5077.
    gather = inspect.getsource(distrib_optimizer.DistributedOptimizer.get_parameter_state_dp_zero)
    assert "offset_in_world_tensors += gbuf_world_numel_unpadded" in gather


def test_torch_gives_all_parameters_the_one_step_that_upstream_hands_it():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    shared = torch.tensor(5.0)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"] = shared
    optimizer.load_state_dict(state)
    assert len({id(entry["step"]) for entry in optimizer.state.values()}) == 1
