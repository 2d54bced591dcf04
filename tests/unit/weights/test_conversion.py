"""Weights of BailingMoeV2 keep their meaning and their bits on the way in and out."""

import copy
import json

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from safetensors.torch import load_file

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.checkpoint_stream import CheckpointReader
from megatron_anyexperts.weights.conversion import import_weights
from megatron_anyexperts.weights.export import export_weights
from megatron_anyexperts.weights.families.known import read_config
from tests.unit.weights.reference import TINY, Reference, random_weights, write
from tests.unit.weights.released_models import ours


def boxes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.sharded_state_dict()
    apply_factories(state)
    return {box.key: box.global_shape for box in nested_values(state) if isinstance(box, ShardedTensor)}


def load(model: torch.nn.Module, folder) -> None:
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "release"))
    model.load_state_dict(state["model"])


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(TINY)


@pytest.fixture(scope="module")
def imported(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    import_weights(write(folder / "hf", TINY, weights), folder / "ours")
    return folder


def test_checkpoint_names_and_shapes_are_those_of_the_model(imported, one_rank):
    reader = CheckpointReader(imported / "ours")
    assert {key: reader.shape(key) for key in reader.tensors} == boxes(ours(TINY))


def test_logits_equal_the_reference(imported, weights, one_rank):
    model = ours(TINY)
    load(model, imported / "ours")
    tokens = torch.randint(TINY["vocab_size"], (20,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        here = model(tokens[None], torch.arange(20)[None])[0]
    theirs, _ = Reference(TINY, weights).logits(tokens)
    torch.testing.assert_close(here, theirs, rtol=1e-4, atol=1e-5)


def test_prediction_layer_predicts_what_the_reference_predicts(imported, weights, one_rank):
    model = ours(TINY)
    load(model, imported / "ours")
    seen = []  # copies: the loss overwrites the logits
    model.language_model.output_layer.register_forward_hook(lambda _, __, out: seen.append(out[0][:, 0].clone()))
    tokens = torch.randint(TINY["vocab_size"], (20,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(tokens[None], torch.arange(20)[None], labels=tokens[None], loss_mask=torch.ones(1, 20))
    main, deeper = Reference(TINY, weights).logits(tokens)
    # The last position has no token after the next: what is put there differs.
    errors = [[(here - theirs)[:-1].abs().max().item() for theirs in (main, deeper)] for here in seen]
    assert sorted(row.index(min(row)) for row in errors) == [0, 1]
    assert all(min(row) < 1e-4 for row in errors), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_gives_back_every_bit(tmp_path, dtype):
    weights = random_weights(TINY, dtype)
    import_weights(write(tmp_path / "hf", TINY, weights), tmp_path / "first")
    files = export_weights(tmp_path / "first", tmp_path / "hf/config.json", tmp_path / "back")
    back = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == weights.keys()

    import_weights(tmp_path / "back", tmp_path / "second")
    first, second = CheckpointReader(tmp_path / "first"), CheckpointReader(tmp_path / "second")
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.read(key), second.read(key)) for key in first.tensors)


def test_unknown_missing_and_misshapen_tensors_are_listed_and_refused(tmp_path, weights):
    wrong = dict(weights)
    del wrong["model.layers.1.mlp.experts.3.up_proj.weight"]
    wrong["model.layers.1.mlp.experts.3.bias"] = torch.zeros(2)
    wrong["lm_head.weight"] = torch.zeros(95, 32)
    with pytest.raises(UsageError) as refused:
        import_weights(write(tmp_path / "hf", TINY, wrong), tmp_path / "ours")
    assert "missing: model.layers.1.mlp.experts.3.up_proj.weight [24, 32]" in str(refused.value)
    assert "unknown: model.layers.1.mlp.experts.3.bias [2]" in str(refused.value)
    assert "shape: lm_head.weight is [95, 32], config.json says [96, 32]" in str(refused.value)
    assert not (tmp_path / "ours").exists()


def test_export_refuses_a_checkpoint_of_another_architecture(tmp_path, imported):
    config = copy.deepcopy(TINY) | {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"unknown: language_model\.mtp\.layers\.0\.enorm\.weight"):
        export_weights(imported / "ours", tmp_path / "config.json", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "partial_rotary_factor=0.5 with yarn"),
        ({"num_experts_per_tok": 8}, "must be twice"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"num_nextn_predict_layers": 2}, "at most 1"),
    ],
)
def test_options_that_are_not_mapped_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        read_config(TINY | change)


def test_an_existing_checkpoint_is_not_overwritten(imported):
    with pytest.raises(UsageError, match="holds a checkpoint already"):
        import_weights(imported / "hf", imported / "ours")
