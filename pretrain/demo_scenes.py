"""The demo's stamp scenes: what is drawn, and how much of it training sees when."""

import sys
from collections.abc import Callable
from pathlib import Path

import yaml

SEEN_FIRST = 150
"""Iterations in which scenes have one thing: before a model knows things by sight it cannot learn where they are."""

ORDERS = {
    "first": "--things 1 --scenes 2500 --questions 2 --tasks at read colour",
    "scenes": "--things 2 3 --scenes 3000",
    "held_out": "--split held_out --things 1 1 2 --scenes 300 --questions 2 --single --tasks at read colour exists",
    "new": "--split combinations --things 1 2 --scenes 150 --questions 2 --single --tasks at read colour",
}
"""Arguments of make_stamp_scenes.py by name: the first two are for training."""

# Weights of samples. First scenes alone: prose, whose loss is larger, would keep the model from learning to see. Then
# about 6 % of the rows are prose, 10 % speech, 5 % captioned pictures, the rest scenes.
_OTHERS = {"demo/text": 0.01, "demo/audio_text": 0.75, "demo/image_text": 0.3}
_STAGES = {
    0: {"first/chat": 1.0, "demo/chat": 0.0} | dict.fromkeys(_OTHERS, 0.0),
    SEEN_FIRST: {"first/chat": 1.5, "demo/chat": 0.8} | _OTHERS,
}


def available(raw: Path) -> bool:
    """Whether the stamps could be fetched; without Debian's packages the demo does without scenes."""
    return (raw / "images/animals").is_dir()


def make(raw: Path, run: Callable[..., None]) -> None:
    """Draw all scenes below `raw`, unless they are there."""
    if (raw / "scenes").exists():
        return
    script = [sys.executable, "data_tools/make_stamp_scenes.py", raw, "--output", raw / "scenes", "--square"]
    for name, arguments in ORDERS.items():
        run(f"draw scenes: {name}", *script, "--name", name, *arguments.split())


def write_blend(output: Path) -> list[str]:
    """Write what training reads and when; return the flags that say so."""
    blend = yaml.safe_load((output / "shards/blend.yaml").read_text())
    for split, datasets in blend["splits"].items():
        first = yaml.safe_load((output / "first/blend.yaml").read_text())["splits"]["train"]["blend"]
        for folder, entries in (("shards", datasets["blend"]), ("first", first)):
            for entry in entries:
                entry["path"] = f"./{folder}/{entry['path']}"
        if split == "train":
            datasets["blend"] += first
            for entry in datasets["blend"]:
                entry["weight"] = _STAGES[0]["{corpus}/{kind}".format(**entry["subflavors"])]
    stages = [{"at_step": step, "weights": weights} for step, weights in _STAGES.items() if step]
    files = {"blend.yaml": blend, "schedule.yaml": {"stages": stages}}
    for name, content in files.items():
        (output / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return ["--data-path", str(output / "blend.yaml"), "--data-mixture-schedule", str(output / "schedule.yaml")]
