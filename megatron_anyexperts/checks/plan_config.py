"""From the flags of training to what a plan reckons with."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from dataclasses import dataclass

from megatron_anyexperts.checks.doctor import parse_config
from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_memory import Precision
from megatron_anyexperts.checks.plan_sizes import sizes_from
from megatron_anyexperts.checks.plan_time import Feed, Setting
from megatron_anyexperts.hardware import ASSUMED, GPUS, GPUS_PER_NODE
from megatron_anyexperts.platform import cpu
from megatron_anyexperts.training.usage import UsageError

ASSUMED_VOCABULARY = 157_184
"""Rows of Ling's tokenizer, for which the shipped configurations are meant."""

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Question:
    """What is planned: the setting, the configuration's own layout, and what was assumed for it."""

    setting: Setting
    layout: Layout
    notes: tuple[str, ...]


def parse_flags(cli: list[str]) -> Namespace:
    """Flags of training, parsed and not validated; Megatron prints nothing."""
    cpu.bridge(training=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return parse_config(cli)


def vocabulary_rows(args: Namespace, named: int | None) -> tuple[int, str | None]:
    """Rows of the embedding, and a note where they are assumed.

    Args:
        args: parsed flags.
        named: what `--vocabulary` says.
    """
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    rows, note = named or args.padded_vocab_size or args.vocab_size, None
    if rows is None and args.tokenizer_model:
        from megatron_anyexperts.data.vocabulary import Vocabulary

        rows = max(Vocabulary(args.tokenizer_model).ids()) + 1
    if rows is None:
        rows, note = ASSUMED_VOCABULARY, f"vocabulary of {ASSUMED_VOCABULARY:,}: neither --vocabulary nor a tokenizer"
    return -(-rows // multiple) * multiple, note


def precision_from(args: Namespace) -> Precision:
    """Bytes of a parameter; see `Precision`."""
    half = args.bf16 or args.fp16
    aware = args.use_precision_aware_optimizer
    dtypes = (args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype) if aware else ("fp32",) * 3
    optimizer = sum(_BYTES[_name(dtype)] for dtype in dtypes)
    gradient = _BYTES[_name(args.main_grads_dtype)] if aware else 2 if half and args.grad_reduce_in_bf16 else 4
    return Precision(
        parameter=2 if half else 4,
        gradient=gradient,
        optimizer=optimizer if half else optimizer - 4,
        distributed=args.use_distributed_optimizer,
        fp8=bool(args.fp8),
        fp8_copies=bool(args.fp8) and not args.fp8_param_gather,
        fused_loss=args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "te",
    )


def _name(dtype: object) -> str:
    """Of an option that Megatron has turned into a torch dtype, or not yet."""
    names = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.uint8": "fp8"}
    return names.get(str(dtype), str(dtype))


def recompute_from(args: Namespace) -> frozenset[str]:
    """Modules that are recomputed, or {"full"}."""
    if args.recompute_granularity == "full":
        return frozenset({"full"})
    if args.recompute_granularity == "selective":
        return frozenset(args.recompute_modules or ["core_attn"])
    return frozenset()


def layout_from(args: Namespace, gpus: int) -> Layout:
    """The layout of the flags on that many GPUs."""
    micro = args.micro_batch_size or 1
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.context_parallel_size > 1:
        raise UsageError(f"context-parallel-size {args.context_parallel_size} is not planned; leave it out")
    return Layout(
        gpus=gpus,
        tensor=tensor,
        pipeline=pipeline,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or tensor,
        micro_batch=micro,
        global_batch=args.global_batch_size or micro * max(1, gpus // (tensor * pipeline)),
        sequence=args.seq_length,
        recompute=recompute_from(args),
    )


def question(own: Namespace, flags: list[str]) -> Question:
    """What the flags of `anyexperts plan` and of training ask for.

    Args:
        own: see `commands.plan.parser`.
        flags: those of training.

    Raises:
        UsageError: the flags describe nothing that can be planned.
    """
    args = parse_flags([*(["--config", own.config] if own.config else []), *flags])
    rows, note = vocabulary_rows(args, own.vocabulary)
    sizes = sizes_from(args, rows)
    feed = Feed(min(own.document or args.seq_length, args.seq_length), own.pictures)
    if own.pictures and sizes.vision is None:
        raise UsageError(f"--pictures {own.pictures}: the model has no vision encoder")
    overlap = args.overlap_grad_reduce and args.overlap_param_gather
    setting = Setting(sizes, precision_from(args), GPUS[own.gpu], ASSUMED, feed, overlap)
    return Question(setting, layout_from(args, own.nodes * GPUS_PER_NODE), (note,) if note else ())
