"""What single ranks run in the multi-rank tests of the layer."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.losses import token_weights
from tests.unit.moe.builders import HIDDEN, config, layer

TOKENS, ROWS = 16, 4
DYNAMIC = {
    "anyexperts_k_min": 2,
    "anyexperts_k_max": 6,
    "anyexperts_rho_max": 0.35,
    "anyexperts_target_slots": 3.5,
    "anyexperts_target_real": 3.0,
    "anyexperts_learn_alpha": True,
    "anyexperts_virtual_kind": "constant",
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_z_loss_coeff": 0.01,
}
# Not linear in the tokens of a microbatch, hence equal only where the ranks share one (tensor parallelism).
SHARED_LOSSES = {
    "anyexperts_importance_gradient": "centred",
    "anyexperts_spread_loss_coeff": 0.1,
    "anyexperts_budget_loss_coeff": 0.1,
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
}


class Net(MegatronModule):
    """One residual mixture layer."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.layer = layer(cfg)

    def forward(self, x, padding_mask=None):
        return x + self.layer(x, padding_mask=padding_mask)[0]


def start(tensor: int = 1, expert: int = 1, **options) -> Net:
    """Set up process groups and build the same model in every layout."""
    initialize(tensor, expert)
    return build(tensor, expert, **options)


def initialize(tensor: int, expert: int) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, expert_model_parallel_size=expert, expert_tensor_parallel_size=1
    )
    model_parallel_cuda_manual_seed(1)


def build(tensor: int, expert: int, **options) -> Net:
    cfg = config(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=tensor > 1,
        **(DYNAMIC | options),
    )
    net = Net(cfg)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(net.named_parameters()):
            if ".experts." in name:
                number = int(name.split(".")[name.split(".").index("local_experts") + 1])
                generator = torch.Generator().manual_seed(100 + net.layer.local_expert_indices[number])
                parameter.normal_(std=0.1, generator=generator)
            else:
                parameter.normal_(std=0.3)
    return net


def wrap(net: Net, **ddp) -> DistributedDataParallel:
    inner = Float16Module(net.config, net) if net.config.bf16 else net
    return DistributedDataParallel(net.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp), inner)


def local_batch(step: int) -> torch.Tensor:
    """This rank's rows (data parallel) and part of the sequence (tensor parallel) of one global batch."""
    full = torch.randn(TOKENS, ROWS, HIDDEN, generator=torch.Generator().manual_seed(step))
    rows = full.chunk(parallel_state.get_data_parallel_world_size(), dim=1)[parallel_state.get_data_parallel_rank()]
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return rows.chunk(tensor, dim=0)[parallel_state.get_tensor_model_parallel_rank()].contiguous()


