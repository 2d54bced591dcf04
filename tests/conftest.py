"""Every test runs over the same CPU bridge as training does; what shares a costly fixture runs in one process."""

import os

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it for tensor parallelism
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
if not torch.cuda.is_available():
    # Transformer Engine, where it is installed, loads this in place of its extension; see there what that replaces.
    os.environ.setdefault("NVTE_PLUGIN", "tests.te.reference")

from megatron_anyexperts.platform import cpu

cpu.bridge()

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", deadline=None)
# A change is judged by the same examples whenever it is judged; `make test` of a working copy looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "untimed"))

# Folders whose fixtures are made once a session: a Slurm cluster, whose ports are fixed, and shards with a tokenizer.
TOGETHER = ("tests/slurm", "tests/feed")


class _Together(LoadScopeScheduling):
    """Tests go to processes by file, or by folder where a folder shares what it makes."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return next((folder for folder in TOGETHER if path.startswith(folder)), path)


# Not pytest-xdist's groups: they are without effect under pytest 9.2 (pytest-xdist 3.8).
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> _Together:
    return _Together(config, log)
