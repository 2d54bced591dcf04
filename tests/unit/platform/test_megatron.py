"""The repairs of Megatron-Core, and the faults in the installed release that make them necessary.

When a test of a fault fails, the installed release has cured it: remove the repair.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.utils import unwrap_model

from megatron_anyexperts.platform.megatron import REPAIRS, expand_to_padded_offsets
from tests.multirank import run_ranks
from tests.unit.moe import rank_cases
from tests.unit.moe.builders import HIDDEN, config

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


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


def test_every_repair_has_its_fault_below():
    tried = re.findall(r'"([A-Z]\w+\.\w+)"', Path(__file__).read_text())
    assert sorted(tried) == sorted(f"{repair.owner.__name__}.{repair.attribute}" for repair in REPAIRS)


@pytest.fixture
def repaired(monkeypatch):
    """Call it to run the installed release with all repairs but those to the named methods."""
    stock = {repair: vars(repair.owner)[repair.attribute] for repair in REPAIRS}

    def apply(*without: str) -> None:
        for repair, method in stock.items():
            kept = method if f"{repair.owner.__name__}.{repair.attribute}" in without else repair.wrap(method)
            monkeypatch.setattr(repair.owner, repair.attribute, kept)

    return apply


@dataclass
class Trained:
    """A bf16 mixture layer with its distributed optimizer, in one bucket or several."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer

    @classmethod
    def start(cls, several_buckets: bool = False, bf16: bool = True, experts: bool = True) -> "Trained":
        dtype = torch.bfloat16 if bf16 else torch.float32
        torch.manual_seed(1)
        net = rank_cases.Net(config(bf16=bf16, params_dtype=dtype, **rank_cases.DYNAMIC))
        net.layer.experts.requires_grad_(experts)
        buckets = {"overlap_grad_reduce": True, "bucket_size": 200} if several_buckets else {}
        model = rank_cases.wrap(net, use_distributed_optimizer=True, **buckets)
        options = OptimizerConfig(
            optimizer="adam", lr=0.01, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=0.0
        )
        return cls(model, get_megatron_optimizer(options, [model]))

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.model.zero_grad_buffer()
            x = torch.randn(8, 2, HIDDEN, dtype=next(self.model.parameters()).dtype)
            self.model(x).float().square().mean().backward()
            self.model.finish_grad_sync()
            self.optimizer.step()

    def sharded(self, is_loading: bool) -> dict:
        model = unwrap_model(self.model).sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder) -> None:
        folder.mkdir()
        dist_checkpointing.save(self.sharded(is_loading=False), folder)

    def load(self, folder) -> None:
        loaded = dist_checkpointing.load(self.sharded(is_loading=True), folder)
        unwrap_model(self.model).load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def adam(self) -> list[torch.optim.Optimizer]:
        return [each.optimizer for each in self.optimizer.chained_optimizers]

    def states(self) -> list[torch.Tensor]:
        """Masters and moments in the order in which the optimizers hold them, which is the same in equal models."""
        return [
            tensor.detach().clone()
            for adam in self.adam()
            for group in adam.param_groups
            for master in group["params"]
            for tensor in (master, *(adam.state[master][name] for name in ("exp_avg", "exp_avg_sq")))
        ]


def differing(first: Trained, second: Trained) -> int:
    pairs = zip(first.states(), second.states(), strict=True)
    return sum(not torch.equal(ours, theirs) for ours, theirs in pairs)


def resumed(folder, repaired, *without: str, **options) -> tuple[Trained, Trained]:
    """A layer trained for three steps and saved, and another that loaded it; neither with the repair of `without`."""
    repaired(*without)
    first, second = Trained.start(**options), Trained.start(**options)
    first.steps(3)
    first.save(folder)
    second.load(folder)
    return first, second


@pytest.mark.parametrize("options", [{"bf16": False}, {}, {"several_buckets": True}], ids=["fp32", "bf16", "buckets"])
def test_repaired_optimizer_resumes_element_by_element(one_rank, repaired, tmp_path, options):
    first, second = resumed(tmp_path / "saved", repaired, **options)
    assert len(first.states()) > 30
    assert differing(first, second) == 0
    for adam in second.adam():
        steps = [state["step"] for state in adam.state.values()]
        assert {step.item() for step in steps} == {3.0}
        assert len({id(step) for step in steps}) == len(steps)
    for trained in (first, second):
        torch.manual_seed(3)
        trained.steps(2)
    assert differing(first, second) == 0


def test_upstream_stores_what_follows_a_padded_bucket_shifted(one_rank, repaired, tmp_path):
    method = "DistributedOptimizer.sharded_param_state_fully_reshardable"
    assert differing(*resumed(tmp_path / "one", repaired, method)) == 0
    assert differing(*resumed(tmp_path / "several", repaired, method, several_buckets=True)) > 0


def test_upstream_cannot_save_a_group_of_two_dtypes(one_rank, repaired, tmp_path):
    method = "DistributedOptimizer._build_optimizer_group_ranges"
    assert differing(*resumed(tmp_path / "fp32", repaired, method, bf16=False)) == 0
    with pytest.raises(RuntimeError, match="The size of tensor a .* must match"):
        resumed(tmp_path / "bf16", repaired, method)


def test_upstream_cannot_load_before_the_first_step(one_rank, repaired, tmp_path):
    with pytest.raises(AssertionError):
        resumed(tmp_path / "saved", repaired, "DistributedOptimizer.sharded_state_dict")


def test_upstream_looks_for_the_step_of_each_parameter(one_rank, repaired, tmp_path):
    with pytest.raises(KeyError, match="step"):
        resumed(tmp_path / "saved", repaired, "DistributedOptimizer._set_main_param_and_optimizer_states")


def test_upstream_gives_all_parameters_one_step_counter(one_rank, repaired, tmp_path):
    _, second = resumed(tmp_path / "saved", repaired, "DistributedOptimizer.load_state_dict")
    second.steps(1)
    for adam in second.adam():
        assert {state["step"].item() for state in adam.state.values()} == {3.0 + len(adam.state)}


def stage_without_experts(rank: int, world_size: int, without: str) -> list[float]:
    """Steps of the optimizer's groups in a checkpoint, whose first stage trains no expert; none if saving fails."""
    for repair in REPAIRS:
        if f"{repair.owner.__name__}.{repair.attribute}" != without:
            repair.apply()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    trained = Trained.start(experts=rank == 1)
    trained.steps(2)
    try:
        parts = trained.sharded(is_loading=False)["optimizer"].values()
    except AssertionError:
        return []
    return [group["step"] for part in parts for group in part["optimizer"]["param_groups"]]


def test_upstream_cannot_save_a_pipeline_stage_without_experts():
    assert run_ranks(stage_without_experts, 2, "ChainedOptimizer.sharded_state_dict") == [[], [2.0, 2.0, 2.0]]
    assert run_ranks(stage_without_experts, 2, "") == [[2.0, 2.0, 2.0]] * 2
