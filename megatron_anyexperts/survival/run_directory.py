"""Where a run keeps its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One run directory: `RUN/{config.yaml,lock,checkpoints,tensorboard,logs,samples,traces}`, and its `logs`."""

    root: Path

    @property
    def config(self) -> Path:
        """Flags of the newest start, with the versions that carried them out."""
        return self.root / "config.yaml"

    @property
    def lock(self) -> Path:
        """Who trains here now."""
        return self.root / "lock"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def samples(self) -> Path:
        """Keys of the consumed samples, one file per data-parallel rank."""
        return self.root / "samples"

    @property
    def traces(self) -> Path:
        """Routing traces, a folder each; see docs/analysis.md."""
        return self.root / "traces"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def output(self) -> Path:
        """All that each rank printed, one file per rank, whatever the screen showed of it."""
        return self.logs / "output"

    @property
    def events(self) -> Path:
        """Starts, exits, hangs and other rare happenings, one JSON object a line."""
        return self.logs / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """Figures of each log interval, one JSON object a line."""
        return self.logs / "metrics.jsonl"

    @property
    def held_out(self) -> Path:
        """Held-out losses of each evaluation, one JSON object a line."""
        return self.logs / "held_out.jsonl"

    @property
    def expert_load(self) -> Path:
        """Load of every expert in the newest log interval, one JSON object."""
        return self.logs / "expert_load.json"

    @property
    def quarantine(self) -> Path:
        """Samples that killed a decoder, one JSON object a line."""
        return self.logs / "quarantine.jsonl"

    @property
    def heartbeats(self) -> Path:
        return self.logs / "heartbeat"

    @property
    def stacks(self) -> Path:
        """Last stack of each rank, written when it crashes or when the watchdog asks."""
        return self.logs / "stacks"

    def create(self) -> Run:
        """Make the directories; returns itself."""
        for folder in (self.checkpoints, self.heartbeats, self.stacks):
            folder.mkdir(parents=True, exist_ok=True)
        return self


def rank_file(folder: Path, rank: int, suffix: str) -> Path:
    """`folder/rank0003.json` for rank 3 and suffix "json"."""
    return folder / f"rank{rank:04d}.{suffix}"
