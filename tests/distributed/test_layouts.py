"""One model trains alike however it is laid out over ranks: losses, gradient norms, weights and controllers.

About half of the tokens are targets, some are padding, by microbatch. The router's losses act, but `global_aux_loss`,
whose loads grow from one microbatch of a rank to the next: see tests/unit/moe/test_layer_ranks.py.
"""

import re
from dataclasses import dataclass

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_anyexperts.models.specs import decoder_stack_spec
from megatron_anyexperts.moe.controllers import update_controllers
from megatron_anyexperts.moe.losses import token_weights
from tests.multirank import run_ranks
from tests.unit.models.small import VOCABULARY, small_config

SEQUENCE, MICROBATCHES, STEPS, RATE, EPS = 16, 8, 3, 0.5, 0.3
ROUTING = {
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_shared_expert_intermediate_size": 16,
    "anyexperts_k_min": 1,
    "anyexperts_k_max": 4,
    "anyexperts_rho_max": 0.5,
    "anyexperts_alpha": 0.2,
    "anyexperts_target_slots": 2.5,
    "anyexperts_target_real": 1.8,
    "anyexperts_budget_loss_coeff": 0.05,
    "anyexperts_spread_loss_coeff": 0.05,
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.05, 0.05],
    "moe_z_loss_coeff": 0.005,
    "calculate_per_token_loss": True,
}


@dataclass
class Layout:
    """Sizes as Megatron takes them; data parallelism is what is left of the world.

    With `copies` a rank holds up to so many experts of others, which keep their places for `refresh` steps; mixture
    layers are recomputed, gradients are reduced while the backward pass runs, and parameters are gathered while the
    forward pass does.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    expert_tensor: int = 1
    copies: int = 0
    refresh: int = 0
    pattern: str = "*E*E*E*E"

    def start(self) -> None:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            self.tensor,
            self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.expert_tensor,
        )
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)

    def build(self) -> list[HybridModel]:
        config = small_config(
            self.pattern,
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.tensor > 1,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            # Both neighbours of a stage are the same rank at PP2: Megatron requires separate messages there.
            overlap_p2p_comm=self.virtual is not None,
            batch_p2p_comm=self.virtual is None,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.expert_tensor,
            **ROUTING,
            **self._with_copies(),
        )
        return [
            HybridModel(
                config,
                decoder_stack_spec(config),
                vocab_size=VOCABULARY,
                max_sequence_length=SEQUENCE,
                hybrid_layer_pattern=self.pattern,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                position_embedding_type="rope",
                vp_stage=None if self.virtual is None else stage,
            )
            for stage in range(self.virtual or 1)
        ]


    def _with_copies(self) -> dict:
        if not self.copies:
            return {}
        return {
            "anyexperts_balance": "copies",
            "anyexperts_copies_eps": 0.0,
            "anyexperts_copies_per_rank": self.copies,
            "anyexperts_copies_refresh": self.refresh,
            "recompute_granularity": "selective",
            "recompute_modules": ["moe"],
        }


def _batch(step: int, microbatch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + microbatch)
    tokens = torch.randint(0, VOCABULARY // 8, (1, SEQUENCE + 1), generator=generator)
    padding = (torch.arange(SEQUENCE) >= SEQUENCE - microbatch % 4)[None]
    loss_mask = ((torch.rand(1, SEQUENCE, generator=generator) < 0.5) & ~padding).float()
    return {
        "input_ids": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(SEQUENCE)[None],
        "attention_mask": None,
        "loss_mask": loss_mask,
        "padding_mask": token_weights(padding, loss_mask),
    }


def _global_name(model: HybridModel, name: str) -> str:
    """The parameter's name in a model that lies on one rank."""
    layer = re.search(r"decoder\.layers\.(\d+)", name)
    if layer:
        number = model.decoder.layers[int(layer[1])].layer_number - 1
        name = name.replace(layer[0], f"decoder.layers.{number}")
    expert = re.search(r"local_experts\.(\d+)", name)
    if expert:
        local = ROUTING["num_moe_experts"] // parallel_state.get_expert_model_parallel_world_size()
        number = parallel_state.get_expert_model_parallel_rank() * local + int(expert[1])
        name = name.replace(expert[0], f"local_experts.{number}")
    return name


def _shard(full: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    """This rank's part of a whole parameter; the two halves of a gated layer are split one by one."""
    differing = [dim for dim, (a, b) in enumerate(zip(full.shape, shape, strict=True)) if a != b]
    if not differing:
        return full
    expert = "local_experts" in name
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    (dim,) = differing
    halves = full.chunk(2, dim) if "linear_fc1" in name else [full]
    return torch.cat([half.chunk(group.size(), dim)[group.rank()] for half in halves], dim)


def _each(chunks: list[HybridModel], whole: dict[str, torch.Tensor]):
    """Each local parameter and controller state, with the part of the whole model's that it should equal."""
    for chunk in chunks:
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            if tensor.is_floating_point():
                known = _global_name(chunk, name)
                yield known, tensor, _shard(whole[known], tensor.shape, known)


def _state(model: HybridModel) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}


