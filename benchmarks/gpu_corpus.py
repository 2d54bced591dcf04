"""Shards for a short training on one GPU: documents that fill rows, pictures, tones, and a tokenizer.

    python -m benchmarks.gpu_corpus FOLDER [--small]
"""

import argparse
from pathlib import Path

from megatron_anyexperts.data.tokenizer import train_tokenizer
from tests.feed import corpus


def main() -> None:
    """Write FOLDER/shards and FOLDER/tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="short documents and small pictures")
    args = parser.parse_args()
    words, count, side = (30, 64, 56) if args.small else (1200, 640, 448)
    shards = args.folder / "shards"
    samples = {
        "text": [{"json": {"kind": "text", "text": corpus.prose(index, words)}} for index in range(count)],
        "image_text": [
            {
                "json": {"kind": "image_text", "caption": corpus.prose(index, words // 5)},
                "jpg": corpus.image_bytes(index, width=side, height=side),
            }
            for index in range(count // 2)
        ],
        "audio_text": [corpus.crude("audio_text", index) for index in range(count // 2)],
    }
    for kind, made in samples.items():
        corpus.write_dataset(shards / kind, kind, made, per_shard=8)
    corpus.write_blend(shards, {"text": 6.0, "image_text": 3.0, "audio_text": 1.0})
    train_tokenizer([corpus.prose(index, 30) for index in range(200)], 512, args.folder / "tokenizer")


if __name__ == "__main__":
    main()
