"""A tiny corpus of every kind, made on the spot: real encodings of drawn pictures, tones and moving bars."""

import io
import json
import wave
from pathlib import Path

import av
import numpy as np
import webdataset
import yaml
from megatron.energon.flavors import BaseWebdatasetFactory
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_anyexperts.data.tokenizer import SPECIAL_TOKENS

WORDS = [
    "a",
    "small",
    "red",
    "boat",
    "sails",
    "over",
    "the",
    "wide",
    "blue",
    "sea",
    "while",
    "two",
    "old",
    "birds",
    "sing",
]


def prose(index: int, words: int) -> str:
    rng = np.random.default_rng(index)
    return f"{index} " + " ".join(rng.choice(WORDS, words))


def picture(index: int, width: int = 56, height: int = 42) -> Image.Image:
    image = Image.new("RGB", (width, height), (index * 37 % 256, index * 11 % 256, 90))
    ImageDraw.Draw(image).ellipse((index % 20, 5, index % 20 + 20, 30), fill=(250, 240, 10))
    return image


def image_bytes(index: int, form: str = "JPEG", **size: int) -> bytes:
    buffer = io.BytesIO()
    picture(index, **size).save(buffer, form)
    return buffer.getvalue()


def wav_bytes(index: int, seconds: float = 0.6, rate: int = 22_050) -> bytes:
    time = np.arange(int(seconds * rate)) / rate
    tone = (np.sin(2 * np.pi * (200 + 30 * index) * time) * 12_000).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, len(tone), "NONE", ""))
        file.writeframes(tone.tobytes())
    return buffer.getvalue()


def mp4_bytes(index: int, frames: int = 12, rate: int = 4) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_image(picture(index + number, 64, 48))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def crude(kind: str, index: int) -> dict:
    """One crude sample, without its key."""
    match kind:
        case "text":
            return {"json": {"kind": kind, "text": prose(index, 5 + index * 7 % 60)}}
        case "image_text":
            return {"json": {"kind": kind, "caption": prose(index, 6)}, "jpg": image_bytes(index)}
        case "audio_text":
            return {"json": {"kind": kind, "transcript": prose(index, 5)}, "wav": wav_bytes(index)}
        case "video_text":
            return {"json": {"kind": kind, "caption": prose(index, 5)}, "mp4": mp4_bytes(index)}
        case "interleaved":
            segments = [
                {"type": "text", "text": prose(index, 4)},
                {"type": "image", "media": "0.jpg"},
                {"type": "text", "text": prose(index, 3)},
                {"type": "image", "media": "1.png"},
            ]
            return {
                "json": {"kind": kind, "segments": segments},
                "0.jpg": image_bytes(index),
                "1.png": image_bytes(index + 1, "PNG"),
            }
        case "chat":
            messages = [
                {
                    "role": "user",
                    "content": [{"type": "image", "media": "0.jpg"}, {"type": "text", "text": "what is it?"}],
                },
                {"role": "assistant", "content": prose(index, 6)},
            ]
            return {"json": {"kind": kind, "messages": messages}, "0.jpg": image_bytes(index)}
    raise ValueError(kind)


def write_dataset(folder: Path, kind: str, samples: list[dict], per_shard: int) -> None:
    """Write tars plus Energon metadata; the last shard is held out if there are several."""
    folder.mkdir(parents=True)
    names = []
    for start in range(0, len(samples), per_shard):
        names.append(f"shard-{start // per_shard:03d}.tar")
        with webdataset.TarWriter(str(folder / names[-1])) as tar:
            for offset, sample in enumerate(samples[start : start + per_shard]):
                members = {name: json.dumps(part) if name == "json" else part for name, part in sample.items()}
                tar.write({"__key__": f"{kind}-{start + offset:05d}", **members})
    held_out = names[1:][-1:]
    splits = [("train", f"shard-{{000..{len(names) - len(held_out) - 1:03d}}}.tar"), *(("val", n) for n in held_out)]
    BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_patterns=splits, workers=1)
    config = {
        "__module__": "megatron.energon",
        "__class__": "CrudeWebdataset",
        "subflavors": {"kind": kind},
    }
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(config))


def write_blend(folder: Path, weights: dict[str, float]) -> Path:
    """A metadataset with the weights for training and every dataset for validation."""
    file = folder / "blend.yaml"
    content = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {
            "train": {"blend": [{"weight": weight, "path": kind} for kind, weight in weights.items()]},
            "val": {"blend": [{"weight": 1, "path": kind} for kind in weights]},
        },
    }
    file.write_text(yaml.safe_dump(content))
    return file


def write_epoch_blend(folder: Path, kinds: list[str]) -> Path:
    """A metadataset whose training split holds every sample once."""
    file = folder / "epoch.yaml"
    train = {"blend_epochized": [{"repetitions": 1, "path": kind} for kind in kinds]}
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": train}}
    file.write_text(yaml.safe_dump(content))
    return file


def build(folder: Path, counts: dict[str, int], per_shard: int = 8) -> Path:
    """Write one dataset per kind, the last shard held out, and return the blend file."""
    for kind, count in counts.items():
        write_dataset(folder / kind, kind, [crude(kind, index) for index in range(count)], per_shard)
    return write_blend(folder, dict.fromkeys(counts, 1.0))


def write_tokenizer(folder: Path) -> Path:
    """Train a byte-level BPE of 400 tokens on the corpus' words and return its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
