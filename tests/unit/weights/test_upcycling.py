"""An upcycled model starts as the old one and has gradients to leave it by."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.moe.slots import integer_slots, last_slot_weight, soft_slots
from megatron_anyexperts.survival.manifest import RELEASE, seal, verify
from megatron_anyexperts.survival.signing import KEY
from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.checkpoint_stream import Chunk, write_release
from megatron_anyexperts.weights.conversion import import_weights
from megatron_anyexperts.weights.upcycling import START_IMPORTANCE, start_offset, upcycle
from tests.unit.models.small import small_config
from tests.unit.weights.reference import TINY, random_weights, write
from tests.unit.weights.released_models import ours
from tests.unit.weights.test_conversion import load

DYNAMIC = {
    "anyexperts_k_min": 4,
    "anyexperts_k_max": 6,
    "anyexperts_rho_max": 0.4,
    "anyexperts_alpha": 0.1,
    "anyexperts_learn_alpha": True,
}
TOKENS = torch.randint(TINY["vocab_size"], (1, 24), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixed")
    import_weights(write(folder / "hf", TINY, random_weights(TINY)), folder / "ours")
    return folder / "ours"


@pytest.mark.parametrize("k_min", [2, 3, 4])
@pytest.mark.parametrize("gradient", ["fractional", "straight_through"])
def test_first_forward_is_the_fixed_model(fixed, tmp_path, one_rank, k_min, gradient):
    old = ours(TINY)
    load(old, fixed)
    dynamic = DYNAMIC | {"anyexperts_k_min": k_min, "anyexperts_slot_gradient": gradient}
    upcycle(ours(TINY, **dynamic), fixed, tmp_path / "new")
    new = ours(TINY, **dynamic)
    load(new, tmp_path / "new")
    with torch.no_grad():
        assert torch.equal(new(TOKENS, POSITIONS), old(TOKENS, POSITIONS))


def test_every_new_part_can_leave_its_start_one_after_the_other(fixed, tmp_path, one_rank):
    upcycle(ours(TINY, **DYNAMIC), fixed, tmp_path / "new")
    model = ours(TINY, **DYNAMIC)
    load(model, tmp_path / "new")
    layer = model.decoder.layers[3].mlp
    assert layer.router.control.virtual_bias.item() == -12

    def gradient(parameter: torch.Tensor) -> float:
        model.zero_grad()
        model(TOKENS, POSITIONS).float().logsumexp(-1).sum().backward()
        return parameter.grad.abs().max().item()

    assert gradient(layer.importance.alpha) > 0
    with torch.no_grad():
        layer.importance.alpha += 0.01
    assert gradient(layer.importance.up) > 0
    with torch.no_grad():
        layer.importance.up += 0.01 * torch.randn_like(layer.importance.up)
        layer.router.control.slot_offset += 0.1
        layer.router.control.virtual_bias.zero_()
    assert gradient(layer.importance.down) > 0
    assert gradient(layer.router.virtual_weight) > 0


def test_a_fixed_alpha_is_refused(fixed, tmp_path, one_rank):
    with pytest.raises(UsageError, match="add --anyexperts-learn-alpha"):
        upcycle(ours(TINY, **DYNAMIC | {"anyexperts_learn_alpha": False}), fixed, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_dynamic_model_is_refused(fixed, tmp_path, one_rank):
    upcycle(ours(TINY, **DYNAMIC), fixed, tmp_path / "new")
    with pytest.raises(UsageError, match="dynamic already"):
        upcycle(ours(TINY, **DYNAMIC), tmp_path / "new", tmp_path / "newer")


def test_tensors_without_a_place_are_listed(fixed, tmp_path, one_rank):
    shorter = TINY | {"num_hidden_layers": 2}
    with pytest.raises(UsageError, match=r"not in the new model: language_model\.decoder\.layers\.4\.self_attention"):
        upcycle(ours(shorter), fixed, tmp_path / "new")


@given(k_min=st.integers(2, 12), below=st.integers(0, 8), above=st.integers(0, 8))
def test_start_offset_gives_exactly_top_k(k_min, below, above):
    topk, k_max = k_min + below, k_min + below + above
    config = small_config("*E", num_moe_experts=32, moe_router_topk=topk)
    config = replace(config, anyexperts_k_min=k_min, anyexperts_k_max=k_max)
    soft = soft_slots(torch.full((3,), START_IMPORTANCE), torch.tensor([start_offset(config)]), k_min, k_max)
    slots = integer_slots(soft, "fractional")
    assert slots.tolist() == [topk] * 3
    assert last_slot_weight(soft, slots, "fractional").tolist() == [1.0] * 3


def save(model: torch.nn.Module, folder) -> None:
    from megatron_anyexperts.weights.upcycling import _boxes, _chunk

    chunks = [_chunk(box, lambda box=box: box.data, box.data.dtype) for box in _boxes(model)]
    write_release(folder, chunks, model.language_model.hybrid_layer_pattern, 32, 4)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_first_forward_of_a_mixture_is_the_dense_model(tmp_path, one_rank, make_model, scores):
    dense = make_model({"hybrid_layer_pattern": "*-*-*-", "vision_num_layers": 0, "audio_num_layers": 0}).eval()
    save(dense, tmp_path / "dense")
    changes = {
        "moe_ffn_hidden_size": dense.config.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": 16,
        "moe_router_score_function": scores,
        "moe_router_topk_scaling_factor": 2.5,
        "anyexperts_alpha": 0.0,
    }
    arguments = {"hybrid_layer_pattern": "*-*E*E", "vision_num_layers": 0, "audio_num_layers": 0}
    upcycle(make_model(arguments, **changes), tmp_path / "dense", tmp_path / "mixture")
    mixture = make_model(arguments, **changes).eval()
    load(mixture, tmp_path / "mixture")
    tokens = TOKENS % 64
    with torch.no_grad():
        torch.testing.assert_close(mixture(tokens, POSITIONS), dense(tokens, POSITIONS), rtol=1e-5, atol=1e-6)


def test_a_dense_layer_of_another_width_is_refused(tmp_path, one_rank, make_model):
    arguments = {"hybrid_layer_pattern": "*-*-", "vision_num_layers": 0, "audio_num_layers": 0}
    save(make_model(arguments), tmp_path / "dense")
    with pytest.raises(UsageError, match=r"is \[96, 32\], an expert is \[32, 32\]; set --moe-ffn-hidden-size"):
        mixture = make_model(arguments | {"hybrid_layer_pattern": "*-*E"}, anyexperts_alpha=0.0)
        upcycle(mixture, tmp_path / "dense", tmp_path / "new")


def test_gates_without_a_fixed_sum_are_refused(tmp_path, one_rank, make_model):
    arguments = {"hybrid_layer_pattern": "*-*-", "vision_num_layers": 0, "audio_num_layers": 0}
    save(make_model(arguments), tmp_path / "dense")
    changes = {"moe_ffn_hidden_size": 48, "moe_router_pre_softmax": True, "anyexperts_alpha": 0.0}
    with pytest.raises(UsageError, match="gates of a token have a fixed sum"):
        upcycle(make_model(arguments | {"hybrid_layer_pattern": "*-*E"}, **changes), tmp_path / "dense", tmp_path / "n")


def test_with_a_key_only_signed_weights_are_read_and_written(fixed, tmp_path, one_rank, monkeypatch):
    monkeypatch.setenv(KEY, "a key of this test alone")
    with pytest.raises(UsageError, match="release may not be loaded: its manifest is not signed"):
        upcycle(ours(TINY, **DYNAMIC), fixed, tmp_path / "new")
    copy = Path(shutil.copytree(fixed, tmp_path / "copy"))
    seal(copy / RELEASE)
    assert verify(upcycle(ours(TINY, **DYNAMIC), copy, tmp_path / "new")) == []


def test_a_chunk_of_the_wrong_shape_is_not_written(tmp_path):
    chunk = Chunk("weight", (2, 2), (0, 0), (2, 2), torch.float32, lambda: torch.zeros(3, 2))
    with pytest.raises(BaseException, match=r"made torch.float32 \(3, 2\), planned torch.float32 \(2, 2\)"):
        write_release(tmp_path / "bad", [chunk], "*-", 2, 1)
