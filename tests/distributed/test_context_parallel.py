"""Rows cut over context-parallel ranks train like whole ones: losses, norms, weights, router losses, routing figures.

The rows hold several documents, images, a video that lies on several ranks, clips and padding.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

from megatron_anyexperts.data.context_cut import cut
from megatron_anyexperts.data.microbatch import TRAINING_INPUTS, Microbatch, collate
from megatron_anyexperts.media import AUDIO, IMAGE, MODALITIES, PAD, TEXT, VIDEO
from megatron_anyexperts.models.multimodal import MultimodalModel
from megatron_anyexperts.moe import layer
from megatron_anyexperts.moe.controllers import update_controllers
from megatron_anyexperts.moe.dispatcher import LoadReport
from megatron_anyexperts.moe.metrics import RoutingTracker, install_metrics, token_modality
from megatron_anyexperts.moe.quotas import slot_cap
from megatron_anyexperts.platform import packed_rows
from tests.distributed.test_layouts import ROUTING
from tests.multirank import run_ranks
from tests.unit.models.small import SHAPE, VOCABULARY, small_arguments, small_config, small_model

SEQUENCE, MICROBATCHES, STEPS, RATE, EPS = 48, 4, 3, 0.3, 0.3
ROUTING = ROUTING | {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]}
LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "z_loss")
PREDICTION = {
    "mtp_num_layers": 1,
    "mtp_loss_scaling_factor": 0.5,
    "anyexperts_target_slots": None,
    "anyexperts_target_real": None,
    "anyexperts_budget_loss_coeff": 0.0,
    "anyexperts_spread_loss_coeff": 0.0,
    "moe_router_load_balancing_type": "none",
    "moe_z_loss_coeff": None,
}
BY_EXPERT_RANK = {"rank_max_over_mean", "rank_max_over_mean_peak", "demanded_max_over_mean"}
PICTURE, FILM, FRAMES = (1, 2, 4), (7, 2, 2), 14
DOCUMENTS = (
    ([(TEXT, 3), (IMAGE, 2), (TEXT, 4), (VIDEO, 7), (TEXT, 5)], [(TEXT, 2), (AUDIO, 4), (TEXT, 3)]),
    ([(TEXT, 30)], [(TEXT, 3)], [(AUDIO, 4), (TEXT, 1)]),
    ([(VIDEO, 7), (VIDEO, 7), (IMAGE, 2), (TEXT, 1)], [(TEXT, 1)], [(TEXT, 13), (IMAGE, 2), (TEXT, 9)]),
)
"""Of each kind of row, runs of tokens by modality."""


def microbatch(number: int) -> Microbatch:
    """A row of random tokens, about half of them targets, and of random pictures and sound."""
    random = np.random.default_rng(number)
    documents = DOCUMENTS[number % len(DOCUMENTS)]
    kinds = [kind for document in documents for kind, count in document for _ in range(count)]
    lengths = [sum(count for _, count in document) for document in documents]
    padding = SEQUENCE - len(kinds)
    runs = [kind for document in documents for kind, _ in document]
    grids = [PICTURE if kind == IMAGE else FILM for kind in runs if kind in (IMAGE, VIDEO)]
    clips = [FRAMES] * runs.count(AUDIO)
    real = np.arange(SEQUENCE) < len(kinds)
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    positions = np.concatenate([np.arange(length) for length in (*lengths, padding)])
    row = {
        "tokens": random.integers(0, VOCABULARY // 4, SEQUENCE),
        "labels": random.integers(0, VOCABULARY // 4, SEQUENCE),
        # A row with a mask, without Transformer Engine, counts no first token of a document as a target to predict.
        "loss_mask": ((random.random(SEQUENCE) < 0.5) & real & (positions > 0)).astype(np.float32),
        "position_ids": positions,
        "segment_ids": segments.astype(np.int32),
        "token_modality": np.array(kinds + [PAD] * padding, np.int8),
        "sample_modality": np.where(real, TEXT, PAD).astype(np.int8),
        "image_patches": random.normal(size=(sum(map(math.prod, grids)), SHAPE.patch_values)).astype(np.float32),
        "image_grids": np.array(grids, np.int32).reshape(-1, 3),
        "audio_features": random.normal(size=(sum(clips), SHAPE.n_mels)).astype(np.float32),
        "audio_lengths": np.array(clips, np.int32),
    }
    return collate([row], [[str(number)]])


@dataclass
class Layout:
    """Sizes as Megatron takes them; data parallelism is what is left of the world."""

    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    cap: float | None = None
    predicts: bool = False
    """With a layer of multi-token prediction, which on one rank reads the first token of the next document where a cut
    row has none: without what its routing figures act on."""

    @property
    def pattern(self) -> str:
        return "*E|*E" if self.pipeline == 2 else "*E*E/*E" if self.predicts else "*E*E"

    def build(self) -> MultimodalModel:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            self.tensor,
            self.pipeline,
            context_parallel_size=self.context,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=1,
        )
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        config = small_config(
            self.pattern,
            context_parallel_size=self.context,
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.tensor > 1,
            pipeline_model_parallel_size=self.pipeline,
            variable_seq_lengths=self.pipeline > 1,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=1,
            anyexperts_dispatch_eps=self.cap,
            **(ROUTING | (PREDICTION if self.predicts else {})),
        )
        packed_rows.install()
        arguments = small_arguments(hybrid_layer_pattern=self.pattern, seq_length=SEQUENCE)
        stage = {
            "pre_process": parallel_state.is_pipeline_first_stage(),
            "post_process": parallel_state.is_pipeline_last_stage(),
        }
        return small_model(config, arguments, **stage)

    def part(self, batch: Microbatch) -> Microbatch:
        if self.context == 1:
            return batch
        rank = parallel_state.get_context_parallel_rank()
        return cut(batch, rank, self.context, SHAPE, multiple=self.tensor)


def known_name(model: MultimodalModel, name: str) -> str:
    """The parameter's name in a model that lies on one rank."""
    if layer := re.search(r"language_model\.decoder\.layers\.(\d+)", name):
        number = model.decoder.layers[int(layer[1])].layer_number - 1
        name = name.replace(layer[0], f"language_model.decoder.layers.{number}")
    if expert := re.search(r"local_experts\.(\d+)", name):
        local = ROUTING["num_moe_experts"] // parallel_state.get_expert_model_parallel_world_size()
        number = parallel_state.get_expert_model_parallel_rank() * local + int(expert[1])
        name = name.replace(expert[0], f"local_experts.{number}")
    return name


