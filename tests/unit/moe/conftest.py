"""One process as the whole world: process groups of size 1."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


@pytest.fixture(scope="package")
def _world(tmp_path_factory):
    if torch.distributed.is_initialized():  # another package's fixture lives on until the session ends
        yield
        return
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(_world):
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
