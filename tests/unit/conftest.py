"""One process as the whole world, and small models to build."""


import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_logging


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """torch.distributed and Megatron's groups with a single rank; one per session, whichever package asks first."""
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(world):
    """Groups of size 1, every generator seeded, and no figures of other models."""
    moe_logging.destroy_moe_metrics_tracker()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)


@pytest.fixture
def make_model(one_rank):
    """`make_model(arguments={...}, **config)` builds a multimodal model with the same weights every time."""
    from tests.unit.models.small import small_arguments, small_config, small_model

    def make(arguments: dict | None = None, **config):
        torch.manual_seed(1)
        arguments = small_arguments(**(arguments or {}))
        return small_model(small_config(arguments["hybrid_layer_pattern"] or "*-", **config), arguments)

    return make