def shard(full: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    """This tensor-parallel rank's part; the two halves of a gated layer are split one by one."""
    differing = [dim for dim, (a, b) in enumerate(zip(full.shape, shape, strict=True)) if a != b]
    if not differing:
        return full
    (dim,) = differing
    group = parallel_state.get_tensor_model_parallel_group()
    gated = "linear_fc1" in name and name.startswith("language_model")
    halves = full.chunk(2, dim) if gated else [full]
    return torch.cat([half.chunk(group.size(), dim)[group.rank()] for half in halves], dim)


def each(model: MultimodalModel, whole: dict[str, torch.Tensor]):
    """Each local parameter and controller state, with the part of the whole model's that it should equal."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            known = known_name(model, name)
            yield known, tensor, shard(whole[known], tensor.shape, known)


def state(model: MultimodalModel) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}


def load_whole(model: MultimodalModel, whole: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for _, tensor, expected in each(model, whole):
            tensor.copy_(expected)


def figures(tracker: RoutingTracker, microbatches: int, alone: bool = False) -> dict:
    """Router losses of a step, and what routing did per layer and modality, on this rank `alone` or on all."""
    losses: dict[str, torch.Tensor] = {}
    tracker.report(
        1 / microbatches, 1, total_loss_dict=losses, num_layers=2, track_names=list(LOSSES), force_initialize=True
    )
    summary = tracker.tallies["train"].drain([]) if alone else tracker.collect("train")
    return {"losses": {name: float(loss) for name, loss in losses.items()}, "routing": summary}


def prediction_loss() -> float:
    """Of one step, over all ranks; cleared."""
    MTPLossLoggingHelper.reduce_metrics_in_tracker()
    loss = float(MTPLossLoggingHelper.tracker.get("loss_values", torch.zeros(1)))
    MTPLossLoggingHelper.clean_metrics_in_tracker()
    return loss


def train_whole(predicts: bool) -> tuple[list[float], list[float], dict, dict, dict]:
    """Losses, gradient norms, the model before and after, figures: plain torch on one rank."""
    model = Layout(predicts=predicts).build()
    tracker = install_metrics(model.config, MODALITIES, log_interval=2)
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    MTPLossAutoScaler.set_loss_scale(torch.ones(1))
    losses, norms, seen = [], [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        batches = [microbatch(i) for i in range(MICROBATCHES)]
        targets = sum(batch["loss_mask"].sum() for batch in batches)
        loss = 0.0
        for batch in batches:
            with token_modality(batch["token_modality"]):
                loss += (model(**batch.select(TRAINING_INPUTS)) * batch["loss_mask"]).sum()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad /= targets
        update_controllers([model])
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()
        losses.append((loss / targets).item())
        seen = figures(tracker, MICROBATCHES, alone=True) | {"prediction": prediction_loss() / MICROBATCHES}
    return losses, norms, before, state(model), seen


def forward(batches, model):
    batch = next(batches)

    def loss_of(output):
        loss, targets = (output * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
        return loss, targets, {"loss": torch.stack((loss.detach(), targets.float()))}

    with token_modality(batch["token_modality"]):
        return model(**batch.select(TRAINING_INPUTS)), loss_of


def train(layout: Layout, before: dict) -> tuple[list[float], list[float], MultimodalModel, dict]:
    """The same on Megatron's schedule, gradient reduction and distributed optimizer."""
    model = layout.build()
    tracker = install_metrics(model.config, MODALITIES, log_interval=2)
    load_whole(model, before)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
    wrapped = DistributedDataParallel(model.config, ddp, model)
    model.config.no_sync_func = wrapped.no_sync
    settings = OptimizerConfig(
        optimizer="adam", lr=RATE, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, adam_eps=EPS,
        use_distributed_optimizer=True, clip_grad=1e6,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [wrapped])
    for group in optimizer.param_groups:
        group["lr"] = RATE
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    losses, norms, seen = [], [], {}
    for _ in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        mine = [layout.part(microbatch(i)) for i in range(rank, MICROBATCHES, ranks)]
        reduced = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(mine),
            model=wrapped,
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
        seen = figures(tracker, len(mine)) | {"prediction": prediction_loss() / len(mine)}
    return losses, norms, model, seen


def close(got, expected, where: str) -> None:
    """Compare nested figures."""
    if isinstance(expected, dict):
        for key in expected.keys() - BY_EXPERT_RANK:
            close(got[key], expected[key], f"{where}/{key}")
    else:
        torch.testing.assert_close(
            torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5,
            msg=lambda m: f"{where}: {m}",
        )  # fmt: skip


def compare(rank: int, world_size: int, layouts: list[Layout]) -> int:
    predicts = layouts[0].predicts
    losses, norms, before, after, seen = train_whole(predicts)
    if predicts:
        seen = {"prediction": seen["prediction"]}
        assert seen["prediction"] > 1
    assert losses[-1] < losses[0] - 0.05, f"no training to compare: {losses}"
    for layout in layouts:
        got_losses, got_norms, model, got_seen = train(layout, before)
        torch.testing.assert_close(torch.tensor(got_losses), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(got_norms), torch.tensor(norms), rtol=1e-4, atol=1e-5)
        for name, tensor, expected in each(model, after):
            torch.testing.assert_close(
                tensor.detach(), expected, rtol=1e-4, atol=2e-5, msg=lambda m, label=f"{layout} {name}: ": label + m
            )
        close(got_seen, seen, str(layout))
    return len(layouts)


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (2, [Layout(context=2), Layout(context=2, expert=2)]),
        (2, [Layout(context=2, predicts=True)]),
        (4, [Layout(context=2, tensor=2), Layout(context=2, expert=2), Layout(context=2, pipeline=2)]),
    ],
    ids=["CP2, CP2 x EP2", "CP2 with multi-token prediction", "CP2 x TP2+SP, CP2 x EP2 x DP2, CP2 x PP2"],
)
def test_cut_rows_train_like_whole_ones(world_size, layouts):
    assert run_ranks(compare, world_size, layouts) == [len(layouts)] * world_size


