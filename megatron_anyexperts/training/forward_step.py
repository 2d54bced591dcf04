"""The forward step that Megatron's schedules call: one microbatch through the model, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers

from megatron_anyexperts.data.microbatch import TRAINING_INPUTS, Microbatch
from megatron_anyexperts.media import MODALITIES, MediaShape
from megatron_anyexperts.moe.metrics import token_modality
from megatron_anyexperts.training.batch import next_batch
from megatron_anyexperts.training.flops import measure_work
from megatron_anyexperts.training.step_stats import StepStats, modality_sums


class ForwardStep:
    """Callable with the signature of Megatron's ``forward_step_func``.

    Args:
        stats: collects losses per modality, work, sample keys and waiting time of training steps.
        shape: media geometry, by which work is counted and rows are cut.
    """

    def __init__(self, stats: StepStats, shape: MediaShape):
        self.stats = stats
        self.shape = shape

    def __call__(
        self, data_iterator: Iterator[Microbatch] | None, model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable]:
        """Return the [B, S] losses (or, before the last pipeline stage, activations) and the loss function."""
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        if model.training:
            with self.stats.waiting_for_data():
                batch = next_batch(data_iterator, self.shape)
            # Virtual stages of one rank read the same samples; one of them is enough.
            if self.stats.sample_log is not None and get_attr_wrapped_model(model, "pre_process"):
                self.stats.sample_log.add(batch.sample_keys)
            if get_attr_wrapped_model(model, "post_process"):
                self.stats.add_work(measure_work(batch, self.shape))
        else:
            batch = next_batch(data_iterator, self.shape)
        timers("batch-generator").stop()

        traced: AbstractContextManager = nullcontext()
        if model.training and self.stats.tracer is not None:
            traced = self.stats.tracer.microbatch(batch, id(model), get_num_microbatches())
        with token_modality(batch["token_modality"]), traced:
            output = model(**batch.select(TRAINING_INPUTS))
        return output, partial(loss_func, batch["loss_mask"], batch["sample_modality"], self.stats, model.training)


def loss_func(
    loss_mask: torch.Tensor, sample_modality: torch.Tensor, stats: StepStats, training: bool, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses of a microbatch; Megatron divides by the global number of targets.

    Args:
        loss_mask: [B, S] fp32, 1 for targets.
        sample_modality: [B, S] int8 kinds of sample, -1 for padding.
        stats: takes the sums per modality while training. Evaluation reports them in the dictionary instead, because
            Megatron adds those up over all microbatches before it divides; it divides step by step in training, where a
            step may hold no sample of a kind.
        training: whether this is a training step.
        output: [B, S] losses from the last pipeline stage.

    Returns:
        fp32 sum of losses, int number of targets, and [sum, number] pairs to report.
    """
    losses = output.float()
    loss = torch.sum(losses * loss_mask)
    targets = loss_mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        # One question, for which a GPU is waited for once; the refusal says the value.
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda value: ~torch.isfinite(value),
            message="found NaN or Inf in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )
    report = {"lm loss": torch.stack([loss.detach(), targets.to(loss.dtype)])}
    sums = modality_sums(losses.detach(), loss_mask, sample_modality)
    if training:
        stats.add_losses(sums)
    else:
        report |= {f"{name} loss": sums[MODALITIES.index(name)] for name in stats.held_out_modalities}
    return loss, targets, report
