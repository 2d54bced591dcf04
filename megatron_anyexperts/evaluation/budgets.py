"""Evaluates one trained model under other slot budgets, without training: the dial, the losses, the table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core import mpu

from megatron_anyexperts.evaluation.held_out import forward
from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.controllers import RouterControl, calibration
from megatron_anyexperts.moe.metrics import RoutingTracker, install_metrics, token_modality
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.training.pretrain import transformer_config
from megatron_anyexperts.training.step_stats import modality_sums

TRAINED = "trained"
# A layer is on target when its mean slots are this close; further passes would change losses by less than they tell.
TOLERANCE = 0.01
# The options that a budget sets; everything else of the model stays as trained.
_DIALLED = ("k_min", "k_max", "target_slots", "target_real", "rho_max")


@dataclass(frozen=True)
class Budget:
    """A slot range with optional targets for its controllers; without a target a controller stays as trained.

    Attributes:
        k_min, k_max: fewest and most slots of a token.
        target_slots: mean slots per token, in every layer.
        target_real: mean real slots per token, in every layer.
    """

    k_min: int
    k_max: int
    target_slots: float | None = None
    target_real: float | None = None

    @classmethod
    def parse(cls, word: str) -> Budget:
        """Read ``k_min:k_max[:target_slots[:target_real]]``; an empty part is as good as none.

        Raises:
            UsageError: the word has another form.
        """
        parts = word.split(":")
        try:
            if not 2 <= len(parts) <= 4:
                raise ValueError(f"{len(parts)} parts")
            return cls(int(parts[0]), int(parts[1]), *(float(part) if part else None for part in parts[2:]))
        except ValueError as error:
            raise UsageError(f"budget '{word}' is not of the form k_min:k_max[:target_slots[:target_real]]") from error

    @property
    def static(self) -> bool:
        """Whether every token gets the same number of real slots, as with a fixed top-k."""
        return self.k_min == self.k_max and self.target_real is None

    def __str__(self) -> str:
        if self.static:
            return f"static {self.k_min}"
        return f"{self.k_min} to {self.k_max}" + "".join(
            f", {name} {value:g}"
            for name, value in (("slots", self.target_slots), ("real", self.target_real))
            if value is not None
        )


@dataclass(frozen=True)
class Evaluation:
    """What the held-out data cost under one budget.

    Attributes:
        budget: its text, or `TRAINED`.
        static: see `Budget.static`.
        slots, real: mean slots and mean real slots per token and layer.
        losses: nats per target: "all" and by kind of sample.
        errors: standard errors over microbatches of the differences to the model as trained; of its losses, in its row.
        real_by_token: mean real slots by kind of token.
        deviation: largest relative distance of a layer's mean from a target; 0 without targets.
    """

    budget: str
    static: bool
    slots: float
    real: float
    losses: dict[str, float]
    errors: dict[str, float]
    real_by_token: dict[str, float]
    deviation: float


def budget_config(args: argparse.Namespace, trained: AnyExpertsConfig, budget: Budget) -> AnyExpertsConfig:
    """Return the trained configuration with another slot range; a static budget uses no virtual experts.

    Args:
        args: Megatron's arguments of the trained model.
        trained: the model's configuration.

    Raises:
        UsageError: the model cannot run under this budget.
    """
    if trained.anyexperts_stock_moe:
        raise UsageError("--anyexperts-stock-moe builds Megatron's own layer, which has no budget; leave it out")
    rho_max = 0.0 if budget.static else trained.anyexperts_rho_max
    dialled = {**asdict(budget), "rho_max": rho_max, "virtual_experts": trained.anyexperts_virtual_experts}
    if budget.static:
        dialled |= {"target_slots": None}
    # Both are relative to the target and act in training only.
    dialled |= {"budget_slack": None, "budget_loss_coeff": 0.0}
    try:
        config = transformer_config(
            argparse.Namespace(**{**vars(args), **{f"anyexperts_{name}": value for name, value in dialled.items()}})
        )
    except ValueError as error:
        raise UsageError(f"budget '{budget}': {error}") from error
    if not trained.anyexperts_needs_importance and config.anyexperts_needs_importance:
        raise UsageError(
            f"budget '{budget}': the model was trained without importance (static slots, anyexperts_alpha=0), so it "
            "cannot tell tokens apart; give static budgets only"
        )
    return config


@contextmanager
def dialled(model: torch.nn.Module, config: AnyExpertsConfig) -> Iterator[None]:
    """Let the mixture layers of `model` route by the slot options of `config`; restores options and controllers."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(one): one for one in found if isinstance(one, AnyExpertsConfig)}.values()
    controls = [module for module in model.modules() if isinstance(module, RouterControl)]
    names = [f"anyexperts_{name}" for name in _DIALLED]
    options = [{name: getattr(one, name) for name in names} for one in configs]
    states = [[(buffer, buffer.clone()) for buffer in control.buffers()] for control in controls]
    for one in configs:
        vars(one).update({name: getattr(config, name) for name in names})
    try:
        yield
    finally:
        for one, before in zip(configs, options, strict=True):
            vars(one).update(before)
        for buffer, before in (pair for state in states for pair in state):
            buffer.copy_(before)


