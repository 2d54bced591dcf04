"""Thousands of damaged media: whatever the builder makes of each, it ends, accounts for all and the loader agrees."""

import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.unforeseen import UNFORESEEN
from megatron_anyexperts.corpus.workers import Share
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.cookers import cook
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MediaShape
from tests.corpus.media import encoded_audio, encoded_video, moving, mp3_that_changes_its_channels, tone
from tests.corpus.raw import corpus_of, write

MUTANTS = 3000
AUDIO = [("pcm_s16le", "wav"), ("pcm_s64le", "wav"), ("flac", "flac"), ("mp3", "mp3"), ("aac", "adts"), ("aac", "ipod")]
AUDIO += [("libopus", "ogg"), ("libopus", "webm")]
VIDEO = [("mpeg4", "mp4"), ("libx264", "mp4"), ("libx264", "matroska"), ("libvpx-vp9", "webm"), ("mjpeg", "avi")]
FORMS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]


def starts() -> list[tuple[str, bytes]]:
    """Sound media of every kind, small."""
    found = [("audio", mp3_that_changes_its_channels())]
    found += [("audio", encoded_audio(*form, 48_000, "stereo", tone(0.3, 48_000, "stereo"))) for form in AUDIO]
    found += [("video", encoded_video(*form, 64, 48, 8, 10)) for form in VIDEO]
    found.append(("video", encoded_video("mpeg4", "mp4", 64, 48, 12, 10, rotation=90, starts_at=-4)))
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in FORMS:
        buffer = io.BytesIO()
        Image.fromarray(moving(3, 60, 40)).save(buffer, form, **({} if form in ("GIF", "BMP") else {"exif": exif}))
        found.append(("image", buffer.getvalue()))
    return found


def mutant(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to four damages: changed bytes, extreme numbers, cuts, holes, repetitions, a piece of another file."""
    content = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        # Headers are short and matter most.
        reach = len(content) if rng.random() < 0.5 else min(len(content), 128)
        at, length = int(rng.integers(reach)), int(rng.integers(1, 64))
        match rng.integers(7):
            case 0:
                content[at] = rng.integers(256)
            case 1:
                content[at : at + 4] = int(rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF])).to_bytes(4, "big")
            case 2:
                content[at : at + 2] = int(rng.choice([0, 1, 0x7FFF, 0xFFFF])).to_bytes(2, "little")
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length]
            case 5:
                content[at : at + length] = other[at : at + length]
            case _:
                content = content[: max(1, at)] if rng.random() < 0.3 else content
        if not content:
            return b"\0"
    return bytes(content)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damaged_media_are_accounted_for_and_what_is_accepted_is_read(tmp_path):
    rng, whole = np.random.default_rng(0), starts()
    for number in range(MUTANTS):
        kind, data = whole[number % len(whole)]
        content = mutant(data, whole[rng.integers(len(whole))][1], rng)
        write(tmp_path / kind / f"{number}.{ {'audio': 'wav', 'video': 'mp4', 'image': 'png'}[kind]}", content)
        write(tmp_path / kind / f"{number}.txt", f"Number {number}.")
    sources = [{"type": f"{kind}_folder", "path": kind} for kind in ("image", "audio", "video")]
    corpus = corpus_of(tmp_path, *sources, validation_fraction=0, limits={"min_seconds": 0.0, "min_side": 1})
    manifest = build(corpus, tmp_path / "out", Share(), workers=2, quiet=True)
    assert manifest["items"] == MUTANTS == manifest["samples"] + sum(manifest["rejected"].values())
    assert UNFORESEEN not in manifest["rejected"], (tmp_path / "out/rejected.jsonl").read_text()
    config = DataConfig(data_image_max_patches=64, data_video_max_patches=64)
    encoder = DocumentEncoder(config, MediaShape(), Vocabulary(tmp_path / "out/tokenizer"), 4096)
    read = 0
    for entry in manifest["shards"]:
        for sample in webdataset.WebDataset(str(tmp_path / "out" / entry["shard"]), shardshuffle=False):
            kind = json.loads(sample["json"])["kind"]
            [planned] = encoder.plan(cook(kind, sample | {"__restore_key__": ()}))
            encoder.decode(planned)
            read += 1
    assert read == manifest["samples"] > MUTANTS / 10
    print(f"{MUTANTS} damaged media: {read} read, {manifest['rejected']}")
