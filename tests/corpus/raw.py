"""Small raw data of every kind, real in format: encoded images, sound and video."""

import base64
import io
import json
import math
import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from megatron_anyexperts.corpus.corpus import Corpus, load_corpus


def png(number: int, width: int = 24, height: int = 16) -> bytes:
    """An image that differs for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def wav(number: int, seconds: float = 0.2, rate: int = 8000) -> bytes:
    """A tone whose pitch depends on the number."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        tone = (int(9000 * math.sin(i * (0.05 + number / 500))) for i in range(int(seconds * rate)))
        file.writeframes(b"".join(struct.pack("<h", value) for value in tone))
    return buffer.getvalue()


def mp4(number: int, frames: int = 5, width: int = 32, height: int = 32) -> bytes:
    """A short video of noise."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (height, width, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_lines(path: Path, records: list) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def raw_corpus(root: Path, scale: int = 1) -> Path:
    """Raw data of every kind below `root`, some of it bad; returns the corpus YAML.

    96 * scale items are good, 6 are not (whatever the scale).
    """
    for number in range(16 * scale):
        write(root / f"images/{number}.png", png(number))
        write(root / f"images/{number}.txt", f"Picture number {number}.")
        write(root / f"speech/en/{number}.wav", wav(number))
        write(root / f"speech/en/{number}.txt", f"Tone {number}.")
        write(root / f"text/{number}.txt", f"Document {number} tells of {number * 7} things.\n" * 3)
    for number in range(4 * scale):
        write(root / f"video/{number}.mp4", mp4(number))
        write(root / f"video/{number}.txt", f"Noise {number}.")
    write_lines(
        root / "lines.jsonl", [{"text": f"Line {number} of many.", "lang": "en"} for number in range(16 * scale)]
    )
    pages = [
        {"texts": [f"Before {n}", None, f"after {n}"], "images": [None, data_url(png(1000 + n)), None]}
        for n in range(12 * scale)
    ]
    write_lines(root / "pages.jsonl", pages)
    chats = [
        {
            "image": f"images/{n}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": f"Picture number {n}."},
            ],
        }
        for n in range(16 * scale)
    ]
    write_lines(root / "chats.jsonl", chats)
    write(root / "images/broken.png", b"\x89PNG\r\n\x1a\n rubbish")
    write(root / "images/broken.txt", "Not to be seen.")
    write(root / "images/uncaptioned.png", png(5000))
    write(root / "images/blank.png", png(5001))
    write(root / "images/blank.txt", "  \n")
    write(root / "text/twin.txt", (root / "text/3.txt").read_bytes())
    write(root / "text/latin.txt", "caf\xe9 ol\xe9".encode("latin-1"))
    write(root / "speech/en/silent.wav", b"")
    write(root / "speech/en/silent.txt", "Nothing.")
    return write(
        root / "corpus.yaml",
        """
name: small
validation_fraction: 0.1
chunk_items: 8
chunk_bytes: 400
shards: {max_samples: 10, max_bytes: 200000}
tokenizer: {vocab_size: 300}
sources:
  - {type: image_folder, path: images}
  - {type: audio_folder, path: speech, language_from_folder: true}
  - {type: video_folder, path: video}
  - {type: text_folder, path: text}
  - {type: text_table, path: lines.jsonl, language_field: lang}
  - {type: interleaved, path: pages.jsonl}
  - {type: chat, path: chats.jsonl, media_root: .}
""",
    )


def corpus_of(root: Path, *sources: dict, **options) -> Corpus:
    """A corpus of the given sources below `root`."""
    description = {"name": "test", "sources": list(sources), "tokenizer": {"vocab_size": 300}} | options
    return load_corpus(write(root / "corpus.yaml", json.dumps(description, default=str)))


def items(corpus: Corpus) -> list:
    """All items of all sources."""
    return [
        item
        for source in corpus.sources
        for chunk in source.chunks(corpus.seed, corpus.chunk_items, corpus.chunk_bytes)
        for _, item in source.read(chunk, None, corpus.limits.max_media_bytes)
    ]


def tree_bytes(output: Path) -> dict[str, bytes]:
    """Everything in a corpus folder that must be the same for the same input: all but working files."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and ".build" not in path.parts and path.suffix != ".sqlite"
    }