def evaluate(
    model: torch.nn.Module,
    config: AnyExpertsConfig,
    budget: Budget | None,
    batches: list[dict[str, Any]],
    passes: int,
    trained_sums: torch.Tensor | None = None,
) -> tuple[Evaluation, torch.Tensor]:
    """Steer the controllers to the budget's targets over `batches`, then return losses and slots on the same.

    Collective over the expert-parallel and data-parallel ranks. Steering reads tokens, never labels, and moves one
    offset and one virtual bias per layer.

    Args:
        model: in evaluation mode.
        config: from `budget_config`; the trained one if `budget` is None.
        budget: None evaluates as trained, without steering.
        batches: this rank's held-out microbatches; the same number on all ranks.
        passes: most passes over `batches`; fewer once every layer is within `TOLERANCE` of its targets. The pass that
            came nearest counts.
        trained_sums: what this function returned for the model as trained.

    Returns:
        The evaluation, and [microbatches of all ranks, kinds of samples, 2] sums of losses and numbers of targets.
    """
    tracker = install_metrics(config, MODALITIES)
    tried: list[tuple[Evaluation, torch.Tensor]] = []
    with dialled(model, config), calibration([model]) as adjust:
        while len(tried) < passes:
            sums, routing = _measure(model, tracker, batches)
            losses, errors = loss_statistics(sums, trained_sums)
            one = Evaluation(
                TRAINED if budget is None else str(budget),
                config.anyexperts_k_min == config.anyexperts_k_max if budget is None else budget.static,
                routing["all"]["slots"],
                routing["all"]["real"],
                losses,
                errors,
                {name: routing[name]["real"] for name in MODALITIES if name in routing},
                0.0 if budget is None else _deviation(routing, budget),
            )
            tried.append((one, sums))
            if one.deviation <= TOLERANCE:
                break
            adjust()
    # Slots are integers: where many tokens share one importance, the controller steps across a target for ever.
    return min(tried, key=lambda each: each[0].deviation)


def loss_statistics(
    sums_NM2: torch.Tensor, trained_NM2: torch.Tensor | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return losses per target, and their standard errors: "all" and by kind of sample.

    The loss is a ratio of two sums over microbatches; its error is that of a ratio estimator (Cochran, Sampling
    Techniques, 1977, 6.4). Both models saw the same microbatches, so the error of a difference is that of paired
    values, far below the errors of the two losses. NaN with a single microbatch.

    Args:
        sums_NM2: sum of losses and number of targets by microbatch and kind of sample.
        trained_NM2: of the model to compare with; None for the errors of the losses themselves.
    """
    losses, errors = {}, {}
    for column, name in enumerate(("all", *MODALITIES)):
        sums_N2 = sums_NM2.sum(1) if name == "all" else sums_NM2[:, column - 1]
        targets = sums_N2[:, 1].sum()
        if not targets:
            continue
        base_N2 = torch.zeros_like(sums_N2)
        if trained_NM2 is not None:
            base_N2 = trained_NM2.sum(1) if name == "all" else trained_NM2[:, column - 1]
        differences_N = sums_N2[:, 0] - base_N2[:, 0]
        residuals_N = differences_N - differences_N.sum() / targets * sums_N2[:, 1]
        count = len(residuals_N)
        variance = count / (count - 1) * residuals_N.square().sum() if count > 1 else residuals_N.new_tensor(torch.nan)
        losses[name] = (sums_N2[:, 0].sum() / targets).item()
        errors[name] = (variance.sqrt() / targets).item()
    return losses, errors


def _measure(
    model: torch.nn.Module, tracker: RoutingTracker, batches: list[dict[str, Any]]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the loss sums of every microbatch of all ranks, and the routing summary of one pass over them."""
    sums = []
    for batch in batches:
        with token_modality(batch["token_modality"]):
            losses_BS = forward(model, batch)
        sums.append(modality_sums(losses_BS, batch["loss_mask"], batch["sample_modality"]).double())
    own_NM2 = torch.stack(sums)
    gathered = [torch.empty_like(own_NM2) for _ in range(mpu.get_data_parallel_world_size())]
    torch.distributed.all_gather(gathered, own_NM2, group=mpu.get_data_parallel_group())
    return torch.cat(gathered).cpu(), tracker.collect("eval")


def _deviation(routing: dict[str, Any], budget: Budget) -> float:
    targets = {"slots": None if budget.static else budget.target_slots, "real": budget.target_real}
    return max(
        (
            abs(layer["all"][name] / target - 1)
            for layer in routing["layers"].values()
            for name, target in targets.items()
            if target is not None
        ),
        default=0.0,
    )


def table(evaluations: list[Evaluation]) -> str:
    """Return a Markdown table; the first evaluation is the one that ratios refer to."""
    base = evaluations[0]
    kinds = [name for name in base.losses if name != "all"]
    heads = ["budget", "slots", "real", "loss, all", "ratio", "+-"]
    heads += [f"loss, {kind}" for kind in kinds] + [f"real, {kind}" for kind in base.real_by_token]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for one in evaluations:
        cells = [one.budget, f"{one.slots:.2f}", f"{one.real:.2f}", f"{one.losses['all']:.4f}"]
        cells += [f"{one.losses['all'] / base.losses['all']:.4f}", f"{one.errors['all'] / base.losses['all']:.4f}"]
        cells += [f"{one.losses[kind]:.4f}" for kind in kinds]
        cells += [f"{one.real_by_token[kind]:.2f}" for kind in base.real_by_token]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
