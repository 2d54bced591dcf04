"""The first lines of a training: what it was given, and what became of it."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.energon import WorkerConfig

from megatron_anyexperts.console import say
from megatron_anyexperts.data.blend import open_blend
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.copy_price import settle

PARTS = ("experts", "rest of the decoder", "embeddings", "vision", "audio")


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter of the multimodal model belongs to."""
    if name.startswith(("vision.", "audio.")):
        return name.partition(".")[0]
    if ".experts." in name:
        return "experts"
    return "embeddings" if "embedding" in name or "output_layer" in name else "rest of the decoder"


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of one pipeline stage by part, those of all tensor- and expert-parallel ranks together.

    Args:
        model: without a data-parallel wrapper.
    """
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if getattr(parameter, "shared", False):  # the copy that a last stage has of tied embeddings
            continue
        expert = not getattr(parameter, "allreduce", True)
        split = getattr(parameter, "tensor_model_parallel", False)
        copies = mpu.get_expert_model_parallel_world_size() if expert else 1
        if split:
            tensor = mpu.get_expert_tensor_parallel_world_size if expert else mpu.get_tensor_model_parallel_world_size
            copies *= tensor()
        counts[part_of(name)] += parameter.numel() * copies
    return dict(counts)


def model_line(counts: dict[str, int], real_slots: float, experts: int) -> str:
    """Size of the model.

    Args:
        counts: parameters by part, of all pipeline stages.
        real_slots: real slots that a token gets on average.
        experts: real experts of a layer.
    """
    total = sum(counts.values())
    active = total - counts.get("experts", 0) * (1 - min(1.0, real_slots / experts))
    parts = ", ".join(f"{part} {short(counts[part])}" for part in PARTS if counts.get(part))
    return f"model: {short(total)} parameters, {short(active)} active for a token ({parts})"


def short(number: float) -> str:
    """A count with three digits: 108 k, 1.45 M, 16.3 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:.0f}"


def expected_real_slots(args: argparse.Namespace, config: AnyExpertsConfig) -> float:
    """Real slots per token that the flags aim at."""
    if args.anyexperts_stock_moe or config.anyexperts_k_max is None:
        return config.moe_router_topk
    return config.anyexperts_target_real or config.anyexperts_target_slots or config.anyexperts_k_max


def say_start(args: argparse.Namespace, named: str | None, log: Path | None) -> None:
    """Say what training was started with; on one rank.

    Args:
        named: what ``--config`` said.
        log: folder of the full log.
    """
    sizes = {
        "data": args.data_parallel_size, "expert": args.expert_model_parallel_size,
        "tensor": args.tensor_model_parallel_size, "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
    }  # fmt: skip
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    say(f"run: {args.run_dir or 'no --run-dir'}" + (f"; everything that Megatron prints: {log}" if log else ""))
    ranks = f"{args.world_size} rank{'s' if args.world_size > 1 else ''}"
    say(f"configuration: {named or 'flags'}, {ranks}" + (f" ({layout} parallel)" if layout else ""))


def say_loaded(args: argparse.Namespace, config: AnyExpertsConfig, counts: dict[str, int], blend: Any) -> None:
    """Say what was loaded and built; every rank calls it, and rank 0 prints.

    Args:
        counts: from `count_parameters`, of this rank's stages.
        blend: what ``--data-path`` names.
    """
    sizes = torch.tensor([counts.get(part, 0) for part in PARTS], device=torch.cuda.current_device())
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(sizes, group=mpu.get_pipeline_model_parallel_group())
    if args.rank:
        return
    if args.iteration:
        say(f"checkpoint: iteration {args.iteration}, {args.consumed_train_samples} rows trained")
    else:
        say(f"checkpoint: {'weights alone; counting begins at 0' if _pretrained(args) else 'none, random weights'}")
    say(model_line(dict(zip(PARTS, sizes.tolist(), strict=True)), expected_real_slots(args, config), args.num_experts))
    if balance := settle(config, mpu.get_expert_model_parallel_group()).why:
        say(f"balance: {balance}")
    held_out = f", held out {sets(blend, 'val')}" if args.eval_iters else ""
    train = "" if args.skip_train else sets(blend, "train")
    rows = f"{args.global_batch_size or 'a growing number of'} rows of {args.seq_length} tokens a step"
    say(f"data: {train}{held_out}; {args.data_streams} streams, {rows}")


def _pretrained(args: argparse.Namespace) -> bool:
    return bool(args.pretrained_checkpoint or args.finetune)


def sets(blend: str, split: str) -> str:
    """The data sets of a split and their samples."""
    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    datasets = [each.dataset for each in open_blend(blend, split, DataConfig(), alone).datasets]
    named = [f"{Path(str(each.path)).name} {sum(shard.count for shard in each.shards):,}" for each in datasets]
    listed = ", ".join(named[:6]) + (f" and {len(named) - 6} more" if len(named) > 6 else "")
    return f"{len(named)} set{'s' if len(named) > 1 else ''} of samples ({listed})"
