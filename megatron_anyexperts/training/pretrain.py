"""Runs Megatron's own pretraining loop on the multimodal model."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron_anyexperts import console
from megatron_anyexperts.platform import cpu, torch_checkpoint
from megatron_anyexperts.platform.seams import replace
from megatron_anyexperts.survival import heartbeat as heartbeats
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.checkpoints import NotSaved, NoUsableCheckpoint
from megatron_anyexperts.survival.exit_codes import ExitCode
from megatron_anyexperts.survival.lock import RunInUse, RunLock
from megatron_anyexperts.survival.lost_writes import LostWrites, tolerate_full_disk
from megatron_anyexperts.survival.run_directory import Run, rank_file
from megatron_anyexperts.survival.signals import live_with_parent
from megatron_anyexperts.survival.signing import signing_key
from megatron_anyexperts.training import run_config
from megatron_anyexperts.training.arguments import UsageError, be_a_rank, parse, switches
from megatron_anyexperts.training.usage import reason

if TYPE_CHECKING:
    from megatron_anyexperts.training.comparison import RunSettings

DEFAULTS = {"tokenizer_type": "HuggingFaceTokenizer"}
UNSAFE_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Of Transformer Engine: whether it reads what it has pickled into checkpoints itself."""


class HeldOut(Protocol):
    """Something measured on held-out data at every evaluation, in the two steps that Megatron's loop knows."""

    def measure(self, model: list[torch.nn.Module]) -> Any:
        """Measure the model chunks of this rank, in evaluation mode; called on every rank."""

    def log(self, measured: Any, iteration: int, writer: Any) -> None:
        """Report what `measure` returned; called on the last rank, with its TensorBoard writer."""


def transformer_config(args: argparse.Namespace) -> Any:
    """The decoder's `AnyExpertsConfig` from Megatron's arguments."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_anyexperts.models.latent import latent_config
    from megatron_anyexperts.moe.config import AnyExpertsConfig

    if args.multi_latent_attention:
        return latent_config(args)
    return core_transformer_config_from_args(args, config_class=AnyExpertsConfig)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: Any = None,
    **_: Any,
) -> torch.nn.Module:
    """Megatron's model provider: one pipeline stage of the multimodal model."""
    from megatron.training import get_args

    from megatron_anyexperts.media import MediaShape
    from megatron_anyexperts.models.build import EncoderConfig, LanguageModelConfig, build_model

    args = get_args()
    parts = (kind.from_args(args) for kind in (LanguageModelConfig, EncoderConfig, MediaShape))
    return build_model(*parts, transformer_config(args), pre_process, post_process, vp_stage, pg_collection)


def check_vocabulary(args: argparse.Namespace) -> None:
    """Refuse a tokenizer with more tokens than the model has rows.

    Raises:
        ValueError: both numbers are in the message.
    """
    from megatron.training import get_tokenizer

    if args.tokenizer_model and (tokens := get_tokenizer().vocab_size) > args.padded_vocab_size:
        raise ValueError(
            f"padded_vocab_size={args.padded_vocab_size} is fewer than the {tokens} tokens of {args.tokenizer_model}; "
            "take the tokenizer of the weights, or import them with --add-tokens"
        )


def check(args: argparse.Namespace) -> None:
    """Set what this project requires of Megatron's flags, and refuse what cannot work, before any rank waits.

    Raises:
        UsageError: the way out is in the message.
    """
    from megatron_anyexperts.data.config import DataConfig
    from megatron_anyexperts.data.context_cut import refuse_rows
    from megatron_anyexperts.data.elastic import streams_per_rank
    from megatron_anyexperts.media import MediaShape
    from megatron_anyexperts.models.build import can_fuse_gradient_accumulation, refuse_fp8_rows, refuse_unsupported
    from megatron_anyexperts.training import batch_sizes
    from megatron_anyexperts.training.config import RunConfig, TraceConfig, refuse_trace
    from megatron_anyexperts.training.learning_rates import LearningRateConfig

    # Packed rows hold different numbers of targets; only a loss per token is independent of how they are spread.
    args.calculate_per_token_loss = True
    args.dataloader_type = "external"
    if args.use_distributed_optimizer:
        # The other format cannot change expert or pipeline parallelism on resume.
        args.dist_ckpt_optim_fully_reshardable = True
        if args.distrib_optim_fully_reshardable_mem_efficient:
            flag = "--distrib-optim-fully-reshardable-mem-efficient"
            raise ValueError(f"{flag}: every rank saves and loads its own part alone; leave it out")
    elif (args.bf16 or args.fp16) and not (args.no_save_optim or args.anyexperts_stock_moe):
        # Megatron 0.19's other optimizer looks for the states of fp32 parameters among those of the 16-bit ones.
        raise ValueError(
            f"--{'bf16' if args.bf16 else 'fp16'} without --use-distributed-optimizer cannot save the optimizer state "
            "of the importance modules, which stay fp32; set use-distributed-optimizer, which one rank can use as well"
        )
    if args.gradient_accumulation_fusion and not can_fuse_gradient_accumulation():
        args.gradient_accumulation_fusion = False
        if args.rank == 0:
            said = "gradient accumulation fusion is off: it needs apex (see anyexperts doctor)"
            print(said, file=sys.stderr)
    pickles = args.fp8 and args.fp8_recipe == "delayed" and os.environ.get(UNSAFE_PICKLES) != "1"
    if pickles and args.save and args.rank == 0:
        said = f"fp8-recipe delayed: Transformer Engine reads its scales in a checkpoint only with {UNSAFE_PICKLES}=1"
        print(f"{said}, pickles that can run code; set it to resume, or take another recipe", file=sys.stderr)
    # What documents are padded with, so that they can be cut, may make a row longer than others.
    args.variable_seq_lengths = args.context_parallel_size > 1 and args.pipeline_model_parallel_size > 1
    decoder = transformer_config(args)
    refuse_unsupported(args.hybrid_layer_pattern, decoder)
    refuse_fp8_rows(args.seq_length, args.micro_batch_size, decoder)
    if args.context_parallel_size > 1:
        refuse_rows(args.micro_batch_size)
        refuse_rows(args.eval_micro_batch_size, "eval-micro-batch-size")
    MediaShape.from_args(args)
    LearningRateConfig.from_args(args)
    for config in (DataConfig, RunConfig, TraceConfig):
        config(**{field.name: getattr(args, field.name) for field in fields(config)})
    refuse_trace(args)
    streams_per_rank(args.data_streams, args.data_parallel_size)
    batch_sizes.check(args)


