"""The repairs of Megatron-Core, and the faults in the installed release that make them necessary.

When a test of a fault fails, the installed release has cured it: remove the repair.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.utils import unwrap_model

from megatron_anyexperts.platform.megatron import REPAIRS
from tests.multirank import run_ranks
from tests.unit.moe import rank_cases
from tests.unit.moe.builders import HIDDEN, config

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
GATHERED = (
    "DistributedOptimizer.sharded_param_state_fully_reshardable",
    "DistributedOptimizer.load_parameter_state_from_fully_reshardable",
)
"""Without these repairs the states of all data-parallel ranks are brought together on each."""


STOCK = {repair: vars(repair.owner)[repair.attribute] for repair in REPAIRS}


def test_every_repair_has_its_fault_below():
    tried = re.findall(r'"([A-Z]\w+\.\w+)"', Path(__file__).read_text())
    assert sorted(tried) == sorted(f"{repair.owner.__name__}.{repair.attribute}" for repair in REPAIRS)


@pytest.fixture
def repaired(monkeypatch):
    """Call it to run the installed release with all repairs but those to the named methods."""

    def apply(*without: str) -> None:
        for repair, method in STOCK.items():
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

    def elements(self, is_loading: bool) -> int:
        """Of the optimizer's states that a save writes or a load reads on this rank."""
        states = nested_values(self.sharded(is_loading)["optimizer"])
        return sum(each.data.numel() for each in states if isinstance(each, ShardedTensor | ShardedTensorFactory))

    def save(self, folder) -> None:
        folder.mkdir(exist_ok=True)
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
    assert differing(*resumed(tmp_path / "one", repaired, *GATHERED)) == 0
    assert differing(*resumed(tmp_path / "several", repaired, *GATHERED, several_buckets=True)) > 0


def test_upstream_cannot_save_a_group_of_two_dtypes(one_rank, repaired, tmp_path):
    method = "DistributedOptimizer._build_optimizer_group_ranges"
    assert differing(*resumed(tmp_path / "fp32", repaired, method, bf16=False)) == 0
    with pytest.raises(ValueError, match="belong to another parameter"):
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


def repair_all_but(*without: str) -> None:
    for repair, method in STOCK.items():
        kept = f"{repair.owner.__name__}.{repair.attribute}" in without
        setattr(repair.owner, repair.attribute, method if kept else repair.wrap(method))


def gathered_and_own(rank: int, world_size: int, folder: Path) -> tuple[float, float, float, int]:
    """Data-parallel ranks whose states are read and written, upstream and here; and whether either reads the other's.

    Returns:
        states that a rank reads upstream, those it reads and writes here, over those it owns; how many of its states
        differ after upstream's checkpoint was read here, in other buckets, and the one written of that upstream.
    """
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    repair_all_but(*GATHERED)
    before, after = Trained.start(), Trained.start()
    before.steps(3)
    before.save(folder / "upstream")
    own = sum(state.numel() for state in before.states())
    read_upstream = before.elements(is_loading=True)

    repair_all_but()
    ours = Trained.start(several_buckets=True)
    ours.load(folder / "upstream")
    ours.save(folder / "ours")
    own_here = sum(state.numel() for state in ours.states())
    read, written = (ours.elements(is_loading) for is_loading in (True, False))

    repair_all_but(*GATHERED)
    after.load(folder / "ours")
    return read_upstream / own, read / own_here, written / own_here, differing(before, after)


def test_upstream_gathers_the_states_of_all_ranks_on_each(tmp_path):
    for upstream, read, written, different in run_ranks(gathered_and_own, 2, tmp_path):
        assert upstream > 1.9
        assert read == written == 1
        assert different == 0


def stage_without_experts(rank: int, world_size: int, without: str) -> list[float]:
    """Steps of the optimizer's groups in a checkpoint, whose first stage trains no expert; none if saving fails."""
    repair_all_but(without)
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
