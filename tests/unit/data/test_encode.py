import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.cookers import cook
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.samples import Document, SampleError, Text
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import AUDIO, IMAGE, TEXT, VIDEO, MediaShape
from tests.feed import corpus

SHAPE = MediaShape(patch_size=7)
CONFIG = DataConfig(data_image_max_patches=256, data_video_max_patches=256, data_video_fps=2.0, data_video_max_frames=4)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return Vocabulary(corpus.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def encoder(vocabulary):
    return DocumentEncoder(CONFIG, SHAPE, vocabulary, 256)


def document(kind: str, parts: list) -> Document:
    return Document(__key__="k", __restore_key__=(), kind=kind, parts=parts)


def cooked(kind: str, index: int = 1, **replaced) -> Document:
    crude = {**corpus.crude(kind, index), **replaced}
    crude["json"] = corpus.json.dumps(crude["json"])
    return cook(kind, {"__key__": "k", "__restore_key__": (), **crude})


@pytest.mark.parametrize(
    ("kind", "code", "media"),
    [("image_text", IMAGE, 1), ("video_text", VIDEO, 1), ("interleaved", IMAGE, 2), ("chat", IMAGE, 1)],
)
def test_placeholders_equal_the_tokens_of_the_decoded_media(encoder, kind, code, media):
    [planned] = encoder.plan(cooked(kind))
    decoded = encoder.decode(planned)
    assert planned.sample_modality == code and len(decoded.grids) == media
    assert (planned.modality == code).sum() == sum(SHAPE.image_token_count(grid) for grid in decoded.grids)
    assert [len(patches) for patches in decoded.frames] == [t * h * w for t, h, w in decoded.grids]
    assert all(patches.dtype == np.float32 and abs(patches).max() <= 1 for patches in decoded.frames)


def test_audio_placeholders_follow_the_clip(encoder):
    [planned] = encoder.plan(cooked("audio_text"))
    [clip] = planned.clips
    assert clip.shape == (60, SHAPE.n_mels)  # 0.6 s at a hop of 10 ms
    assert (planned.modality == AUDIO).sum() == SHAPE.audio_token_count(60)


def test_a_video_names_the_time_of_each_frame(encoder, vocabulary):
    [planned] = encoder.plan(cooked("video_text"))
    [grid] = planned.grids
    assert grid[0] == 4  # 3 s at 2 fps within a budget of 4
    for seconds in ("0.2s", "1.0s", "1.8s", "2.5s"):  # frames 1, 4, 7, 10 of a 4 fps video
        ids = vocabulary.encode(seconds)
        assert any(planned.tokens[i : i + len(ids)].tolist() == ids for i in range(len(planned.tokens)))


def test_only_text_is_ever_a_target(encoder, vocabulary):
    for kind in ("text", "image_text", "audio_text", "video_text", "interleaved", "chat"):
        [planned] = encoder.plan(cooked(kind))
        allowed = {vocabulary.special["<|endoftext|>"], vocabulary.special["<|im_end|>"]}
        special = set(vocabulary.special.values()) - allowed
        assert not special & set(planned.tokens[planned.target].tolist()), kind
        assert (planned.modality[planned.target] == TEXT).all()


def test_chat_trains_on_the_assistant_alone(encoder, vocabulary):
    text = [{"role": "user", "content": "the blue sea"}, {"role": "assistant", "content": "old birds"}]
    meta = corpus.json.dumps({"messages": [*text, *text]})
    [planned] = encoder.plan(cook("chat", {"__key__": "k", "__restore_key__": (), "json": meta}))
    turn = [*vocabulary.encode("old birds"), vocabulary.special["<|im_end|>"]]
    assert planned.tokens[planned.target].tolist() == [*turn, *turn, vocabulary.special["<|endoftext|>"]]


def test_quoted_special_tokens_stay_text(encoder, vocabulary):
    [planned] = encoder.plan(document("text", [Text("see <|image|> and <|im_end|>", True)]))
    assert vocabulary.special["<|image|>"] not in planned.tokens
    assert vocabulary.special["<|im_end|>"] not in planned.tokens
    assert (planned.modality == TEXT).all()


@settings(max_examples=40)
@given(st.integers(1, 700), st.integers(8, 100))
def test_cutting_long_text_loses_and_repeats_no_target(vocabulary, words, seq_length):
    config = dataclasses.replace(CONFIG, data_image_min_patches=1, data_image_max_patches=4, data_video_max_patches=4)
    encoder = DocumentEncoder(config, SHAPE, vocabulary, seq_length)
    text = corpus.prose(words, words)
    chunks = list(encoder.plan(document("text", [Text(text, True)])))
    expected = [*vocabulary.encode(text), vocabulary.special["<|endoftext|>"]]
    assert [token for chunk in chunks for token in chunk.tokens[1:]] == expected[1:]
    assert [token for chunk in chunks for token in chunk.tokens[:-1]] == expected[:-1]
    assert all(0 < chunk.size[0] <= seq_length for chunk in chunks)
    assert len({chunk.__key__ for chunk in chunks}) == len(chunks)


def test_long_documents_with_media_are_rejected_with_their_size(encoder):
    long = cooked("image_text", json={"caption": corpus.prose(0, 300)})
    with pytest.raises(SampleError, match="tokens exceed the 256 of a row"):
        list(encoder.plan(long))


def test_row_budgets_bind_patches_and_frames(vocabulary):
    config = dataclasses.replace(CONFIG, data_row_patches=300, data_row_audio_frames=40)
    encoder = DocumentEncoder(config, SHAPE, vocabulary, 256)
    assert encoder.limits == (256, 300, 40)
    with pytest.raises(SampleError, match="60 audio frames exceed the 40 of a row"):
        list(encoder.plan(cooked("audio_text")))


def test_limits_that_never_fit_a_row_are_refused_at_the_start(vocabulary):
    with pytest.raises(ValueError, match="data_image_max_patches=1024 cannot fit .* set it to at most 248"):
        DocumentEncoder(DataConfig(), SHAPE, vocabulary, 64)


@pytest.mark.parametrize(
    ("kind", "sample", "reason"),
    [
        ("text", {"json": b"{"}, "unreadable JSON"),
        ("text", {"json": b"[]"}, "not an object"),
        ("text", {}, "unreadable JSON"),
        ("text", {"json": b'{"text": " "}'}, "'text' is missing or empty"),
        ("image_text", {"json": b'{"caption": "x"}'}, "no image member"),
        ("image_text", {"json": b'{"caption": "x"}', "jpg": b"junk"}, "unreadable image"),
        ("audio_text", {"json": b'{"transcript": "x"}', "wav": b"RIFFjunk"}, "unreadable audio"),
        ("video_text", {"json": b'{"caption": "x"}', "mp4": b"#EXTM3U\nhttp://x/"}, "unreadable video"),
        ("interleaved", {"json": b'{"segments": [{"type": "image", "media": "9.jpg"}]}'}, "missing member '9.jpg'"),
        ("interleaved", {"json": b'{"segments": 5}'}, "not a list"),
        ("chat", {"json": b'{"messages": [{"role": "boss", "content": "x"}]}'}, "role 'boss'"),
        ("chat", {"json": b'{"messages": [{"role": "user", "content": "x"}]}'}, "without an assistant turn"),
        ("chat", {"json": b'{"messages": [{"role": "assistant", "content": 5}]}'}, "neither text nor a list"),
    ],
)
def test_bad_samples_say_what_is_wrong(encoder, kind, sample, reason):
    with pytest.raises(SampleError, match=reason):
        list(encoder.plan(cook(kind, {"__key__": "k", "__restore_key__": (), **sample})))


def test_a_truncated_picture_is_found_when_it_is_decoded(encoder):
    whole = corpus.image_bytes(1, width=400, height=300)
    document = cooked("image_text", jpg=whole[: len(whole) * 3 // 4])
    [planned] = encoder.plan(document)
    with pytest.raises(SampleError, match="unreadable image"):
        encoder.decode(planned)