def prepare(
    cli: list[str],
    defaults: Mapping[str, Any] = DEFAULTS,
    check: Callable[[argparse.Namespace], None] = check,
) -> tuple[argparse.Namespace, RunSettings]:
    """Parse the command line and refuse what cannot be carried out; writes nothing.

    Args:
        cli, defaults, check: see `pretrain`.

    Returns:
        Megatron's arguments, and what the run is compared with.

    Raises:
        UsageError: the way out is in the message.
    """
    from megatron_anyexperts.data.faults import DataFeedError

    cpu.bridge(training=True)
    torch_checkpoint.install()
    be_a_rank()
    try:
        signing_key()  # refused now rather than at the first save
        args = parse(cli, defaults)
        check(args)
        check_vocabulary(args)
        from megatron_anyexperts.data.blend import check_splits
        from megatron_anyexperts.training import schedule
        from megatron_anyexperts.training.comparison import RunSettings
        from megatron_anyexperts.training.data import blend_file, check_mixture

        needed = (["val"] if args.eval_iters else []) + ([] if args.skip_train else ["train"])
        check_splits(blend_file(args.data_path), needed)
        schedule.check(args)
        if not args.skip_train:
            check_mixture(args)
        settings = RunSettings(args, transformer_config(args))
        settings.foresee(args)
    except (ValueError, AssertionError, DataFeedError) as error:
        raise UsageError(reason(error)) from error
    return args, settings


def pretrain(
    cli: list[str],
    defaults: Mapping[str, Any] = DEFAULTS,
    check: Callable[[argparse.Namespace], None] = check,
    held_out: Callable[[argparse.Namespace], HeldOut] | None = None,
) -> None:
    """Parse the command line and train until done; every rank of the job calls this.

    Args:
        cli: words of the command line without the program's name.
        defaults: flag defaults of the entry point.
        check: refuses arguments before anything starts.
        held_out: makes what is measured, beside the loss, at every evaluation.

    Raises:
        UsageError: the command line cannot be carried out.
        NotSaved: the last steps are in no checkpoint.
    """
    args, settings = prepare(cli, defaults, check)
    from megatron_anyexperts.training import opening

    run = Run(Path(args.run_dir)).create() if args.run_dir else None
    first = args.rank == 0 and run is not None
    lock = _take(run) if first else None
    output = run.output if run else None
    lines = rank_file(output, args.rank, "log") if output else None
    console.begin(args.verbose, lines, LostWrites(str(lines)))

    def log(event: str, **fields: Any) -> None:
        if first:
            runlog.append_event(run, event, **fields)

    log("start", world_size=args.world_size, restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)))
    if args.rank == 0:
        opening.say_start(args, _configuration(cli), output)
        settings.announce(run)
    if first:
        try:
            run_config.write(run, sys.argv[1:], switches())
        except OSError as error:
            print(f"WARNING: {run.config} is not written: {error}", file=sys.stderr)
    args.override_opt_param_scheduler |= args.change_schedule
    try:
        _run_megatron(args, run, lock, settings, held_out(args) if held_out else None)
    except SystemExit as stop:
        # Megatron leaves its loop this way after a signal, a time limit or an exit interval, having saved. It counts
        # the step it is in from zero.
        log("exit", iteration=args.curr_iteration + 1, code=stop.code)
        if args.rank == 0:
            console.say(f"ended at step {args.curr_iteration + 1} of {args.train_iters}")
        raise
    except NotSaved as error:
        log("not_saved", reason=str(error))
        raise
    except Exception as error:
        log("crash", reason=f"{type(error).__name__}: {error}"[:500])
        raise
    else:
        log("finished", iteration=args.train_iters)
        if args.rank == 0:
            console.say(f"finished: {args.train_iters} steps")
    finally:
        if lock is not None:
            lock.release()


