#!/usr/bin/env python3
"""Turn the demo's raw data into questions and answers about real pictures and recordings, as chat records.

Six tasks, a JSON-lines file each, in the OpenAI form that build_shards.py reads as a `chat` source:
    colour.jsonl      which colour covers most of a picture, where one covers enough of it
    topic.jsonl       which topic a picture belongs to: its top folder, for folders with enough pictures
    object.jsonl      which object is in the picture: its English caption, where it is short
    written.jsonl     which language a caption is written in
    language.jsonl    which language is spoken
    transcript.jsonl  what is being said

Media are named by their path below the raw data; answers come from pixels, folder names and captions, which the model
never sees. Training and validation are divided later, by build_shards.py, by a hash of the medium's or caption's bytes.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

QUESTIONS = {
    "colour": "Which colour is most of this picture?",
    "topic": "Which topic is this picture about?",
    "object": "Which object is in this picture?",
    "written": "Which language is this written in?",
    "language": "Which language is spoken?",
    "transcript": "What is being said?",
}
SPOKEN = {"en": "English", "es": "Spanish", "fr": "French", "nl": "Dutch"}
WRITTEN = SPOKEN | {
    "cs": "Czech", "de": "German", "el": "Greek", "fi": "Finnish", "hi": "Hindi", "hu": "Hungarian", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sv": "Swedish",
    "tr": "Turkish",
}  # fmt: skip
_HUES = {20: "red", 45: "orange", 70: "yellow", 170: "green", 265: "blue", 330: "purple", 361: "red"}  # degrees, below

CAPTIONS_PER_PICTURE = 4

Answered = tuple[str, dict, str]
"""Task, what the question is about as a part of a chat message, answer."""


def picture_answers(raw: Path, min_pictures: int, max_words: int, min_share: float) -> Iterator[Answered]:
    """Colour, topic and object of each picture, and the languages of its captions.

    Args:
        raw: folder that fetch_demo_data.py made.
        min_pictures: a folder with fewer pictures is no topic.
        max_words: captions with more words are not asked for.
        min_share: of the picture that the colour must cover.
    """
    pictures = sorted((raw / "images").rglob("*.png"))
    topics = Counter(_topic(raw, picture) for picture in pictures)
    for picture in pictures:
        part, topic = _medium(raw, "image", picture), _topic(raw, picture)
        colour, share = main_colour(Image.open(picture))
        if share >= min_share:
            yield "colour", part, colour
        if topics[topic] >= min_pictures:
            yield "topic", part, topic
        captions = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
        caption = captions.get("en", "").rstrip(".")
        if 0 < len(caption.split()) <= max_words:
            yield "object", part, caption
        known = sorted(captions.keys() & WRITTEN.keys())
        for code in random.Random(picture.name).sample(known, min(CAPTIONS_PER_PICTURE, len(known))):
            yield "written", {"type": "text", "text": captions[code]}, WRITTEN[code]


def recording_answers(raw: Path, max_words: int) -> Iterator[Answered]:
    """Language and words of each recording in one of `SPOKEN`."""
    for code, language in SPOKEN.items():
        for clip in sorted((raw / "speech" / code).rglob("*.ogg")):
            part = _medium(raw, "audio", clip)
            yield "language", part, language
            transcript = clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
            if 0 < len(transcript.split()) <= max_words:
                yield "transcript", part, transcript


def main_colour(picture: Image.Image) -> tuple[str, float]:
    """Return the colour that covers most of the opaque part of a picture, by common name, and its share of that."""
    picture = picture.convert("RGBA")
    picture.thumbnail((64, 64))
    opaque = np.asarray(picture)[np.asarray(picture)[..., 3] > 127][:, :3]
    if not len(opaque):
        return "", 0.0
    hue, saturation, value = (np.asarray(Image.fromarray(opaque[None]).convert("HSV"))[0] / 255.0).T
    names = np.array(list(_HUES.values()), dtype=object)[np.searchsorted(list(_HUES), 360 * hue, side="right")]
    names[(360 * hue < 45) & (value < 0.65)] = "brown"
    names[saturation < 0.2] = "grey"
    names[(saturation < 0.2) & (value > 0.8)] = "white"
    names[value < 0.2] = "black"
    [(name, count)] = Counter(names).most_common(1)
    return name, count / len(names)


def _topic(raw: Path, picture: Path) -> str:
    return picture.relative_to(raw / "images").parts[0]


def _medium(raw: Path, kind: str, path: Path) -> dict:
    return {"type": kind, "path": str(path.relative_to(raw))}


def record(task: str, part: dict, answer: str) -> dict:
    """One chat record: what the question is about and the question, then the answer."""
    question = [part, {"type": "text", "text": QUESTIONS[task]}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW", help="folder that fetch_demo_data.py made")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the records (default: RAW/chats)")
    parser.add_argument("--min-pictures", type=int, default=30, help="smallest topic (default: 30 pictures)")
    parser.add_argument("--max-words", type=int, default=6, help="longest answer (default: 6 words)")
    parser.add_argument("--min-share", type=float, default=0.4, help="a colour covers this much (default: 0.4)")
    args = parser.parse_args()
    if not (args.raw / "images").is_dir():
        print(f"error: {args.raw} has no folder images; make it with data_tools/fetch_demo_data.py", file=sys.stderr)
        return 2
    lines: dict[str, list[str]] = {task: [] for task in QUESTIONS}
    answers = picture_answers(args.raw, args.min_pictures, args.max_words, args.min_share)
    for task, part, answer in chain(answers, recording_answers(args.raw, args.max_words)):
        lines[task].append(json.dumps(record(task, part, answer), ensure_ascii=False) + "\n")
    folder = args.output or args.raw / "chats"
    folder.mkdir(parents=True, exist_ok=True)
    for task, records in lines.items():
        (folder / f"{task}.jsonl").write_text("".join(records), encoding="utf-8")
        print(f"{folder / task}.jsonl: {len(records)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
