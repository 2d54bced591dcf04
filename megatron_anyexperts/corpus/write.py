"""Second reading: write one shard as its plan says, byte for byte the same wherever it is written."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_anyexperts.corpus.chunk_list import ChunkList
from megatron_anyexperts.corpus.corpus import Corpus
from megatron_anyexperts.corpus.facts import Facts
from megatron_anyexperts.corpus.files import write_json
from megatron_anyexperts.corpus.measure import TokenCounter, measures
from megatron_anyexperts.corpus.plan import ShardFile, ShardPlan
from megatron_anyexperts.corpus.sample import DOCUMENT_KIND, Rejected, Sample
from megatron_anyexperts.corpus.scan import describe, load_scan, scan_path
from megatron_anyexperts.corpus.transform import transform
from megatron_anyexperts.corpus.unforeseen import foreseen, guarded
from megatron_anyexperts.files import atomic_file
from megatron_anyexperts.media import MODALITIES


def manifest_path(shard: Path) -> Path:
    """The manifest beside a shard."""
    return shard.with_suffix(".manifest.json")


def document(sample: Sample, facts: list[Facts]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON of a sample and its media by member extension.

    A single medium is stored as KEY.png, several (and those of interleaved documents and chats) as KEY.0.png,
    KEY.1.jpg, ...; references in the JSON name these extensions.
    """
    if sample.kind in ("interleaved", "chat"):
        names = [f"{number}.{fact.extension}" for number, fact in enumerate(facts)]
    else:
        names = [fact.extension for fact in facts]
    fields: dict[str, Any] = {"kind": DOCUMENT_KIND.get(sample.kind, sample.kind), **sample.fields}
    if sample.kind == "interleaved":
        fields["segments"] = [_named(segment, names) for segment in fields["segments"]]
    elif sample.kind == "chat":
        fields["messages"] = [
            {**message, "content": [_named(part, names) for part in message["content"]]}
            for message in fields["messages"]
        ]
    elif facts:
        [fact] = facts
        known = {"width": fact.width, "height": fact.height, "seconds": fact.seconds, "frames": fact.frames}
        fields |= {name: value for name, value in known.items() if value and (name, fact.type) != ("frames", "image")}
    fields["media"] = names
    # Names of files need not be Unicode.
    fields["origin"] = sample.origin.encode("utf-8", "backslashreplace").decode()
    return fields, {name: media.data for name, media in zip(names, sample.media, strict=True)}


def _named(part: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return part if part["type"] == "text" else {**part, "media": names[part["media"]]}


class _HashingFile:
    """A file that knows the sha256 and the size of what was written to it."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def write_shard(corpus: Corpus, chunks: ChunkList, plan: ShardPlan, output: Path, version: str) -> dict:
    """Write a shard and its manifest; both appear only when complete.

    Args:
        corpus: sources, limits, transformations.
        chunks: all chunks.
        plan: what the shard holds.
        output: folder of the corpus; `output/tokenizer` exists.
        version: of the tool, for the manifest.

    Returns:
        The manifest. A shard of which nothing could be read again has a manifest but no file.
    """
    import webdataset

    counter = TokenCounter(corpus, output / "tokenizer")
    totals = {"tokens": Counter(), "measures": Counter(), "sources": Counter(), "languages": Counter()}
    rejected: list[dict] = []
    scratch, path = output / ".build" / "tmp", output / plan.name
    samples = 0
    with atomic_file(path, scratch) as file:
        hashing = _HashingFile(file)
        with webdataset.TarWriter(hashing, encoder=False, mtime=0, user="", group="") as tar:
            for key, chunk, item, facts in _planned_items(corpus, chunks, plan, output / ".build", rejected):
                try:
                    with foreseen():
                        item, facts = transform(item, facts, corpus.transform, corpus.limits)
                        tokens, measured = counter.count(item, facts), measures(item, facts)
                        check_tokens(tokens["text"], corpus.limits.max_tokens)
                        fields, media = document(item, facts)
                        fields = json.dumps(fields, ensure_ascii=False).encode()
                except Rejected as problem:
                    problem.origin = item.origin
                    rejected.append(describe(problem) | {"key": key})
                    continue
                tar.write({"__key__": key, "json": fields, **media})
                samples += 1
                totals["tokens"].update(tokens)
                totals["measures"].update(measured)
                totals["sources"][corpus.sources[chunk["source"]].label] += 1
                totals["languages"][item.fields.get("language", "")] += 1
    if samples == 0:
        path.unlink()
    manifest = {
        "shard": plan.name,
        "sha256": hashing.sha256.hexdigest() if samples else None,
        "bytes": hashing.size if samples else 0,
        "samples": samples,
        "planned": len(plan.samples),
        "plan": plan.digest,
        "version": version,
        "rejected": rejected,
        **{name: {key: round(value, 3) for key, value in sorted(total.items())} for name, total in totals.items()},
    }
    manifest["tokens"] = {modality: manifest["tokens"].get(modality, 0) for modality in MODALITIES}
    write_json(manifest_path(path), scratch, manifest)
    return manifest


def check_tokens(tokens: int, limit: int | None) -> None:
    """Hold the text tokens of a sample against the limit.

    Raises:
        Rejected: there are more.
    """
    if limit is not None and tokens > limit:
        raise Rejected("too many tokens", f"{tokens}, max_tokens {limit}")


def _planned_items(corpus: Corpus, chunks: ChunkList, plan: ShardPlan, work: Path, rejected: list[dict]):
    """Read the planned samples again, in order; what is not what it was goes to `rejected`."""
    keys = plan.sample_keys()
    for run in np.split(np.arange(len(keys)), np.flatnonzero(np.diff(plan.chunks)) + 1):
        number = int(plan.chunks[run[0]])
        chunk = chunks[number]
        source = corpus.sources[chunk["source"]]
        scan = load_scan(scan_path(work, number))
        facts = dict(zip(scan.accepted["position"].tolist(), scan.facts, strict=True))
        missing = dict(zip(plan.samples["position"][run].tolist(), run.tolist(), strict=True))
        wanted = frozenset(missing)
        items = source.read(chunk, wanted, corpus.limits.max_media_bytes)
        for position, item in guarded(items, source.label):
            if position not in missing:
                continue  # damage behind the planned items, which was counted by the scan
            key = keys[missing.pop(position)]
            if isinstance(item, Sample) and not key.startswith(item.content_hash().hex()):
                item = Rejected("changed since it was scanned", origin=item.origin)
            if isinstance(item, Rejected):
                rejected.append(describe(item) | {"key": key})
            else:
                yield key, chunk, item, facts[position]
        for position, index in missing.items():
            gone = Rejected("gone since it was scanned", origin=source.origin(chunk, position))
            rejected.append(describe(gone) | {"key": keys[index]})


def is_written(shard: ShardFile, output: Path) -> bool:
    """Whether the shard of this very plan is on disk."""
    path = output / shard.name
    try:
        manifest = json.loads(manifest_path(path).read_bytes())
    except (OSError, ValueError):
        return False
    if manifest["plan"] != shard.digest:
        return False
    return manifest["samples"] == 0 or (path.is_file() and path.stat().st_size == manifest["bytes"])
