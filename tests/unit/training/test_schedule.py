"""A schedule is checked before anything starts, and an optimizer goes on under another one."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.utils import unwrap_model

from megatron_anyexperts.platform import megatron as upstream
from megatron_anyexperts.training import schedule
from megatron_anyexperts.training.learning_rates import LearningRateConfig
from tests.unit.moe import rank_cases
from tests.unit.moe.builders import HIDDEN, config

STEPS, RATE = 3, 0.01
HALVED = LearningRateConfig(lr_scale_importance=0.5).overrides(RATE, 0.0)


def arguments(**changed) -> SimpleNamespace:
    usual = {
        "train_iters": 10, "train_samples": None, "lr": 1.0, "min_lr": 0.0, "lr_decay_style": "cosine",
        "lr_decay_iters": None, "lr_decay_samples": None, "lr_wsd_decay_iters": None, "lr_wsd_decay_samples": None,
        "lr_warmup_fraction": None, "lr_warmup_iters": 0, "lr_warmup_samples": 0, "lr_warmup_init": 0.0,
        "change_schedule": False, "use_checkpoint_opt_param_scheduler": False,
    }  # fmt: skip
    return SimpleNamespace(**(usual | changed))


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"train_iters": 4, "lr_warmup_iters": 10}, ["--lr-warmup-iters 10", "--train-iters 4"]),
        ({"lr_warmup_iters": 5, "lr_decay_iters": 5}, ["--lr-warmup-iters 5", "--lr-decay-iters 5"]),
        ({"lr_warmup_fraction": 1.0}, ["--lr-warmup-fraction 1.0", "--train-iters 10"]),
        ({"train_iters": None, "train_samples": 8, "lr_warmup_samples": 9}, ["--lr-warmup-samples 9", "samples 8"]),
        ({"train_iters": None}, ["--train-iters", "--train-samples"]),
        ({"lr": None}, ["--lr"]),
        ({"min_lr": 2.0}, ["--min-lr 2.0", "--lr 1.0"]),
        ({"lr_warmup_init": 2.0}, ["--lr-warmup-init 2.0", "--lr 1.0"]),
        ({"lr_decay_style": "WSD"}, ["--lr-wsd-decay-iters"]),
        ({"change_schedule": True, "use_checkpoint_opt_param_scheduler": True}, ["contradict"]),
    ],
)
def test_what_the_scheduler_would_assert_is_refused_by_flag(changed, words):
    schedule.check(arguments())
    with pytest.raises(ValueError) as refused:
        schedule.check(arguments(**changed))
    assert all(word in str(refused.value) for word in words)


@pytest.fixture
def installed(monkeypatch):
    """Megatron's optimizers as a run has them; returns a call that takes what belongs to schedules away again."""
    for repair in upstream.REPAIRS:
        method = vars(repair.owner)[repair.attribute]
        monkeypatch.setattr(repair.owner, repair.attribute, repair.wrap(method))
    with monkeypatch.context() as patches:
        for cls, name, wrap in schedule.PATCHES:
            patches.setattr(cls, name, wrap(vars(cls)[name]))
        yield patches.undo


