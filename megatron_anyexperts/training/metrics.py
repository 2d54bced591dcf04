"""Turns a training step's figures into console text, TensorBoard curves and a JSON line, at Megatron's log interval."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args

from megatron_anyexperts.config import AnyExpertsConfig
from megatron_anyexperts.moe.metrics import RoutingTracker
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.heartbeat import Heartbeat
from megatron_anyexperts.survival.run import Run
from megatron_anyexperts.training.step_stats import StepStats


class TrainingMetrics(RoutingTracker):
    """Megatron's per-step report with routing figures, losses per modality, throughput and data waiting time.

    Megatron's loop calls `report` once after each training step on every rank, which makes it the place for what must
    happen once a step: heartbeat and sample log as well.

    Args:
        config: the decoder's configuration.
        stats: filled by the forward step.
        run: where ``metrics.jsonl`` goes, or None.
        heartbeat: this rank's sign of life, or None.
    """

    def __init__(self, config: AnyExpertsConfig, stats: StepStats, run: Run | None, heartbeat: Heartbeat | None):
        super().__init__(config)
        self.stats = stats
        self.run = run
        self.heartbeat = heartbeat

    def report(self, loss_scale: float, iteration: int, writer: Any = None, **others: Any) -> str:
        """See `MoEMetricsTracker.report`; returns the console text."""
        args = get_args()
        if self.stats.sample_log is not None:
            self.stats.sample_log.flush(iteration)
        if self.heartbeat is not None:
            self.heartbeat.beat(iteration)
        text = super().report(loss_scale, iteration, writer, **others)
        if iteration % args.log_interval:
            return text
        figures = self.stats.drain(
            mpu.get_data_parallel_group(with_context_parallel=True), torch.device(torch.cuda.current_device())
        )
        for name, value in figures.items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
        if self.run is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            routing = self.snapshot()
            runlog.append_metrics(
                self.run,
                iteration,
                **_router_losses(others.get("total_loss_dict") or {}),
                **figures,
                load_max_over_mean=routing.get("load", {}).get("rank_max_over_mean"),
                routing=routing,
                consumed_samples=args.consumed_train_samples,
                train_iters=args.train_iters,
            )
        return "".join(f" {name}: {value:.4g} |" for name, value in figures.items()) + text


def _router_losses(totals: dict[str, Any]) -> dict[str, float]:
    """Mean of each router loss since Megatron last cleared its totals, named with underscores."""
    steps = max(1, totals.get("advanced iterations", 1))
    return {
        name.replace(" ", "_"): float(value) / steps
        for name, value in totals.items()
        if name.endswith("loss") and name != "lm loss"
    }
