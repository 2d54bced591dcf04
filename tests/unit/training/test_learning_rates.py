from types import SimpleNamespace

import pytest
from megatron.core.optimizer.optimizer_config import ParamKey
from torch import nn

from megatron_anyexperts.training.learning_rates import LearningRateConfig

NAMES = {
    "vision_encoder": "module.module.vision.layers.0.weight",
    "vision_projector": "module.vision.projector.weight",
    "audio_encoder": "audio.layers.0.weight",
    "audio_projector": "module.module.audio.projector.weight",
    "importance": "module.language_model.decoder.layers.1.mlp.importance.weight",
    "decoder": "module.language_model.decoder.layers.1.mlp.router.weight",
}


@pytest.mark.parametrize("part", NAMES)
def test_a_factor_reaches_its_part_and_no_other(part):
    [(key, override)] = LearningRateConfig(**{f"lr_scale_{part}": 0.5}).overrides(lr=2.0, min_lr=0.2).items()
    assert isinstance(key, ParamKey)
    assert override == {"max_lr": 1.0, "min_lr": 0.1}
    parameter = nn.Parameter()
    assert [name for name, path in NAMES.items() if key.matches(parameter, path)] == [part]


def test_without_factors_nothing_is_overridden():
    assert LearningRateConfig().overrides(1.0, 0.1) == {}


def test_no_factor_is_a_freeze():
    with pytest.raises(ValueError, match="lr-scale-audio-encoder=0 .*--freeze-audio-encoder"):
        LearningRateConfig(lr_scale_audio_encoder=0)


def test_two_rates_for_the_embedding_are_refused():
    scales = {f"lr_scale_{part}": 1.0 for part in NAMES} | {"lr_scale_decoder": 0.1}
    with pytest.raises(ValueError, match="decoupled-lr"):
        LearningRateConfig.from_args(SimpleNamespace(decoupled_lr=1e-4, **scales))