class Trained:
    """A mixture layer, its optimizer and its scheduler."""

    def __init__(self, distributed: bool, lr: float = RATE, overrides: dict | None = None, beta: float = 0.9):
        torch.manual_seed(1)
        self.model = rank_cases.wrap(
            rank_cases.Net(config(**rank_cases.DYNAMIC)), use_distributed_optimizer=distributed
        )
        options = OptimizerConfig(
            optimizer="adam", lr=lr, min_lr=0.0, adam_beta1=beta, use_distributed_optimizer=distributed, clip_grad=0.0
        )
        no_decay = {ParamKey(name="*bias*"): ParamGroupOverride(wd_mult=0.0)}
        self.optimizer = get_megatron_optimizer(options, [self.model], {**no_decay, **(overrides or {})})
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, 0.0, lr, 0.0, 0, 100, "linear", 0.0, 0.0, 100, "constant", False, True
        )

    def steps(self, count: int) -> "Trained":
        for step in range(count):
            torch.manual_seed(step)
            self.model.zero_grad_buffer()
            self.model(torch.randn(8, 2, HIDDEN)).square().mean().backward()
            self.model.finish_grad_sync()
            self.optimizer.step()
            self.scheduler.step(1)
        return self

    def sharded(self, is_loading: bool) -> dict:
        model = unwrap_model(self.model).sharded_state_dict()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def save(self, folder) -> "Trained":
        folder.mkdir()
        dist_checkpointing.save(self.sharded(is_loading=False), folder)
        return self

    def load(self, folder) -> "Trained":
        loaded = dist_checkpointing.load(self.sharded(is_loading=True), folder)
        unwrap_model(self.model).load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["scheduler"])
        return self

    def states(self) -> dict[str, torch.Tensor]:
        """Moments (and masters) by name."""
        state = self.sharded(is_loading=False)["optimizer"]
        apply_factories(state)
        return {each.key: each.data.clone() for each in nested_values(state) if isinstance(each, ShardedTensor)}

    def counts(self) -> set[float]:
        inner = [each.optimizer for each in getattr(self.optimizer, "chained_optimizers", [self.optimizer])]
        return {float(state["step"]) for adam in inner for state in adam.state.values()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
@pytest.mark.parametrize(
    "before, after",
    [
        ({}, {"lr": 0.002}),
        ({}, {"overrides": HALVED}),
        ({"overrides": HALVED}, {}),
    ],
    ids=["rate", "part split off", "part merged"],
)
def test_moments_go_on_under_other_rates(one_rank, installed, tmp_path, distributed, before, after):
    first = Trained(distributed, **before).steps(STEPS).save(tmp_path / "saved")
    second = Trained(distributed, **after).load(tmp_path / "saved")
    fresh = Trained(distributed, **after).steps(STEPS)
    assert len(first.states()) >= 20
    assert same(first.states(), second.states())
    assert second.counts() == {float(STEPS)}
    for now, new in zip(second.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
        assert {key: now[key] for key in ("lr", "max_lr", "wd_mult")} == {
            key: new[key] for key in ("lr", "max_lr", "wd_mult")
        }
    before_step = second.states()
    second.steps(1)
    assert second.counts() == {STEPS + 1.0}
    assert not same(before_step, second.states())


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_constants_of_the_optimizer_act_after_a_resume(one_rank, installed, tmp_path, distributed):
    Trained(distributed).steps(1).save(tmp_path / "saved")
    second = Trained(distributed, beta=0.5).load(tmp_path / "saved")
    assert {group["betas"] for group in second.optimizer.param_groups} == {(0.5, 0.999)}


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_upstream_finds_groups_by_their_rates(one_rank, installed, tmp_path, distributed):
    installed()
    Trained(distributed).steps(1).save(tmp_path / "saved")
    with pytest.raises((KeyError, ValueError), match="0.002"):
        Trained(distributed, lr=0.002).load(tmp_path / "saved")


@given(st.integers(0, 90), st.integers(1, 9), st.integers(1, 9))
def test_a_changed_batch_size_leaves_the_iteration_where_it_is(iteration, old, new):
    def at(batch: int, steps: int) -> OptimizerParamScheduler:
        optimizer = SimpleNamespace(param_groups=[{}])
        length = 100 * batch
        result = OptimizerParamScheduler(
            optimizer, 0.0, 1.0, 0.0, 0, length, "linear", 0.0, 0.0, length, "constant", False, True
        )
        result.step(steps)
        return result

    resumed = at(new, 0)
    resumed.load_state_dict(at(old, iteration * old).state_dict())
    schedule.reposition(resumed, arguments(global_batch_size=new), iteration)
    fresh = at(new, iteration * new)
    assert resumed.optimizer.param_groups[0]["lr"] == fresh.optimizer.param_groups[0]["lr"]
    assert resumed.num_steps == fresh.num_steps


def test_groups_that_took_different_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"different numbers of steps: \[3, 4\]"):
        schedule.groups_by_flags([{}], [{"step": 3}, {"step": 4}])
