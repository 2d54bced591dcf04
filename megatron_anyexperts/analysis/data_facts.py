"""What a run was fed: its blend, tokens by modality, samples by kind, and what was left out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_anyexperts import described
from megatron_anyexperts.analysis.run_record import RunRecord, number, series
from megatron_anyexperts.media import MODALITIES
from megatron_anyexperts.survival import runlog

_MOST_LOG_BYTES = 200_000_000
"""Of the sample logs that a report counts; those of a long run would take minutes."""


@dataclass(frozen=True)
class Source:
    """One entry of the blend's ``train`` split."""

    path: str
    kind: str
    share: float | None
    """Of the weights; None where the blend repeats its sources instead."""


@dataclass(frozen=True)
class DataFacts:
    """What a run was fed.

    Attributes:
        blend: where it lies.
        sources: its entries; empty if it cannot be read here.
        contents: of the corpus in the blend's folder: source to samples.
        tokens: trained by modality.
        samples: documents or their pieces, trained by kind.
        rows: packed rows trained.
        read, lost: samples that the loaders read, ahead of the steps, and could not use.
        quarantined: those that killed a decoder: key, stage, reason.
        notes: why something is missing.
    """

    blend: str | None
    sources: list[Source]
    contents: dict[str, int]
    tokens: dict[str, int]
    samples: dict[str, int]
    rows: int | None
    read: int
    lost: int
    quarantined: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def data_facts(record: RunRecord) -> DataFacts:
    """Gather what the run and the folder of its blend say."""
    notes: list[str] = []
    given = record.config.get("data-path")
    blend = str(given[0] if isinstance(given, list) and given else given) if given else None
    rows = number(record.last, "consumed_samples")
    return DataFacts(
        blend,
        _sources(blend, notes),
        _contents(blend),
        _tokens(record),
        _samples(record, notes),
        None if rows is None else int(rows),
        int(sum(series(record.metrics, "samples_read")[1])),
        int(sum(series(record.metrics, "samples_lost")[1])),
        list(runlog.read(record.run.quarantine)),
        notes,
    )


def _sources(blend: str | None, notes: list[str]) -> list[Source]:
    if blend is None:
        return []
    try:
        entries = described.load(Path(blend).read_text(encoding="utf-8"))["splits"]["train"]
        [(how, entries)] = entries.items()
        weights = [float(entry.get("weight", 1)) for entry in entries]
        kinds = [str((entry.get("subflavors") or {}).get("kind", "")) for entry in entries]
        paths = [str(entry["path"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        notes.append(f"the blend {blend} cannot be read here ({type(error).__name__}), so its sources are not listed")
        return []
    total = sum(weights) or 1.0
    shares = [weight / total if how == "blend" else None for weight in weights]
    return [Source(*each) for each in zip(paths, kinds, shares, strict=True)]


def _contents(blend: str | None) -> dict[str, int]:
    try:
        manifest = json.loads((Path(blend or "").parent / "manifest.json").read_text(encoding="utf-8"))
        return {str(name or "(unknown)"): int(count) for name, count in manifest["sources"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a blend of several corpora has none beside it


def _tokens(record: RunRecord) -> dict[str, int]:
    """Every mixture layer counts each token once."""
    layers = len(record.routing.get("layers") or {})
    totals = {name: sum(series(record.metrics, "routing", name, "tokens")[1]) for name in MODALITIES if layers}
    return {name: round(total / layers) for name, total in totals.items() if total}


def _samples(record: RunRecord, notes: list[str]) -> dict[str, int]:
    files = sorted(record.run.samples.glob("rank*.jsonl"))
    if not files:
        notes.append("samples are not counted by kind: the run was trained without --log-sample-keys")
        return {}
    size = sum(file.stat().st_size for file in files)
    if size > _MOST_LOG_BYTES:
        notes.append(f"samples are not counted by kind: {record.run.samples} holds {size / 1e6:,.0f} MB")
        return {}
    kinds: Counter[str] = Counter()
    for file in files:
        for line in runlog.read(file):
            kinds.update(str(key).partition("/")[0] for key in line.get("keys") or ())
    return dict(kinds.most_common())
