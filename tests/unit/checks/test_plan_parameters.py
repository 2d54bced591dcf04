"""Parameters by formula are those of real models, and of Megatron's own report."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_anyexperts.checks.plan_config import parse_flags
from megatron_anyexperts.checks.plan_memory import Precision, static_bytes
from megatron_anyexperts.checks.plan_parameters import Stage, by_part, stage_parameters, stages
from megatron_anyexperts.checks.plan_sizes import LatentSizes, ModelSizes, UsageError, sizes_from
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.build import EncoderConfig, LanguageModelConfig, build_model, part_of
from megatron_anyexperts.training.pretrain import transformer_config
from tests.unit.checks.planned import MIXTURE, layout, megatron_arguments
from tests.unit.models.small import DYNAMIC, small_arguments, small_config

SHARED = {"moe_shared_expert_intermediate_size": 16}
CONSTANT = {"anyexperts_virtual_kind": "constant", "anyexperts_learn_alpha": True}
CASES = {
    "dense": ("*-*-", {}),
    "no gate": ("*-*E", {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}),
    "mixture": ("*-*E", {}),
    "dynamic slots": ("*-*E*E", DYNAMIC | SHARED),
    "constant virtual expert, alpha learned": ("*E", DYNAMIC | CONSTANT),
    "norms of heads": ("*-", {"qk_layernorm": True}),
    "prediction": ("*-*E/*E", DYNAMIC | {"mtp_num_layers": 1}),
}


def sizes_of(config, arguments: dict) -> ModelSizes:
    """Sizes of a small model, as from parsed flags."""
    return sizes_from(
        SimpleNamespace(
            **vars(config) | arguments, num_experts=config.num_moe_experts, swiglu=config.gated_linear_unit,
            group_query_attention=True,
        ),
        arguments["padded_vocab_size"],
    )  # fmt: skip


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("pattern, options", CASES.values(), ids=CASES)
def test_parameters_are_those_of_the_built_model(make_model, pattern, options, untied):
    changes = {"hybrid_layer_pattern": pattern, "untie_embeddings_and_output_weights": untied}
    model = make_model(changes, **options)
    planned = list(stage_parameters(
        sizes_of(small_config(pattern, **options), small_arguments(**changes)),
        Stage(pattern.partition("/")[0], True, True),
    ))  # fmt: skip
    built = dict(model.named_parameters())
    assert sum(each.number for each in planned) == sum(p.numel() for p in built.values())

    def agree(matches, names) -> bool:
        return sum(each.number for each in planned if matches(each)) == sum(built[name].numel() for name in names)

    assert agree(lambda each: each.spread == "expert", [name for name in built if ".experts." in name])
    for part in ("vision_encoder", "vision_projector", "audio_encoder", "audio_projector", "importance"):
        names = [name for name in built if part_of(name) == part]
        assert agree(lambda each, part=part: each.part == part.replace("_", " "), names), part
    split = [name for name, p in built.items() if getattr(p, "tensor_model_parallel", False) or ".experts." in name]
    assert agree(lambda each: each.spread != "whole", split)


def test_the_full_ling_configuration_is_counted(one_rank):
    local = ["no-rope-fusion", "no-bias-swiglu-fusion", "no-gradient-accumulation-fusion", "use-cpu-initialization"]
    words = ["--config", "ling_mini_2_0_anyexperts", "--transformer-impl", "local", *(f"--{name}" for name in local)]
    words += ["--expert-model-parallel-size", "1", "--unset", "moe-grouped-gemm"]
    words += ["--unset", "recompute-granularity", "--unset", "recompute-modules"]
    args = parse_flags(words)
    args.padded_vocab_size, args.params_dtype = 157_184, torch.bfloat16
    args.num_layers = 40
    config = transformer_config(args)
    config.perform_initialization = False
    parts = (kind.from_args(args) for kind in (LanguageModelConfig, EncoderConfig, MediaShape))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(*parts, config)
        numbers = [(p.numel(), p.element_size()) for p in model.parameters()]
    sizes = sizes_from(args, args.padded_vocab_size)
    assert sum(by_part(sizes).values()) == sum(number for number, _ in numbers) > 17e9
    planned = list(stage_parameters(sizes, Stage(sizes.decoder, True, True)))
    assert sum(each.number * (4 if each.wide else 2) for each in planned) == sum(a * b for a, b in numbers)


LATENT_ATTENTION = {"latent": LatentSizes(96, 64, 32, 16, 48), "head_norm": 160, "groups": 16}
REPORTED = [
    ({}, {}), ({}, {"expert": 16}), ({}, {"tensor": 4}), ({}, {"tensor": 2, "expert": 4, "expert_tensor": 2}),
    (LATENT_ATTENTION, {}), ({"tied": True}, {}), ({"mixture": replace(MIXTURE.mixture, latent=512, shared=256)}, {}),
]  # fmt: skip


@pytest.mark.parametrize("model, job", REPORTED)
def test_static_bytes_are_those_of_megatrons_report(model, job):
    sizes, job = replace(MIXTURE, vision=None, **model), layout(**job)
    planned = static_bytes(list(stage_parameters(sizes, Stage(sizes.decoder, True, True))), job, Precision())
    assert planned == pytest.approx(compute_weight_and_optimizer_memory(megatron_arguments(sizes, job)), rel=1e-9)


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_stages_hold_the_whole_model_once(pipeline):
    held = [each for stage in stages(MIXTURE, pipeline) for each in stage_parameters(MIXTURE, stage)]
    assert sum(each.number for each in held) == sum(by_part(MIXTURE).values())


def test_a_pattern_with_bars_is_dealt_out_in_turn():
    sizes = replace(MIXTURE, pattern="*E|*-|*E*E|*-")
    assert [stage.letters for stage in stages(sizes, 2)] == ["*E*E*E", "*-*-"]
    assert stages(sizes, 3) is None and stages(MIXTURE, 3) is None


def test_unknown_layers_are_refused():
    with pytest.raises(UsageError, match="M of"):
        replace(MIXTURE, pattern="*M")
