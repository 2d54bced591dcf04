"""GPUs and links that a plan reckons with, and which part of their peaks training reaches."""

from dataclasses import dataclass

GIB = 2**30

GPUS_PER_NODE = 8
"""Of DGX and HGX machines; their NVLink joins the GPUs of a node."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight. Peaks are dense, of the data sheet; bandwidths are one way.

    Attributes:
        memory: bytes that a process can have.
        bf16, fp8: operations a second of matrix products.
        hbm: bytes a second of its own memory.
        nvlink, network: bytes a second to the other GPUs of the node together, and out of the node.
    """

    memory: float
    bf16: float
    fp8: float
    hbm: float
    nvlink: float
    network: float


GPUS = {
    # H100 SXM data sheet: 80 GB, of which the driver leaves 79 GiB; DGX H100: one ConnectX-7 of 400 Gb/s a GPU.
    "h100": Gpu(79 * GIB, 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9),
    # H200 SXM data sheet: 141 GB; otherwise an H100.
    "h200": Gpu(139 * GIB, 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9),
    # DGX B200 data sheet, a GPU's eighth: 180 GB, 72 PFLOP/s of FP8 with sparsity, 64 TB/s, 14.4 TB/s of NVLink both
    # ways, 400 Gb/s.
    "b200": Gpu(178 * GIB, 2250e12, 4500e12, 8e12, 900e9, 50e9),
}


def gpu_named(device: str) -> Gpu | None:
    """The GPU that the driver calls `device`, "NVIDIA H100 80GB HBM3"; None for others, PCIe cards among them."""
    words = device.lower().split()
    return None if "pcie" in words else next((gpu for name, gpu in GPUS.items() if name in words), None)


@dataclass(frozen=True)
class Efficiency:
    """Reached parts of the peaks: assumptions, the same for every model, GPU and layout; none is fitted to a run.

    Attributes:
        bf16, fp8: of large matrix products; FP8 reaches less, because operands are quantised on the way.
        grouped: what small products of experts reach of that again.
        attention: of the bf16 peak, forward and backward, causal.
        hbm, nvlink, network: of the bandwidths.
        hidden: of the gradient and parameter exchange, behind computation, where overlap is on.
        launch: seconds between two kernels.
        wait: seconds of a host synchronisation; a mixture layer has one, forward and recomputed.
        whole: what stragglers, the loader and the allocator leave of a step.
        fill: of a GPU's memory, the most that a plan fills; the rest is for fragments, NCCL, cuBLAS, the context.
    """

    bf16: float = 0.70
    fp8: float = 0.60
    grouped: float = 0.75
    attention: float = 0.50
    hbm: float = 0.75
    nvlink: float = 0.75
    network: float = 0.80
    hidden: float = 0.90
    launch: float = 2e-6
    wait: float = 50e-6
    whole: float = 0.90
    fill: float = 0.92


ASSUMED = Efficiency()
