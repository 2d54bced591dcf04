"""The processor of an exported model makes of files what the feed makes of them."""

import io

import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, dynamic_module_utils

from megatron_anyexperts.data import media_decode
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.log_mel import log_mel
from megatron_anyexperts.data.media_stream import decoded_frames, probe_video, upright_frame
from megatron_anyexperts.data.samples import Media
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.evaluation.generation import prompt_document
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.weights.hub import processing_anyexperts as processing
from megatron_anyexperts.weights.hub_export import export_own
from tests.feed import corpus
from tests.unit.weights.trained_models import tokenizer, trained

SHAPE = MediaShape(patch_size=4, spatial_merge=2, n_mels=16, audio_stride=4)
LIMITS = {"data_image_min_patches": 16, "data_image_max_patches": 64, "data_video_max_patches": 64}
FLAGS = {
    **{"vision-num-layers": 1, "vision-hidden-size": 16, "vision-ffn-hidden-size": 40, "vision-num-heads": 2},
    **{"audio-num-layers": 1, "audio-hidden-size": 16, "audio-ffn-hidden-size": 40, "audio-num-heads": 2},
    **{"vision-patch-size": 4, "audio-n-mels": 16, "audio-stride": 4, "data-image-min-patches": 16},
    **{"data-image-max-patches": 64, "data-video-max-patches": 64, "anyexperts-k-max": 4, "seq-length": 512},
}


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tokens = tokenizer(folder / "tokenizer")
    ours = trained(folder / "run", tokens, FLAGS)
    export_own(folder / "run", tokens, folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        processor = AutoProcessor.from_pretrained(folder / "out", trust_remote_code=True)
        theirs = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True)
        yield folder / "out", ours, processor, theirs


def picture(mode: str, size: tuple[int, int], form: str, **options) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 4), np.uint8)
    image = Image.fromarray(values, "RGBA").resize(size, Image.Resampling.BILINEAR).convert(mode)
    stream = io.BytesIO()
    if turn := options.pop("turn", None):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = turn
    image.save(stream, form, **options)
    return stream.getvalue()