def train(model: DistributedDataParallel, steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Forward, backward and Megatron's gradient finalisation, no optimizer; return each step's controller state."""
    states = []
    for step in range(steps):
        model.zero_grad_buffer()
        x = local_batch(step).to(dtype)
        shards = parallel_state.get_tensor_model_parallel_world_size()
        loss = model(x).float().square().sum() / (TOKENS * ROWS)
        # The gradient is averaged over data-parallel ranks and summed over sequence shards.
        (loss * (parallel_state.get_data_parallel_world_size() if shards == 1 else 1)).backward()
        model.config.finalize_model_grads_func([model])
        control = mixture(model).router.control
        states.append(torch.cat((control.slot_offset, control.virtual_bias, mixture(model).router.expert_bias)).clone())
    return states


def mixture(model) -> AnyExpertsMoELayer:
    return next(module for module in model.modules() if isinstance(module, AnyExpertsMoELayer))


def dense_gradients(model) -> dict[str, torch.Tensor]:
    return {
        name.split("layer.")[-1]: parameter.main_grad.clone()
        for name, parameter in model.named_parameters()
        if ".experts." not in name
    }


LAYOUTS = {
    "dp2": (1, 1, {}),
    "ep2": (1, 2, {}),
    "tp2": (2, 1, SHARED_LOSSES),
    "tp2ep2": (2, 2, SHARED_LOSSES),
    "tp2 kernels": (2, 1, SHARED_LOSSES | {"anyexperts_kernels": "on"}),
}


def gradients_and_states(tensor: int, expert: int, options: dict) -> tuple:
    model = wrap(start(tensor, expert, **options))
    states = train(model, 3)
    result = dense_gradients(model), states
    parallel_state.destroy_model_parallel()
    return result


LOSSES = {
    "aux": {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [1.0]},
    "seq": {"moe_router_load_balancing_type": ["seq_aux_loss"], "moe_aux_loss_coeff": [1.0]},
    "global": {"moe_router_load_balancing_type": ["global_aux_loss"], "moe_aux_loss_coeff": [1.0]},
    "z": {"moe_z_loss_coeff": 1.0},
    "budget": {"anyexperts_budget_loss_coeff": 1.0},
    "spread": {"anyexperts_spread_loss_coeff": 1.0, "anyexperts_spread_target": 0.5},
}
STATIC = {
    "anyexperts_k_min": 4,
    "anyexperts_k_max": 4,
    "anyexperts_rho_max": 0.0,
    "anyexperts_target_slots": None,
    "anyexperts_target_real": None,
    "anyexperts_virtual_kind": "identity",
}
LOSS_LAYOUTS = {"dp2": (1, 1), "ep2": (1, 2), "tp2": (2, 1)}


def masks(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding and loss mask [ROWS, TOKENS] of one global batch: from no target in half of the rows to all tokens."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.arange(TOKENS) >= TOKENS - torch.randint(0, 12, (ROWS, 1), generator=generator)
    share = torch.rand(ROWS // 2, generator=generator) ** 3
    share[seed % 2] *= seed > 0
    targets = torch.rand(ROWS, TOKENS, generator=generator) < share.repeat_interleave(2)[:, None]
    return padding, (targets & ~padding).float()


def loss_gradients(layout: tuple[int, int], loss: dict, seed: int | None, together: bool) -> dict[str, torch.Tensor]:
    """Gradients of a step of which only the router's losses are left, in two microbatches of two rows.

    Args:
        layout: tensor- and expert-parallel size.
        seed: of the masks; None: all tokens are targets.
        together: one microbatch on the data-parallel ranks together instead.
    """
    model = wrap(build(*layout, **({"moe_z_loss_coeff": None, "calculate_per_token_loss": True} | loss)))
    padding, targets = masks(seed) if seed is not None else (torch.zeros(ROWS, TOKENS) > 0, torch.ones(ROWS, TOKENS))
    hidden = local_batch(0)
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = torch.arange(ROWS).chunk(size)[rank]
    number = torch.zeros((), dtype=torch.int64)
    parts = [slice(None)] if together or size > 1 else [slice(0, 2), slice(2, 4)]
    # As Megatron's schedules do.
    per_target = model.config.calculate_per_token_loss
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()) / (1 if per_target else len(parts)))
    for part in parts:
        mask = targets[rows[part]]
        number += mask.sum().long()
        weights = token_weights(padding[rows[part]], mask)
        (model(hidden[:, part].contiguous(), weights).sum() * 0).backward()
    model.config.finalize_model_grads_func([model], number if per_target else None)
    return dense_gradients(model)


def all_loss_gradients(layout: tuple[int, int]) -> dict[str, dict[str, torch.Tensor]]:
    initialize(*layout)
    gradients = {name: loss_gradients(layout, *case) for name, case in loss_cases().items()}
    parallel_state.destroy_model_parallel()
    return gradients


def loss_cases() -> dict[str, tuple]:
    """Loss options, seeds of the masks, and whether the ranks share one microbatch, by name."""
    cases = {}
    for name, loss in LOSSES.items():
        for seed in (0, 1, 2):
            cases[f"{name} {seed}"] = (loss, seed, name == "global")
    for name in ("aux", "seq", "global", "z", "spread"):
        cases[f"static {name}"] = (LOSSES[name] | STATIC, 3, name == "global")
    for name in ("aux", "global", "z"):
        cases[f"mean of microbatches {name}"] = (
            LOSSES[name] | {"calculate_per_token_loss": False},
            None,
            name == "global",
        )
    return cases


def reference(rank: int, world_size: int) -> tuple[list[tuple], dict[str, dict]]:
    runs = [gradients_and_states(1, 1, options) for options in ({}, SHARED_LOSSES)]
    return runs, all_loss_gradients((1, 1))


def all_layouts(rank: int, world_size: int) -> tuple[dict[str, tuple], dict[str, dict]]:
    runs = {name: gradients_and_states(*layout) for name, layout in LAYOUTS.items()}
    return runs, {name: all_loss_gradients(layout) for name, layout in LOSS_LAYOUTS.items()}


def save_and_load(rank: int, world_size: int, folder: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Controller state as saved and as loaded by another layout, for EP 2 -> 1 and 1 -> 2."""
    pairs = []
    for saved, loaded in ((2, 1), (1, 2)):
        model = wrap(start(1, saved))
        states = train(model, 3)
        target = Path(folder, str(saved))
        if rank == 0:
            target.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(mixture(model).sharded_state_dict(), str(target))
        parallel_state.destroy_model_parallel()

        net = start(1, loaded)
        net.layer.load_state_dict(dist_checkpointing.load(net.layer.sharded_state_dict(), str(target)))
        router = net.layer.router
        restored = torch.cat((router.control.slot_offset, router.control.virtual_bias, router.expert_bias))
        pairs.append((states[-1], restored.clone()))
        parallel_state.destroy_model_parallel()
    return pairs


def padding_under_cap() -> tuple[float, bool, bool]:
    """Largest change of real outputs by as much padding, on EP 2; whether loads agree; whether the cap acted."""
    static = STATIC | {"anyexperts_k_min": 2, "anyexperts_k_max": 2, "moe_router_topk": 2}
    net = start(1, 2, **static, anyexperts_dispatch_eps=0.05).layer.eval()
    rank = parallel_state.get_expert_model_parallel_rank()
    hidden = torch.randn(256, 1, HIDDEN, generator=torch.Generator().manual_seed(rank))
    real = 128
    # The same padding everywhere wants the same experts: it would be most of the load.
    padded = torch.cat((hidden[:real], torch.ones(256 - real, 1, HIDDEN)))
    mask = (torch.arange(256) >= real)[None]
    outputs, loads = [], []
    dispatch = net.dispatcher.dispatch
    net.dispatcher.dispatch = lambda *args: loads.append((sent := dispatch(*args)).load) or sent
    with torch.no_grad():
        for x, m in ((padded, mask), (hidden[:real], None)):
            outputs.append(net(x, padding_mask=m)[0][:real])
    parallel_state.destroy_model_parallel()
    same = torch.equal(loads[0].demanded_P, loads[1].demanded_P) and loads[0].rerouted == loads[1].rerouted
    return (outputs[0] - outputs[1]).abs().max().item(), bool(same), bool(loads[1].rerouted > 0)


def skipped_step(model: DistributedDataParallel, rank: int) -> bool:
    """Whether controllers and expert bias stood still in a step in which one gradient of rank 1 overflowed."""
    router = mixture(model).router
    state = [router.control.slot_offset, router.control.virtual_bias, router.expert_bias]
    before = [tensor.clone() for tensor in state]
    model.zero_grad_buffer()
    model(local_batch(9).to(router.weight.dtype)).float().sum().backward()
    if rank == 1:
        next(p for name, p in model.named_parameters() if ".experts." in name).main_grad[0, 0] = float("inf")
    model.config.finalize_model_grads_func([model])
    counted = router.control.counts.any() or router.local_tokens_per_expert.any()
    return all(torch.equal(a, b) for a, b in zip(state, before, strict=True)) and not counted


def without_sequence_parallelism() -> tuple[str, bool]:
    """What the layer says to tensor parallelism alone in training, and whether it runs in evaluation."""
    net = start(2, 1)
    net.config.sequence_parallel = False
    said = ""
    try:
        net(local_batch(0))
    except ValueError as error:
        said = str(error)
    with torch.no_grad():
        finite = bool(net.eval()(local_batch(0)).isfinite().all())
    parallel_state.destroy_model_parallel()
    return said, finite


def two_ranks(rank: int, world_size: int) -> tuple[dict[str, torch.dtype], bool, tuple, tuple]:
    """Dtypes of a bf16 model with every counter, whether it stands still in an overflow, padding under a cap, and
    tensor parallelism alone."""
    model = wrap(start(1, 2, bf16=True, params_dtype=torch.bfloat16, **SHARED_LOSSES))
    states = train(model, 3, torch.bfloat16)
    assert states[-1].abs().min() > 0
    layer_ = mixture(model)
    seen = {name: parameter.dtype for name, parameter in layer_.named_parameters() if ".experts." not in f".{name}"}
    seen |= {name: buffer.dtype for name, buffer in layer_.named_buffers()}
    still = skipped_step(model, rank)
    parallel_state.destroy_model_parallel()
    return seen, still, padding_under_cap(), without_sequence_parallelism()
