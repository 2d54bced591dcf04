"""Says what accelerates this installation, what is missing, and whether a configuration can run on it.

    anyexperts doctor [--config FILE.yaml] [--ranks N] [any flag of the training command line]

Ends with exit code 1 when the configuration cannot run here, 2 when it cannot be read, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from unittest.mock import patch

from megatron_anyexperts.checks import driver as drivers
from megatron_anyexperts.checks.driver import Driver
from megatron_anyexperts.console import quiet_imports
from megatron_anyexperts.platform import cpu, seams

FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Least CUDA compute capability of each FP8 recipe."""

STORAGE = {
    "s3": ("boto3", "pip install 'multi-storage-client[boto3]'"),
    "gs": ("google.cloud.storage", "pip install 'multi-storage-client[google-cloud-storage]'"),
    "azure": ("azure.storage.blob", "pip install 'multi-storage-client[azure-storage-blob]'"),
}
"""Object stores: the package that the storage client needs for each, and how to get it."""

HOW_TO_GET = {
    "CUDA": "run on a machine with an NVIDIA GPU and a driver that fits the CUDA version torch was built for",
    "NVIDIA driver": "comes with the machine, not with torch",
    "NCCL": "comes with the CUDA build of torch",
    "Transformer Engine": "./bootstrap.sh dev,fp8 in the checkout; it is compiled by a C++ compiler",
    "FP8": "needs Transformer Engine and a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)",
    "apex": "build from https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext; training switches gradient "
    "accumulation fusion off without it, also in Transformer Engine's layers",
    "flash attention": "pip install flash-attn; Transformer Engine brings cuDNN's fused attention without it",
    "DeepEP": "build from https://github.com/deepseek-ai/DeepEP; not used by the dynamic-slot dispatcher",
    "asynchronous checkpoints": "pip install nvidia-resiliency-ext, or pass --async-strategy mcore",
}
"""Way to each accelerator that may be missing."""


@dataclass(frozen=True)
class Installation:
    """What is there. Versions are None where a package cannot be imported."""

    torch: str
    megatron: str
    cuda: str | None = None
    """Version that torch was built for."""
    driver: Driver = Driver()
    capability: tuple[int, int] | None = None
    """CUDA compute capability of the first GPU; None without CUDA."""
    gpus: tuple[str, ...] = ()
    nccl: str | None = None
    transformer_engine: str | None = None
    apex: str | None = None
    flash_attention: str | None = None
    deep_ep: str | None = None
    resiliency: str | None = None
    storage: tuple[str, ...] = ()
    """Keys of `STORAGE` that can be read."""

    @property
    def driver_problem(self) -> str | None:
        """Why the driver keeps torch from a GPU; None if it does not."""
        return drivers.problem(self.driver, self.cuda, self.capability is not None)

    @property
    def fp8_recipes(self) -> tuple[str, ...]:
        """FP8 recipes that GPU and Transformer Engine support."""
        if self.transformer_engine is None or self.capability is None:
            return ()
        return tuple(recipe for recipe, least in FP8_CAPABILITY.items() if self.capability >= least)


def importable(module: str, distribution: str | None = None) -> str | None:
    """Version of an optional package, None where importing it fails for whatever reason."""
    try:
        loaded = importlib.import_module(module)
    except Exception:  # a package built for another CUDA fails with OSError, RuntimeError or worse
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution or module)
    return str(getattr(loaded, "__version__", "unknown version"))


def inspect_installation() -> Installation:
    """Look at the machine and the Python environment of this process."""
    import torch

    cuda = torch.cuda.is_available()
    return Installation(
        torch=torch.__version__,
        megatron=importlib.metadata.version("megatron-core"),
        cuda=torch.version.cuda,
        driver=drivers.look(),
        capability=torch.cuda.get_device_capability(0) if cuda else None,
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) if cuda else (),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None,
        transformer_engine=importable("transformer_engine.pytorch", "transformer_engine"),
        apex=importable("fused_weight_gradient_mlp_cuda", "apex"),
        flash_attention=importable("flash_attn", "flash-attn"),
        deep_ep=importable("deep_ep"),
        resiliency=importable("nvidia_resiliency_ext", "nvidia-resiliency-ext"),
        storage=tuple(scheme for scheme, (module, _) in STORAGE.items() if importable(module)),
    )


