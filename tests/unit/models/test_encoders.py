import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.models.encoder import encoder_config
from megatron_anyexperts.models.vision import merged_layout
from tests.unit.models.small import HIDDEN, SHAPE, small_config

GRIDS = [(1, 2, 4), (3, 4, 2), (1, 2, 2)]
TOKENS = [2, 6, 1]
CLIPS = [9, 1, 4, 6]


@pytest.fixture
def model(make_model):
    return make_model()


def patches(count, seed=0):
    return torch.randn(count, SHAPE.patch_values, generator=torch.Generator().manual_seed(seed))


def frames(count, seed=0):
    return torch.randn(count, SHAPE.n_mels, generator=torch.Generator().manual_seed(seed))


grid = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(grids=st.lists(grid, min_size=1, max_size=4), merge=st.integers(1, 3))
@settings(max_examples=40)
def test_layout_is_a_permutation_that_brings_merged_patches_together(grids, merge):
    grids = [(t, h * merge, w * merge) for t, h, w in grids]
    order, positions, frame_lengths = merged_layout(grids, merge)
    assert sorted(order.tolist()) == list(range(len(order)))
    assert frame_lengths == [h * w for t, h, w in grids for _ in range(t)]
    for group in positions.view(-1, merge * merge, 3):
        time, top, left = group[0].tolist()
        expected = [[time, top + row, left + column] for row in range(merge) for column in range(merge)]
        assert group.tolist() == expected
        assert top % merge == left % merge == 0


def test_vision_returns_a_row_per_token(model):
    assert model.vision(patches(36), GRIDS).shape == (sum(TOKENS), HIDDEN)


def test_images_encode_alike_alone_and_together(model):
    together = model.vision(patches(36), GRIDS).split(TOKENS)
    parts = patches(36).split([t * h * w for t, h, w in GRIDS])
    for image, part, grid in zip(together, parts, GRIDS, strict=True):
        torch.testing.assert_close(image, model.vision(part, [grid]))


def test_a_frame_does_not_see_the_other_frames_of_its_video(model):
    changed = patches(24)
    changed[8:16] += 1
    video = [(3, 4, 2)]
    before, after = (model.vision(values, video).view(3, 2, HIDDEN) for values in (patches(24), changed))
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]])
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_vision_tells_positions_and_frames_apart(model):
    same = patches(1).expand(16, -1)
    first, second = model.vision(same, [(2, 2, 4)]).view(2, 2, HIDDEN)
    assert (first[0] - first[1]).abs().max() > 1e-4
    assert (first[0] - second[0]).abs().max() > 1e-4


def test_vision_names_the_counts_that_disagree(model):
    with pytest.raises(ValueError, match="describe 36 patches, image_patches holds 35"):
        model.vision(patches(35), GRIDS)


@given(lengths=st.lists(st.integers(1, 21), min_size=1, max_size=4))
@settings(max_examples=20)
def test_clips_encode_alike_alone_and_together(make_encoders, lengths):
    audio = make_encoders.audio
    counts = [SHAPE.audio_token_count(length) for length in lengths]
    together = audio(frames(sum(lengths)), torch.tensor(lengths))
    assert together.shape == (sum(counts), HIDDEN)
    parts = zip(together.split(counts), frames(sum(lengths)).split(lengths), strict=True)
    for clip, part in parts:
        torch.testing.assert_close(clip, audio(part, torch.tensor([len(part)])))


@pytest.fixture(scope="module")
def make_encoders(world):
    """A model for property-based tests, which cannot take function-scoped fixtures."""
    from tests.unit.models.small import small_model

    return small_model(small_config())


def test_audio_names_the_counts_that_disagree(model):
    with pytest.raises(ValueError, match="sum 20.*19 frames"):
        model.audio(frames(19), CLIPS)


@pytest.mark.parametrize("lengths", [[4, 0], [5, -1]])
def test_empty_clips_are_refused(model, lengths):
    with pytest.raises(ValueError, match="must be positive"):
        model.audio(frames(4), lengths)


@pytest.mark.parametrize("modules", [["core_attn"], ["mlp"], ["moe"], ["core_attn", "moe"]])
def test_selective_recomputation_keeps_less_and_changes_no_gradient(make_model, modules):
    """The flag of the decoder; `moe` is a mixture there, and the dense MLP in an encoder."""
    kept, gradients = [], []
    for recompute in ({}, {"recompute_granularity": "selective", "recompute_modules": modules}):
        built = make_model(**recompute)
        sizes: dict[int, int] = {}

        def keep(saved, sizes=sizes):
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            outputs = (built.vision(patches(36), GRIDS), built.audio(frames(sum(CLIPS)), CLIPS))
        kept.append(sum(sizes.values()))
        sum(output.square().sum() for output in outputs).backward()
        gradients.append({name: p.grad for name, p in built.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < kept[0]


def test_heads_that_do_not_divide_are_refused():
    decoder = small_config()
    decoder.tensor_model_parallel_size = 2
    with pytest.raises(ValueError, match="3 heads cannot be split over tensor_model_parallel_size=2"):
        encoder_config(decoder, 1, 12, 24, 3)


def test_encoders_follow_the_decoders_precision():
    decoder = small_config(bf16=True, params_dtype=torch.bfloat16)
    encoder = encoder_config(decoder, 2, 16, 32, 2)
    assert encoder.params_dtype == torch.bfloat16
    assert (encoder.num_layers, encoder.num_moe_experts, encoder.gated_linear_unit) == (2, None, False)
