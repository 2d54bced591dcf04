"""What lies in a run directory, and what each part is for."""

from __future__ import annotations

from pathlib import Path

from megatron_anyexperts.survival.run_directory import Run

_PARTS = (
    ("config.yaml", "flags of the newest start; --config reads it, and tools take it from the run by themselves"),
    ("logs/metrics.jsonl", "figures of each log interval"),
    ("logs/held_out.jsonl", "held-out losses of each evaluation"),
    ("logs/expert_load.json", "load of every expert, newest interval"),
    ("logs/events.jsonl", "starts, saves, faults, exits"),
    ("logs/quarantine.jsonl", "samples that killed a decoder"),
    ("logs/output", "all that each rank printed, Megatron's lines among it"),
    ("logs/heartbeat", "newest sign of life of each rank"),
    ("logs/stacks", "last stack of each rank that crashed or hung"),
    ("checkpoints", "sealed checkpoints"),
    ("tensorboard", "curves: tensorboard --logdir {run}/tensorboard"),
    ("samples", "keys of the trained samples, by rank"),
    ("traces", "routing traces, which anyexperts analyse reads"),
    ("pictures", "what anyexperts pictures, analyse and budgets drew"),
    ("report.html", "what anyexperts runs report wrote"),
)


def files_of(run: Run) -> list[tuple[str, str, int]]:
    """Path, purpose and bytes of everything in a run directory: what is known by name, and then the rest.

    Sizes of folders are those of the files below them.
    """
    known = [(name, purpose) for name, purpose in _PARTS if (run.root / name).exists()]
    named = {name.split("/")[0] for name, _ in known} | {name for name, _ in known}
    others = [path for folder in (run.root, run.logs) if folder.is_dir() for path in sorted(folder.iterdir())]
    unknown = [str(path.relative_to(run.root)) for path in others]
    rows = [*known, *((name, "other") for name in unknown if name not in named)]
    return [(name, purpose.format(run=run.root), _size(run.root / name)) for name, purpose in rows]


def _size(path: Path) -> int:
    """A file may vanish while a run goes on."""
    total = 0
    for each in path.rglob("*") if path.is_dir() else (path,):
        try:
            total += each.stat().st_size if each.is_file() else 0
        except OSError:
            continue
    return total