def report(found: Installation) -> str:
    """One line per accelerator: what is there, or how to get it."""
    rows = {
        "CUDA": found.gpus and f"{', '.join(found.gpus)}; compute capability {'.'.join(map(str, found.capability))}",
        "NVIDIA driver": drivers.describe(found.driver, found.cuda),
        "NCCL": found.nccl,
        "Transformer Engine": found.transformer_engine,
        "FP8": ", ".join(found.fp8_recipes),
        "apex": found.apex,
        "flash attention": found.flash_attention,
        "DeepEP": found.deep_ep,
        "asynchronous checkpoints": found.resiliency and f"nvidia-resiliency-ext {found.resiliency}",
    }
    lines = [f"torch {found.torch}, megatron-core {found.megatron}"]
    if found.driver_problem:
        lines.append(f"  {'no GPU:':26}{found.driver_problem}")
    lines += [f"  {name:26}{value or f'missing: {HOW_TO_GET[name]}'}" for name, value in rows.items()]
    for scheme, (_, way) in STORAGE.items():
        lines.append(f"  {f'storage {scheme}':26}{'available' if scheme in found.storage else f'missing: {way}'}")
    if found.capability is None:
        lines.append("Training runs on the CPU with gloo: --transformer-impl local --distributed-backend gloo")
    return "\n".join(lines)


def missing_for(args: argparse.Namespace, found: Installation) -> list[str]:
    """What the parsed flags need and the installation lacks; each with the way out.

    Args:
        args: Megatron's arguments, not necessarily validated.
        found: what is there.
    """
    problems = []

    def need(asked: object, present: object, text: str) -> None:
        if asked and not present:
            problems.append(text)

    te = found.transformer_engine and found.capability
    asks_cuda = args.transformer_impl == "transformer_engine" or args.distributed_backend == "nccl"
    need(asks_cuda and found.driver_problem, False, f"CUDA: {found.driver_problem}")
    need(
        args.transformer_impl == "transformer_engine",
        te,
        f"transformer-impl: transformer_engine needs CUDA and Transformer Engine ({HOW_TO_GET['Transformer Engine']}), "
        "or transformer-impl: local",
    )
    need(args.distributed_backend == "nccl", found.nccl, "distributed-backend: nccl needs CUDA; use gloo on a CPU")
    if args.fp8:
        recipe = str(getattr(args.fp8_recipe, "value", args.fp8_recipe))
        usable = ", ".join(found.fp8_recipes) or "none"
        least = ".".join(map(str, FP8_CAPABILITY.get(recipe, ("?",))))
        need(
            args.fp8,
            recipe in found.fp8_recipes,
            f"fp8 with fp8-recipe: {recipe} needs Transformer Engine and compute capability {least}; usable here: "
            f"{usable}; remove the fp8 keys to train in bf16",
        )
        need(args.fp8, args.transformer_impl != "local", "fp8 needs transformer-impl: transformer_engine")
    need(
        args.moe_grouped_gemm,
        te and found.capability >= (8, 0),
        "moe-grouped-gemm needs Transformer Engine and compute capability 8.0; remove the key",
    )
    need(
        args.apply_rope_fusion,
        found.transformer_engine,
        "rope fusion needs Transformer Engine; set no-rope-fusion: true",
    )
    need(
        args.attention_backend.name == "flash",
        found.flash_attention,
        f"attention-backend: flash needs flash attention ({HOW_TO_GET['flash attention']})",
    )
    need(args.async_save, found.capability, "async-save needs CUDA: Megatron's writer process dies without it")
    for path in (*(args.data_path or ()), args.save, args.load):
        scheme = str(path).partition("://")[0]
        if scheme in STORAGE:
            need(path, scheme in found.storage, f"{path} needs {STORAGE[scheme][1]}")
    return problems


