"""Turns training steps' figures into console text, TensorBoard curves and a JSON line, once per log interval."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.hybrid.hybrid_layer_allocation import parse_hybrid_pattern
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training import get_args, training

from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.metrics import RoutingTracker
from megatron_anyexperts.platform.seams import replace
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.heartbeat import Heartbeat
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.curve_names import grouped
from megatron_anyexperts.training.flops import PEAK_BF16, ModelFlops
from megatron_anyexperts.training.progress import Progress, step_line
from megatron_anyexperts.training.step_stats import Interval, StepStats


class TrainingMetrics(RoutingTracker):
    """Megatron's per-step report with routing figures, losses per modality, throughput and data waiting time.

    Megatron's loop calls `report` once after each training step on every rank, which makes it the place for what must
    happen once a step: heartbeat and sample log as well. Every figure in ``metrics.jsonl`` is one of all steps since
    the line before it.

    Args:
        args: Megatron's arguments.
        config: the decoder's configuration.
        stats: filled by the forward step.
        run: where ``metrics.jsonl`` goes, or None.
        heartbeat: this rank's sign of life, or None.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: AnyExpertsConfig,
        stats: StepStats,
        run: Run | None,
        heartbeat: Heartbeat | None,
    ):
        super().__init__(config, MODALITIES, args.log_interval)
        self.config = config
        self.stats = stats
        self.run = run
        self.progress: Progress | None = None
        self.learning_rate: float | None = None
        """Of the step that is being reported."""
        self.heartbeat = heartbeat
        self.loss_layers = loss_layers(args.hybrid_layer_pattern, config.mtp_use_repeated_layer)
        self.flops = ModelFlops.from_args(args, config) if ModelFlops.knows(args.hybrid_layer_pattern) else None
        self.peak_tflops = args.peak_tflops_per_gpu
        if self.peak_tflops is None and torch.cuda.is_available():
            self.peak_tflops = PEAK_BF16.get(torch.cuda.get_device_name())

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer: Any = None,
        total_loss_dict: dict[str, torch.Tensor] | None = None,
        **others: Any,
    ) -> str:
        """See `MoEMetricsTracker.report`; returns the console text."""
        self.stats.stop_clock()
        if self.stats.sample_log is not None:
            self.stats.sample_log.flush(iteration)
        if self.stats.tracer is not None:
            self.stats.tracer.end_step(iteration)
        if self.heartbeat is not None:
            self.heartbeat.beat(iteration)
        if self.progress is not None:
            self.progress.step(iteration)
        # Megatron 0.19 counts the mixture layers of multi-token prediction in both of these.
        others |= {"num_layers": self.loss_layers, "moe_layer_freq": None, "mtp_num_layers": None}
        step: dict[str, torch.Tensor] = {}
        text = super().report(loss_scale, iteration, writer, total_loss_dict=step, **others)
        for name, value in step.items():
            total_loss_dict[name] = total_loss_dict.get(name, 0) + value
        self.stats.add_step(step | self._prediction_losses(loss_scale))
        if iteration % self.log_interval:
            return text
        interval = self.stats.drain(
            mpu.get_data_parallel_group(with_context_parallel=True), torch.device(torch.cuda.current_device())
        )
        figures = interval.losses | self._throughput(interval) | interval.feed
        for name, value in figures.items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
            if others.get("wandb_writer") is not None:
                others["wandb_writer"].log({grouped(name): value}, iteration)
        if self.run is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            args, routing = get_args(), dict(self.snapshot())
            layers = {number: dict(layer) for number, layer in routing["layers"].items()}
            routing["layers"] = layers
            runlog.write_expert_load(
                self.run, iteration, {number: layer.pop("experts_over_mean") for number, layer in layers.items()}
            )
            runlog.append_metrics(
                self.run,
                iteration,
                **{name.replace(" ", "_"): value for name, value in interval.step_losses.items()},
                **figures,
                load_max_over_mean=routing.get("load", {}).get("rank_max_over_mean"),
                routing=routing,
                consumed_samples=args.consumed_train_samples,
                train_iters=args.train_iters,
            )
        if self.progress is not None:
            left, args = self.progress.left(iteration), get_args()
            line = step_line(iteration, args.train_iters, figures, self.snapshot(), self.learning_rate, left)
            self.progress.say(line)
        return "".join(f" {name}: {value:.4g} |" for name, value in figures.items()) + text

    def _prediction_losses(self, loss_scale: float) -> dict[str, torch.Tensor]:
        """This step's losses of multi-token prediction on this rank; Megatron takes them after `report`."""
        depths = self.config.mtp_num_layers or 0
        values = MTPLossLoggingHelper.tracker.get("loss_values")
        if values is None:  # on earlier pipeline stages
            values = torch.zeros(depths)
        return {f"mtp_{depth + 1} loss": values[depth] * loss_scale for depth in range(depths)}

    def _throughput(self, interval: Interval) -> dict[str, float]:
        figures = {} if interval.first_step_s is None else {"first_step_s": interval.first_step_s}
        if not interval.seconds:
            return figures
        figures["tokens_per_s"] = interval.work["tokens"] / interval.seconds
        figures["data_wait_share"] = interval.data_wait / interval.seconds
        if self.flops is not None:
            slots = self.real_slots() * interval.work["tokens"] * self.flops.mixture_layers
            operations = self.flops.training(interval.work, slots)
            figures["tflops_per_gpu"] = operations / interval.seconds / torch.distributed.get_world_size() / 1e12
            if self.peak_tflops:
                figures["mfu"] = figures["tflops_per_gpu"] / self.peak_tflops
        return figures

    def real_slots(self) -> float:
        """Slots per token and mixture layer that real experts computed in the last interval."""
        routing = self.snapshot()
        if "all" not in routing:  # Megatron's own layers record nothing
            return self.config.moe_router_topk
        # A slot that the dispatch cap displaces is in the decision, but not among those received.
        return routing["all"]["real"] / (1 + routing["load"]["displaced_share"])


def loss_layers(pattern: str, repeated: bool) -> int:
    """Mixture layers over which a router loss is averaged.

    Args:
        pattern: Megatron's hybrid layer pattern.
        repeated: one layer serves all depths of multi-token prediction; each call then records its share of one loss.
    """
    parsed = parse_hybrid_pattern(pattern)
    depths = min(1, parsed.mtp_num_depths) if repeated else parsed.mtp_num_depths
    return (parsed.main_pattern or "").count("E") + depths * (parsed.mtp_pattern or "").count("E")


def _over_whole_intervals(training_log: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(training_log)
    def wrapper(loss_dict, totals, learning_rate, iteration, *others, is_first_iteration=False, **named):
        if isinstance(tracker := get_moe_metrics_tracker(), TrainingMetrics):
            tracker.learning_rate = learning_rate
        first = is_first_iteration and iteration % get_args().log_interval != 0
        return training_log(loss_dict, totals, learning_rate, iteration, *others, is_first_iteration=first, **named)

    wrapper.over_whole_intervals = True
    return wrapper


def install() -> None:
    """Make Megatron's console means those of one interval each; repeated calls are harmless.

    Megatron-Core 0.19.2 prints the first step after a start without clearing its sums, even where an interval ends with
    that step; the next interval's means would then contain it again.
    """
    if not hasattr(training.training_log, "over_whole_intervals"):
        replace(training.__name__, "training_log", _over_whole_intervals(training.training_log))