def _train_on_one_rank() -> tuple[list[float], list[float], dict, dict]:
    """Losses, gradient norms, and the model before and after: plain torch, no Megatron optimizer or schedule."""
    layout = Layout()
    layout.start()
    (model,) = layout.build()
    before = _state(model)
    # With this eps a step is nearly proportional to the gradient, so that its rounding is not blown up to the rate.
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as Megatron's schedules do
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = [_batch(step, i) for i in range(MICROBATCHES)]
        targets = sum(batch["loss_mask"].sum() for batch in batches)
        loss = sum((model(**batch) * batch["loss_mask"]).sum() for batch in batches)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad /= targets
        update_controllers([model])
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        optimizer.step()
        losses.append((loss / targets).item())
    return losses, norms, before, _state(model)


def _forward(batches, model):
    batch = next(batches)

    def loss_of(output):
        loss, targets = (output * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
        return loss, targets, {"loss": torch.stack((loss.detach(), targets.float()))}

    return model(**batch), loss_of


def _train(layout: Layout, before: dict) -> tuple[list[float], list[float], list[HybridModel]]:
    """The same on Megatron's schedule, gradient reduction and distributed optimizer."""
    layout.start()
    chunks = layout.build()
    with torch.no_grad():
        for _, tensor, expected in _each(chunks, before):
            tensor.copy_(expected)
    config = chunks[0].config
    overlaps = layout.copies > 0
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps,
        bucket_size=2000 if overlaps else None,  # about a layer, so that several gathers are under way
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
    if ddp.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if layout.virtual else wrapped[0].no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=RATE,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=EPS,
            use_distributed_optimizer=True,
            clip_grad=1e6,  # far away: the norm is computed, the gradients stay
        ),
        wrapped,
    )
    for group in optimizer.param_groups:
        group["lr"] = RATE
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    losses, norms = [], []
    for step in range(STEPS):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        mine = range(rank, MICROBATCHES, ranks)
        iterators = [iter([_batch(step, i) for i in mine]) for _ in chunks]
        reduced = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iterators if layout.virtual else iterators[0],
            model=wrapped if layout.virtual else wrapped[0],
            num_microbatches=len(mine),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        success, norm, _ = optimizer.step()
        assert success
        norms.append(float(norm))
        loss = sum(x["loss"] for x in reduced) if reduced else torch.zeros(2)
        torch.distributed.all_reduce(loss)
        losses.append((loss[0] / loss[1]).item())
    for chunk in wrapped if overlaps else ():
        chunk.disable_forward_pre_hook()  # which ends what is still gathered
    return losses, norms, chunks


def _compare(rank: int, world_size: int, layouts: list[Layout]) -> int:
    losses, norms, before, after = _train_on_one_rank()
    assert losses[-1] < losses[0] - 0.05, f"no training to compare: {losses}"
    compared = 0
    for layout in layouts:
        got_losses, got_norms, chunks = _train(layout, before)
        torch.testing.assert_close(torch.tensor(got_losses), torch.tensor(losses), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(torch.tensor(got_norms), torch.tensor(norms), rtol=1e-5, atol=1e-6)
        for name, tensor, expected in _each(chunks, after):
            label = f"{layout} {name}: "
            torch.testing.assert_close(
                tensor.detach(), expected, rtol=1e-5, atol=2e-6, msg=lambda m, label=label: label + m
            )
            compared += 1
        moved = [(tensor - old).abs().max().item() > 1e-4 for _, tensor, old in _each(chunks, before)]
        assert sum(moved) > len(moved) / 2, "weights hardly moved"
    return compared


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (2, [Layout(), Layout(expert=2), Layout(tensor=2, expert=2)]),
        (4, [Layout(expert=4, copies=2), Layout(expert=2), Layout(expert=2, copies=1, refresh=1)]),
        (
            4,
            [
                Layout(pipeline=2, expert=2, pattern="*E*E|*E*E"),
                Layout(pipeline=2, virtual=2, expert=2, copies=1, refresh=2, pattern="*E|*E|*E|*E"),
            ],
        ),
        (4, [Layout(tensor=2, expert=4), Layout(tensor=2, expert=2, expert_tensor=2, copies=1)]),
    ],
    ids=["DP2, EP2, TP2+SP x EP2", "EP4, EP2 x DP2", "PP2 x EP2, plain and interleaved", "TP2+SP x EP4, x EP2 x ETP2"],
)
def test_every_layout_trains_like_one_rank(world_size, layouts):
    assert all(compared > 0 for compared in run_ranks(_compare, world_size, layouts))
