"""The multimodal model under tensor, sequence and pipeline parallelism computes what one rank computes."""


import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from tests.multirank import run_ranks
from tests.unit.models.small import DYNAMIC, media_batch, small_arguments, small_config, small_model


def start(tensor: int = 1, pipeline: int = 1, **others: int) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline, **others)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)


def losses_and_gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """On one rank, before any splitting."""
    start()
    model = small_model(small_config(qk_layernorm=True))
    losses = model(**media_batch())
    losses.square().mean().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def compare_tensor_parallel(rank: int, world_size: int, sequence_parallel: bool) -> list[str]:
    expected_losses, expected = losses_and_gradients()
    start(tensor=world_size)
    config = small_config(tensor_model_parallel_size=world_size, sequence_parallel=sequence_parallel, qk_layernorm=True)
    model = small_model(config)
    losses = model(**media_batch())
    losses.square().mean().backward()
    torch.testing.assert_close(losses.detach(), expected_losses)
    checked = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if getattr(parameter, "tensor_model_parallel", False):
            squares = gradient.square().sum()
            torch.distributed.all_reduce(squares)
            torch.testing.assert_close(squares, expected[name].square().sum(), msg=lambda m, name=name: f"{name}: {m}")
        else:
            # What Megatron's gradient finalisation sums over the tensor-parallel ranks.
            if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
                torch.distributed.all_reduce(gradient)
            torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")
        checked.append(name)
    assert set(checked) == set(expected)
    return checked


def test_tensor_parallel_losses_and_gradients_are_those_of_one_rank():
    run_ranks(compare_tensor_parallel, 2, False)


def test_sequence_parallel_losses_and_gradients_are_those_of_one_rank():
    run_ranks(compare_tensor_parallel, 2, True)


def shards(model: torch.nn.Module) -> list[ShardedTensor]:
    state = model.sharded_state_dict()
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give `target` its part of the weights of `source`, which is not split."""
    whole = {}
    for shard in shards(source):
        whole.setdefault(shard.key, torch.zeros(shard.global_shape))[shard.global_slice()] = shard.data
    for shard in shards(target):
        shard.data.copy_(whole[shard.key][shard.global_slice()])


def compare_mixture(rank: int, world_size: int) -> None:
    pattern = "*-*E*E/*E"
    arguments = small_arguments(hybrid_layer_pattern=pattern)
    batch = media_batch()
    batch["loss_mask"] = (batch["segment_ids"] > 0).float()
    routing = DYNAMIC | {"mtp_num_layers": 1, "moe_shared_expert_intermediate_size": 16, "qk_layernorm": True}
    start()
    whole = small_model(small_config(pattern, **routing), arguments)
    expected = whole(**batch).detach()
    start(tensor=world_size, expert_model_parallel_size=world_size, expert_tensor_parallel_size=1)
    sizes = {"tensor_model_parallel_size": world_size, "sequence_parallel": True}
    sizes |= {"expert_model_parallel_size": world_size, "expert_tensor_parallel_size": 1}
    split = small_model(small_config(pattern, **routing, **sizes), arguments)
    copy_weights(whole, split)
    torch.testing.assert_close(split(**batch).detach(), expected)


def test_dynamic_experts_split_with_the_sequence_give_the_losses_of_one_rank():
    run_ranks(compare_mixture, 2)


def compare_pipeline_parallel(rank: int, world_size: int) -> tuple[bool, int]:
    start()
    whole = small_model(small_config())
    expected = whole(**media_batch()).detach()
    start(pipeline=world_size)
    first, last = rank == 0, rank == world_size - 1
    config = small_config(pipeline_model_parallel_size=world_size)
    stage = small_model(config, pre_process=first, post_process=last)
    weights = dict(whole.named_parameters())
    for name, parameter in stage.named_parameters():
        path = name.split(".")
        if path[:3] == ["language_model", "decoder", "layers"]:
            path[3] = str(stage.decoder.layers[int(path[3])].layer_number - 1)
        parameter.data.copy_(weights[".".join(path)])
    if first:
        torch.distributed.send(stage(**media_batch()).detach(), dst=1)
    else:
        hidden = torch.empty(12, 1, config.hidden_size)
        torch.distributed.recv(hidden, src=0)
        stage.set_input_tensor([hidden])
        torch.testing.assert_close(stage(**media_batch()).detach(), expected)
    return stage.vision is not None, len(stage.decoder.layers)


def test_pipeline_stages_give_the_losses_of_one_rank_and_only_the_first_has_encoders():
    assert run_ranks(compare_pipeline_parallel, 2) == [(True, 2), (False, 2)]