def least_ranks(args: argparse.Namespace) -> int:
    """The smallest number of ranks that the parallel sizes allow."""
    dense = args.tensor_model_parallel_size * args.context_parallel_size
    expert = (args.expert_tensor_parallel_size or args.tensor_model_parallel_size) * args.expert_model_parallel_size
    return args.pipeline_model_parallel_size * math.lcm(dense, expert)


def parse_config(cli: list[str]) -> argparse.Namespace:
    """Parse the training command line without validating it; see `training.arguments.merge`."""
    from megatron.training.arguments import parse_args

    from megatron_anyexperts.training.arguments import add_arguments, merge

    words = merge(cli)
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        return parse_args(extra_args_provider=add_arguments)
    finally:
        sys.argv = before


@contextlib.contextmanager
def as_if_complete() -> Iterator[None]:
    """Let Megatron find a GPU and Transformer Engine: its checks of hardware would hide what else it refuses."""
    from packaging.version import Version

    rope = "megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb"
    with (
        patch("torch.cuda.get_device_capability", lambda *_: max(FP8_CAPABILITY.values())),
        patch("megatron.core.utils.get_te_version", lambda: Version("99")),
        patch(rope, lambda *_: None),
        patch("megatron_anyexperts.training.arguments.has_cuda", lambda: True),
    ):
        yield


def refused_by_training(args: argparse.Namespace, ranks: int | None, complete: bool = False) -> str | None:
    """What training would say after validating the flags for that many ranks; None if it would start.

    Args:
        args: parsed, not validated; changed by validation.
        ranks: size of the job; `least_ranks` if None.
        complete: as a machine with a GPU and Transformer Engine would say it.
    """
    from megatron.training.arguments import validate_args

    from megatron_anyexperts.training.arguments import refuse_size
    from megatron_anyexperts.training.pretrain import DEFAULTS, check
    from megatron_anyexperts.training.usage import reason

    args.world_size = ranks or least_ranks(args)
    try:
        with contextlib.redirect_stdout(io.StringIO()), as_if_complete() if complete else contextlib.nullcontext():
            refuse_size(args)
            validate_args(args, dict(DEFAULTS))
            check(args)
    except (ValueError, AssertionError) as error:
        return f"as a job of {args.world_size} rank(s): {reason(error)}"
    return None


def parser() -> argparse.ArgumentParser:
    """The flags of this command; all others are those of training."""
    own = argparse.ArgumentParser(
        description="Print what accelerates this installation and what is missing; check a configuration against it.",
        epilog="Every other flag is one of the training command line and overrides the configuration.",
        allow_abbrev=False,
    )
    own.add_argument("--config", help="YAML file of training flags to check")
    own.add_argument("--ranks", type=int, help="size of the job; default: the smallest its parallel sizes allow")
    own.add_argument("--json", action="store_true", help="print what was found as JSON")
    own.add_argument("--seams", action="store_true", help="print what is changed in Megatron, Energon and torch")
    return own


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    quiet_imports()
    # Megatron asserts it when it validates tensor parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    chosen, flags = parser().parse_known_args(cli)
    if chosen.seams:
        rows = [{**asdict(seam), "name": seam.name} for seam in seams.seams()]
        print(json.dumps(rows) if chosen.json else seams.describe())
        return 0
    found = inspect_installation()
    print(json.dumps(asdict(found)) if chosen.json else report(found))
    if chosen.config is None and not flags:
        return 0
    from megatron_anyexperts.training.arguments import UsageError

    cpu.bridge(training=True)
    try:
        args = parse_config([*(["--config", chosen.config] if chosen.config else []), *flags])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems = missing_for(args, found)
    if refusal := refused_by_training(args, chosen.ranks, complete=bool(problems)):
        problems.append(refusal)
    name = chosen.config or "The given flags"
    if not problems:
        print(f"{name} can run here as a job of {args.world_size} rank(s).")
        return 0
    print(f"{name} cannot run here:", *(f"  - {problem}" for problem in problems), sep="\n", file=sys.stderr)
    return 1
