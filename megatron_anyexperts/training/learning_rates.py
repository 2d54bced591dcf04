"""A learning rate of its own for each part of the model."""

import argparse
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from megatron_anyexperts.models.build import part_of
from megatron_anyexperts.platform.seams import replace

if TYPE_CHECKING:
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride


@dataclass
class LearningRateConfig:
    """Factors on --lr and --min-lr by part of the model; the schedule's shape is the same for all."""

    lr_scale_vision_encoder: float = 1.0
    """Factor for the vision encoder."""

    lr_scale_vision_projector: float = 1.0
    """Factor for the projector behind the vision encoder."""

    lr_scale_audio_encoder: float = 1.0
    """Factor for the audio encoder."""

    lr_scale_audio_projector: float = 1.0
    """Factor for the projector behind the audio encoder."""

    lr_scale_decoder: float = 1.0
    """Factor for the language model without its importance modules."""

    lr_scale_importance: float = 1.0
    """Factor for the importance modules."""

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                flag, part = field.name.replace("_", "-"), field.name.removeprefix("lr_scale_")
                raise ValueError(
                    f"--{flag}={getattr(self, field.name)} is not above 0; to keep the part as it is, use "
                    f"--freeze-{part.replace('_', '-')}"
                )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "LearningRateConfig":
        """Read the fields from Megatron's arguments.

        Raises:
            ValueError: a factor is not positive, or contradicts --decoupled-lr.
        """
        config = cls(**{field.name: getattr(args, field.name) for field in fields(cls)})
        if args.decoupled_lr is not None and config.lr_scale_decoder != 1.0:
            raise ValueError(
                f"--lr-scale-decoder={config.lr_scale_decoder} and --decoupled-lr={args.decoupled_lr} both set the "
                "learning rate of the embedding; use one of them"
            )
        return config

    def overrides(self, lr: float, min_lr: float) -> "dict[ParamKey, ParamGroupOverride]":
        """Megatron's optimizer overrides for the parts whose factor is not 1.

        Args:
            lr: largest learning rate of the schedule.
            min_lr: smallest learning rate of the schedule.
        """
        from megatron.core.optimizer import ParamKey
        from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
        from megatron.core.optimizer_param_scheduler import ParamGroupOverride

        result = {}
        for field in fields(self):
            part, factor = field.name.removeprefix("lr_scale_"), getattr(self, field.name)
            if factor != 1.0:
                belongs = ParamWithNamePredicate(f"part {part}", lambda _, name, part=part: part == _part(name))
                key = ParamKey(with_name_predicate=belongs)
                result[key] = ParamGroupOverride(max_lr=lr * factor, min_lr=min_lr * factor)
        return result


def _part(name: str) -> str:
    while name.startswith("module."):  # data-parallel and mixed-precision wrappers
        name = name.removeprefix("module.")
    return part_of(name)


def install() -> None:
    """Let Megatron's training loop build its optimizer with the factors of its arguments."""
    from megatron.training import training

    original = training.get_megatron_optimizer_config
    if getattr(original, "_anyexperts", False):
        return

    def with_factors(args: argparse.Namespace):
        config, overrides = original(args)
        scaled = LearningRateConfig.from_args(args).overrides(config.lr, config.min_lr or 0.0)
        return config, {**(overrides or {}), **scaled}

    with_factors._anyexperts = True
    replace(training.__name__, "get_megatron_optimizer_config", with_factors)
