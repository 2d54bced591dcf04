"""Every test runs over the same CPU bridge as training does."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it for tensor parallelism

from megatron_anyexperts.platform import cpu

cpu.bridge()
