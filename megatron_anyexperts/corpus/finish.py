"""What turns shards into a data set: Energon metadata, blend, manifest, list of rejected samples."""

import contextlib
import hashlib
import io
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import yaml

from megatron_anyexperts.corpus.chunk_list import ChunkList
from megatron_anyexperts.corpus.corpus import Corpus
from megatron_anyexperts.corpus.files import write_json
from megatron_anyexperts.corpus.plan import SPLITS, Plan, split_warnings
from megatron_anyexperts.corpus.sample import DOCUMENT_KIND, TEXT_FIELD
from megatron_anyexperts.corpus.scan import load_outcome, scan_path
from megatron_anyexperts.corpus.write import manifest_path
from megatron_anyexperts.files import atomic_file

CRUDE_CONFIG = "crude.yaml"
"""Energon dataset description for training, which hands over samples as they are stored."""


def dataset_configs(kind: str) -> dict[str, dict]:
    """Energon dataset descriptions of a kind by file name.

    Training reads the crude one. The default one lets `energon lint` and `energon preview` work, which cannot
    read crude data.
    """
    text = f"json[{TEXT_FIELD[kind]}]" if kind in TEXT_FIELD else "json"
    sample_type = {"__module__": "megatron.energon", "__class__": "TextSample"}
    return {
        "dataset.yaml": {"sample_type": sample_type, "field_map": {"text": text}},
        CRUDE_CONFIG: {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"},
    }


def finish(corpus: Corpus, document: dict, chunks: ChunkList, plan: Plan, output: Path, version: str) -> dict:
    """Write everything beside the shards; repeatable.

    Args:
        corpus: the corpus that was built.
        document: its description for the manifest.
        chunks: its units of work.
        plan: what was to be written; all of it is written.
        output: folder of the corpus.
        version: of the tool.

    Returns:
        The manifest.

    Raises:
        RuntimeError: the counts do not add up, or Energon indexed another number of samples than were written.
    """
    scratch = output / ".build" / "tmp"

    def shards() -> Iterator[dict]:
        return (json.loads(manifest_path(output / shard.name).read_bytes()) for shard in plan.shards)

    items, rejected = _write_rejected(corpus, chunks, plan, shards(), output)
    manifest = _manifest(corpus, document, plan, shards(), output, version)
    manifest |= {"items": items, "rejected": dict(sorted(rejected.items()))}
    if manifest["items"] != manifest["samples"] + sum(rejected.values()):
        raise RuntimeError(
            f"{manifest['items']} items were read but {manifest['samples']} written and {sum(rejected.values())} "
            "rejected; delete the output folder and build again"
        )
    for kind in manifest["kinds"]:
        prepare_energon(output / kind, [shard for shard in manifest["shards"] if shard["shard"].startswith(f"{kind}/")])
    with atomic_file(output / "blend.yaml", scratch) as file:
        file.write(yaml.safe_dump(blend(manifest), sort_keys=False).encode())
    write_json(output / "manifest.json", scratch, manifest)
    return manifest


def _write_rejected(
    corpus: Corpus, chunks: ChunkList, plan: Plan, shards: Iterable[dict], output: Path
) -> tuple[int, Counter]:
    """List what was left out; returns the number of items that were read, and of rejections by reason."""
    items, reasons = 0, Counter()
    with atomic_file(output / "rejected.jsonl", output / ".build" / "tmp") as file:

        def put(line: dict) -> None:
            reasons[line["reason"]] += 1
            file.write(json.dumps(line).encode() + b"\n")

        for number in range(len(chunks)):
            accepted, rejected = load_outcome(scan_path(output / ".build", number))
            items += accepted + len(rejected)
            for line in rejected:
                put(line)
        for number, duplicates in groupby(plan.duplicates(), key=itemgetter(0)):
            chunk = chunks[number]
            source = corpus.sources[chunk["source"]]
            for _, position, reason in duplicates:
                put({"origin": source.origin(chunk, position), "reason": reason, "detail": ""})
        for shard in shards:
            for line in shard["rejected"]:
                put(line)
    return items, reasons


def _manifest(corpus: Corpus, document: dict, plan: Plan, shards: Iterable[dict], output: Path, version: str) -> dict:
    entries = []
    kinds: dict[str, dict] = {}
    totals = {name: Counter() for name in ("tokens", "measures", "sources", "languages")}
    for shard in shards:
        entries.append({name: shard[name] for name in ("shard", "sha256", "samples", "bytes")})
        if not shard["samples"]:
            continue
        kind, split, _ = shard["shard"].split("/")
        entry = kinds.setdefault(kind, {}).setdefault(
            split, {"shards": 0, "samples": 0, "bytes": 0, "tokens": Counter(), "measures": Counter()}
        )
        entry["shards"] += 1
        entry["samples"] += shard["samples"]
        entry["bytes"] += shard["bytes"]
        entry["tokens"].update(shard["tokens"])
        entry["measures"].update(shard["measures"])
        for name, total in totals.items():
            total.update(shard[name])
    return {
        "name": corpus.name,
        "version": version,
        "corpus": document,
        "samples": sum(entry["samples"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "kinds": kinds,
        **{name: dict(sorted(total.items())) for name, total in totals.items()},
        "tokenizer_sha256": hashlib.sha256((output / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
        "warnings": split_warnings(plan, corpus.validation_fraction),
        "shards": entries,
    }


def prepare_energon(folder: Path, shards: list[dict]) -> None:
    """Write Energon's index and metadata of one kind, unless they are there.

    Args:
        folder: of the kind.
        shards: manifests of its shards.

    Raises:
        RuntimeError: Energon found other numbers of samples than the manifests say.
    """
    from megatron.energon.flavors.webdataset.base_webdataset import BaseWebdatasetFactory

    counts = {shard["shard"].partition("/")[2]: shard["samples"] for shard in shards if shard["samples"]}
    identity = str(uuid.uuid5(uuid.NAMESPACE_URL, "".join(str(shard["sha256"]) for shard in shards)))
    metadata = folder / ".nv-meta"
    indexes = [folder / f"{name}.idx" for name in counts]
    with contextlib.suppress(OSError):
        if (metadata / "index.uuid").read_text() == identity and all(index.is_file() for index in indexes):
            return
    # Energon's tools ask for a split named test as well; it is empty.
    patterns = [(split, f"{split}/.*") for split in (*SPLITS, "test")]
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(folder, list(counts), split_parts_patterns=patterns, workers=2)
    found = json.loads((metadata / ".info.json").read_bytes())["shard_counts"]
    if wrong := {name: (count, found.get(name)) for name, count in counts.items() if found.get(name) != count}:
        raise RuntimeError(f"Energon's index of {folder} differs from the manifests (written, indexed): {wrong}")
    for name, config in dataset_configs(folder.name).items():
        (metadata / name).write_text(yaml.safe_dump(config, sort_keys=False))
    # Energon draws a random identity; the same shards shall have the same one. It is written last: it says "complete".
    (metadata / "index.uuid").write_text(identity)


def blend(manifest: dict) -> dict:
    """Energon blend of a corpus: every kind of sample, weighted by its number of samples."""
    splits = {}
    for split in SPLITS:
        entries = [
            {
                "path": f"./{kind}",
                "dataset_config": CRUDE_CONFIG,
                "weight": entry[split]["samples"],
                "subflavors": {"kind": DOCUMENT_KIND.get(kind, kind), "corpus": manifest["name"]},
            }
            for kind, entry in manifest["kinds"].items()
            if split in entry
        ]
        if entries:
            splits[split] = {"blend": entries}
    return {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