def _configuration(cli: list[str]) -> str | None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config")
    return own.parse_known_args(cli)[0].config


def _take(run: Run) -> RunLock:
    """Hold the run directory against a second training.

    Raises:
        UsageError: another training holds it.
    """
    lock = RunLock(run)
    try:
        if said := lock.acquire():
            print(f"WARNING: {said}", file=sys.stderr)
            runlog.append_event(run, "lock", reason=said)
    except RunInUse as error:
        raise UsageError(str(error)) from error
    return lock


def _run_megatron(
    args: argparse.Namespace, run: Run | None, lock: RunLock | None, settings: RunSettings, held_out: HeldOut | None
) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.enums import ModelType
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_anyexperts.media import MediaShape
    from megatron_anyexperts.platform import megatron as upstream
    from megatron_anyexperts.platform import packed_rows
    from megatron_anyexperts.training import curves, evaluations, learning_rates, metrics, opening, schedule, stopping
    from megatron_anyexperts.training.checkpoints import Checkpoints
    from megatron_anyexperts.training.data import DataProvider, blend_file
    from megatron_anyexperts.training.forward_step import ForwardStep
    from megatron_anyexperts.training.progress import Progress
    from megatron_anyexperts.training.step_stats import StepStats
    from megatron_anyexperts.training.trace import open_tracer

    # The process behind this queue takes part in every save. Forked here it starts at once; Megatron would spawn it,
    # and import everything in it again, during the first save.
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=live_with_parent)
    replace(filesystem_async.__name__, "_results_queue", manager.Queue())
    upstream.install()
    packed_rows.install()
    learning_rates.install()
    schedule.install()
    heartbeat = heartbeats.start_heartbeat(run, args.rank) if run else None
    checkpoints = Checkpoints(
        run, args.keep_last_checkpoints, args.keep_every_checkpoint, args.max_failed_saves, heartbeat, lock, settings
    )
    checkpoints.install()
    curves.install(args)
    stats = StepStats()
    torch.cuda.set_device(args.local_rank)  # the tracker keeps tensors there; Megatron selects the device only later
    metrics.install()
    evaluations.install(run)
    tracker = metrics.TrainingMetrics(args, transformer_config(args), stats, run, heartbeat)
    set_moe_metrics_tracker(tracker)
    sizes: Counter[str] = Counter()

    def counted(*arguments: Any, **named: Any) -> torch.nn.Module:
        model = model_provider(*arguments, **named)
        sizes.update(opening.count_parameters(model))
        return model

    def begin() -> None:
        stats.tracer = open_tracer(args, transformer_config(args).anyexperts_k_max)
        opening.say_loaded(args, transformer_config(args), sizes, blend_file(args.data_path))
        if args.rank == args.world_size - 1:
            tracker.progress = Progress(args.iteration, args.train_iters)

    stopping.install(args)
    try:
        training.pretrain(
            pretrain_cfg_container_from_args(args),
            DataProvider(checkpoints, stats, begin),
            ModelType.encoder_or_decoder,
            ForwardStep(stats, MediaShape.from_args(args)),
            model_provider=counted,
            non_loss_data_func=held_out.measure if held_out else None,
            process_non_loss_data_func=held_out.log if held_out else None,
        )
    except SystemExit:
        checkpoints.refuse_unsaved()
        raise
    finally:
        if tracker.progress is not None:
            tracker.progress.close()
        if stats.tracer is not None:
            stats.tracer.writer.close()
    checkpoints.refuse_unsaved()


def tell_torchrun(error: Exception) -> None:
    """Put the reason into the report that torchrun prints last; without torchrun nothing happens."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": f"error: {error}", "timestamp": int(time.time())}
        reason = {"message": {"message": str(error), "extraInfo": extra}}
        Path(path).write_text(json.dumps(reason), encoding="utf-8")


def main(cli: list[str] | None = None, pretrain: Callable[[list[str]], None] = pretrain) -> int:
    """Entry point of one rank; returns its `ExitCode`."""
    console.quiet_imports()
    tolerate_full_disk()  # beneath the streams of the console
    return _explained(cli, pretrain)


@console.own_lines_only
def _explained(cli: list[str] | None, pretrain: Callable[[list[str]], None]) -> int:
    from megatron_anyexperts.data.faults import DataFeedError
    from megatron_anyexperts.training.checkpoints import CheckpointError

    try:
        pretrain(sys.argv[1:] if cli is None else cli)
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        tell_torchrun(error)
        return ExitCode.USAGE
    except (CheckpointError, DataFeedError, NoUsableCheckpoint, NotSaved) as error:
        tell_torchrun(error)
        print(f"error (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr)
        return ExitCode.NOT_SAVED if isinstance(error, NotSaved) else ExitCode.FAILED
    except Exception as error:
        tell_torchrun(RuntimeError(f"{type(error).__name__}: {error}"))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return ExitCode.DONE