def first_load(model: MultimodalModel, layout: Layout) -> LoadReport:
    """What the first mixture layer sends of one row."""
    batch = layout.part(microbatch(0))
    loads: list[LoadReport] = []
    observed = layer.observe
    layer.observe = lambda number, decision, load, *others, **named: loads.append(load)
    try:
        model(**batch.select(TRAINING_INPUTS))
    finally:
        layer.observe = observed
    return loads[0]


def cap_of_a_row(rank: int, world_size: int, eps: float) -> tuple[int, int, int]:
    model = Layout().build()
    demanded_2 = first_load(model, Layout()).received_E.view(2, -1).sum(1)
    whole, layout = state(model), Layout(context=2, expert=2, cap=eps)
    model = layout.build()
    load_whole(model, whole)
    load = first_load(model, layout)
    assert load.demanded_P.tolist() == demanded_2.tolist()
    assert load.cap == slot_cap(demanded_2.sum(), 2, eps)
    assert load.received_P.max() <= load.cap
    moved = (demanded_2 - load.cap).clamp(min=0).sum()
    assert 0 < moved <= load.rerouted + load.displaced
    return int(load.cap), int(moved), int(load.received_P.sum())


def test_the_cap_is_that_of_the_whole_row():
    one, other = run_ranks(cap_of_a_row, 2, 0.05)
    assert one == other
