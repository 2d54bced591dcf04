#!/usr/bin/env python3
"""Turn the demo's raw data into questions and answers about real pictures and recordings, as chat records.

Four tasks, a JSON-lines file each, in the OpenAI form that build_shards.py reads as a `chat` source:
    topic.jsonl       which topic a picture belongs to: its top folder, for folders with enough pictures
    object.jsonl      which object is in the picture: its English caption, where it is short
    language.jsonl    which language is spoken
    transcript.jsonl  what is being said

Media are named by their path below the raw data; answers come from folder names and captions, which the model never
sees. Training and validation are divided later, by build_shards.py, by a hash of the medium's bytes.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

QUESTIONS = {
    "topic": "Which topic is this picture about?",
    "object": "Which object is in this picture?",
    "language": "Which language is spoken?",
    "transcript": "What is being said?",
}
LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "nl": "Dutch"}

Answered = tuple[str, str, Path, str]
"""Task, kind of medium, medium, answer."""


def picture_answers(raw: Path, min_pictures: int, max_words: int) -> Iterator[Answered]:
    """Topic and object of each picture.

    Args:
        raw: folder that fetch_demo_data.py made.
        min_pictures: a folder with fewer pictures is no topic.
        max_words: captions with more words are not asked for.
    """
    pictures = sorted((raw / "images").rglob("*.png"))
    topics = Counter(_topic(raw, picture) for picture in pictures)
    for picture in pictures:
        topic = _topic(raw, picture)
        if topics[topic] >= min_pictures:
            yield "topic", "image", picture, topic
        caption = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8")).get("en", "").rstrip(".")
        if 0 < len(caption.split()) <= max_words:
            yield "object", "image", picture, caption


def recording_answers(raw: Path, max_words: int) -> Iterator[Answered]:
    """Language and words of each recording in one of `LANGUAGES`."""
    for code, language in LANGUAGES.items():
        for clip in sorted((raw / "speech" / code).rglob("*.ogg")):
            yield "language", "audio", clip, language
            transcript = clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
            if 0 < len(transcript.split()) <= max_words:
                yield "transcript", "audio", clip, transcript


def _topic(raw: Path, picture: Path) -> str:
    return picture.relative_to(raw / "images").parts[0]


def record(raw: Path, task: str, kind: str, medium: Path, answer: str) -> dict:
    """One chat record: the medium and the question, then the answer."""
    question = [{"type": kind, "path": str(medium.relative_to(raw))}, {"type": "text", "text": QUESTIONS[task]}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW", help="folder that fetch_demo_data.py made")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the records (default: RAW/chats)")
    parser.add_argument("--min-pictures", type=int, default=30, help="smallest topic (default: 30 pictures)")
    parser.add_argument("--max-words", type=int, default=6, help="longest answer (default: 6 words)")
    args = parser.parse_args()
    if not (args.raw / "images").is_dir():
        print(f"error: {args.raw} has no folder images; make it with data_tools/fetch_demo_data.py", file=sys.stderr)
        return 2
    lines: dict[str, list[str]] = {task: [] for task in QUESTIONS}
    answers = [*picture_answers(args.raw, args.min_pictures, args.max_words)]
    for task, kind, medium, answer in [*answers, *recording_answers(args.raw, args.max_words)]:
        lines[task].append(json.dumps(record(args.raw, task, kind, medium, answer), ensure_ascii=False) + "\n")
    folder = args.output or args.raw / "chats"
    folder.mkdir(parents=True, exist_ok=True)
    for task, records in lines.items():
        (folder / f"{task}.jsonl").write_text("".join(records), encoding="utf-8")
        print(f"{folder / task}.jsonl: {len(records)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