PICTURES = {
    "plain": picture("RGB", (40, 24), "PNG"),
    "grey": picture("L", (31, 50), "PNG"),
    "palette": picture("P", (31, 50), "PNG"),
    "transparent": picture("RGBA", (33, 21), "PNG"),
    "large jpeg": picture("RGB", (400, 260), "JPEG"),
    "turned jpeg": picture("RGB", (300, 160), "JPEG", turn=6),
    "mirrored": picture("RGB", (30, 60), "PNG", turn=5),
    "tiny": picture("RGB", (3, 2), "PNG"),
    "narrow": picture("RGB", (900, 5), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_are_those_of_the_feed(name, exported):
    [planned] = encoder(exported[0]).plan(prompt_document("?", [Media("image", PICTURES[name], "png")]))
    [ours] = encoder(exported[0]).decode(planned).frames
    inputs = exported[2]("<|image|>", images=[Image.open(io.BytesIO(PICTURES[name]))])
    assert tuple(inputs["image_grids"][0].tolist()) == planned.grids[0]
    assert torch.equal(inputs["image_patches"], torch.from_numpy(ours))


def encoder(folder) -> DocumentEncoder:
    return DocumentEncoder(DataConfig(**LIMITS), SHAPE, Vocabulary(folder), 512)


@torch.no_grad()
def test_video_between_pictures_is_that_of_the_feed(exported):
    folder, _, processor, theirs = exported
    video, before, after = corpus.mp4_bytes(0, frames=14), PICTURES["plain"], PICTURES["transparent"]
    media = [Media("image", before, "png"), Media("video", video, "mp4"), Media("image", after, "png")]
    feed = encoder(folder)
    [planned] = feed.plan(prompt_document("?", media))
    ours = np.concatenate(feed.decode(planned).frames)
    scaler = VideoReformatter()
    frames = [Image.fromarray(upright_frame(frame, scaler)) for frame in decoded_frames(video, "mp4")]
    times = probe_video(video, "mp4", 100.0, 10_000_000).seconds
    content = [{"type": kind} for kind in ("image", "video", "image")] + [{"type": "text", "text": "?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pictures = [Image.open(io.BytesIO(data)) for data in (before, after)]
    inputs = processor(text, images=pictures, videos=[(frames, times)])
    assert inputs["input_ids"][0].tolist() == planned.tokens[:-1].tolist()
    assert inputs["image_grids"].tolist() == [list(grid) for grid in planned.grids]
    assert torch.equal(inputs["image_patches"], torch.from_numpy(ours))
    assert theirs(**inputs).logits.isfinite().all()


@given(st.integers(1, 200), st.floats(0.04, 3.0), st.floats(0.1, 8.0), st.integers(1, 40))
def test_the_frames_that_the_feed_takes_are_taken(count, step, fps, most):
    seconds = [number * step for number in range(count)]
    assert tuple(processing.sample_frames(seconds, fps, most)) == media_decode.sample_frames(seconds, fps, most)


@pytest.mark.parametrize("samples", [100, 401, 16_000, 33_333])
def test_frames_are_those_of_the_feed(samples, exported):
    wave = np.random.default_rng(1).uniform(-1, 1, samples).astype(np.float32)
    padded = np.pad(wave, (0, max(0, 400 - samples)))
    inputs = exported[2]("<|audio|>", audio=[wave])
    assert torch.equal(inputs["audio_features"], torch.from_numpy(log_mel(padded, SHAPE.n_mels)))


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(28, 14), (14, 14), (32, 16)]), st.integers(4, 64))
def test_sizes_are_those_of_the_feed(height, width, geometry, most):
    multiple, patch = geometry
    here = media_decode.fit_grid(height, width, multiple, patch, 4, most)
    assert processing.fit_grid(height, width, patch, multiple // patch, 4, most) == here


@torch.no_grad()
def test_a_conversation_with_a_picture_is_the_prompt_of_our_own_generation(exported):
    folder, ours, processor, theirs = exported
    data = PICTURES["plain"]
    [planned] = encoder(folder).plan(prompt_document("a short text", [Media("image", data, "png")]))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a short text"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text, images=[Image.open(io.BytesIO(data))])
    assert inputs["input_ids"][0].tolist() == planned.tokens[:-1].tolist()
    modality = torch.from_numpy(planned.modality[:-1])[None]
    here = ours(
        inputs["input_ids"],
        torch.arange(len(modality[0]))[None],
        token_modality=modality,
        image_patches=inputs["image_patches"],
        image_grids=inputs["image_grids"],
    )
    torch.testing.assert_close(theirs(**inputs).logits, here, rtol=1e-4, atol=1e-5)
    assert theirs.generate(**inputs, max_new_tokens=3).shape[1] > len(modality[0])


def test_saved_again_it_is_the_same(exported, tmp_path):
    processor, image = exported[2], Image.open(io.BytesIO(PICTURES["plain"]))
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert (again.pictures, again.videos, again.sounds) == (processor.pictures, processor.videos, processor.sounds)
    there, here = (each("a <|image|> b", images=[image]) for each in (again, processor))
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_what_does_not_fit_is_refused(exported):
    processor, image = exported[2], Image.open(io.BytesIO(PICTURES["plain"]))
    with pytest.raises(ValueError, match=r"hold 2 times <\|image\|>, and there are 1 such media"):
        processor("<|image|> and <|image|>", images=[image])
    with pytest.raises(ValueError, match="mode F"):
        processor("<|image|>", images=[image.convert("F")])
    with pytest.raises(ValueError, match="a clip of 40.0 s, limit"):
        processor("<|audio|>", audio=[np.zeros(640_000)])
    with pytest.raises(ValueError, match="no encoder of sounds"):
        processing.AnyExpertsProcessor(processor.tokenizer, pictures=processor.pictures)("<|audio|>", audio=[[0.0]])
