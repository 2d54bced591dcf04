#!/usr/bin/env python3
"""Make scenes of real stamps and rendered words, with questions, captions and masks, as records for build_shards.py.

    python data_tools/make_stamp_scenes.py RAW --output DIR --name train --scenes 3000
    python data_tools/make_stamp_scenes.py RAW --output DIR --name held_out --split held_out --single --scenes 400
    python data_tools/make_stamp_scenes.py RAW --output DIR --name new --split combinations --single --scenes 400

RAW is what fetch_demo_data.py made. The same arguments give the same bytes, on any machine. Files in DIR:
    pictures/NAME/000000.png  64 or 96 pixels a side, 1 to 4 things
    NAME.chats.jsonl          conversations about them (with --single NAME.TASK.jsonl, a question each)
    NAME.pair.jsonl           statements about two pictures
    NAME.captions.jsonl       image, text, false_captions: relation, order or colour exchanged
    NAME.masks.jsonl          which patches show something, and the description of the scene
Two stamps, or a word and a colour, of --split combinations meet in no scene of the other splits.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from megatron_anyexperts.corpus.scenes.art import Art, ArtError
from megatron_anyexperts.corpus.scenes.records import WEIGHTS, Order, write_scenes
from megatron_anyexperts.corpus.scenes.scene import Split


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("raw", type=Path, metavar="RAW", help="folder that fetch_demo_data.py made")
    own.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder of the records")
    own.add_argument("--name", required=True, help="of the files; other names give other scenes")
    own.add_argument("--split", choices=get_args(Split), default="train", help="default: train")
    own.add_argument("--scenes", type=int, default=1000, help="how many (default: 1000)")
    own.add_argument("--things", type=int, nargs="+", choices=range(1, 5), default=[1, 2, 3, 4], help="in a scene")
    own.add_argument("--questions", type=int, default=4, help="most questions of a scene (default: 4)")
    own.add_argument("--tasks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="of questions; default: all")
    own.add_argument("--single", action="store_true", help="a conversation per question, a file per task")
    own.add_argument("--square", action="store_true", help="96 x 96 pixels always")
    own.add_argument("--seed", type=int, default=0, help="default: 0")
    return own


def main() -> int:
    args = parser().parse_args()
    order = Order(
        name=args.name,
        split=args.split,
        scenes=args.scenes,
        things=tuple(args.things),
        asked=args.questions,
        tasks=tuple(args.tasks),
        single=args.single,
        square=args.square,
        seed=args.seed,
    )
    try:
        counts = write_scenes(args.output, Art(args.raw / "images"), order)
    except ArtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file, count in sorted(counts.items()):
        print(f"{args.output / file}: {count} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
