"""Statistics of a finished corpus: how long, how large, how many."""

import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.sample import TEXT_FIELD
from megatron_anyexperts.corpus.summary import table

QUANTILES = (0, 5, 25, 50, 75, 95, 100)

Measured = dict[str, dict[str, np.ndarray]]
"""Kind -> measure -> one value per sample that was read."""


def measure_samples(output: Path, manifest: dict, most: int) -> Measured:
    """Read samples evenly spread over the shards and measure them.

    Args:
        output: folder of the corpus.
        manifest: of the corpus.
        most: samples of each kind to read at most.
    """
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for kind in manifest["kinds"]:
        shards = [entry for entry in manifest["shards"] if entry["shard"].startswith(f"{kind}/") and entry["samples"]]
        share = -(-most // len(shards))
        for entry in shards:
            for meta, size in _documents(output / entry["shard"], share):
                for name, value in _measure(kind, meta, size).items():
                    values[kind][name].append(value)
    return {kind: {name: np.array(v) for name, v in measures.items()} for kind, measures in values.items()}


def _documents(path: Path, most: int):
    """JSON and size of the first `most` samples; media are passed over unread."""
    key, meta, size, count = None, None, 0, 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            stem, _, extension = member.name.partition(".")
            if stem != key:
                if meta is not None:
                    yield meta, size
                    count += 1
                    if count == most:
                        return
                key, meta, size = stem, None, 0
            size += member.size
            if extension == "json":
                meta = json.loads(tar.extractfile(member).read())
    if meta is not None:
        yield meta, size


def _measure(kind: str, meta: dict, size: int) -> dict[str, float]:
    if kind in TEXT_FIELD:
        texts = [meta[TEXT_FIELD[kind]]]
    else:
        turns = [meta["segments"]] if kind == "interleaved" else [turn["content"] for turn in meta["messages"]]
        texts = [part["text"] for parts in turns for part in parts if part["type"] == "text"]
    measures = {"bytes": size, "characters": sum(map(len, texts)), "media": len(meta["media"])}
    if kind == "chat":
        measures["turns"] = len(meta["messages"])
    for name in ("width", "height", "seconds", "frames"):
        if name in meta:
            measures[name] = meta[name]
    return measures


def quantiles(measured: Measured) -> dict[str, dict[str, list[float]]]:
    """Kind -> measure -> its values at `QUANTILES`, without measures that are 0 throughout."""
    return {
        kind: {name: np.percentile(values, QUANTILES).tolist() for name, values in measures.items() if values.any()}
        for kind, measures in measured.items()
    }


def quantile_table(measured: Measured) -> str:
    """Quantiles of every measure of every kind."""
    rows = [
        [f"{kind} {name}", len(measured[kind][name]), *(f"{value:,.4g}" for value in values)]
        for kind, measures in quantiles(measured).items()
        for name, values in measures.items()
    ]
    return table(rows, ["measure", "samples", *(f"{quantile} %" for quantile in QUANTILES)])


def share_table(counts: dict[str, int], title: str, unit: str) -> str:
    """Counts and their shares, largest first."""
    total = max(1, sum(counts.values()))
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return table(
        [[name or "(unknown)", count, f"{count / total:.1%}"] for name, count in ordered], [title, unit, "share"]
    )
