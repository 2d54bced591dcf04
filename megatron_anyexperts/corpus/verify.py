"""Check a finished corpus: files, hashes, tars, keys, JSON, media headers, indexes."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus.corpus import Limits
from megatron_anyexperts.corpus.probe import probe
from megatron_anyexperts.corpus.sample import DOCUMENT_KIND, Media, Rejected
from megatron_anyexperts.corpus.write import manifest_path
from megatron_anyexperts.media import MODALITIES

ANY_SIZE = Limits(
    max_media_bytes=2**62, max_pixels=2**62, min_side=1, max_aspect=2**31, min_seconds=0,
    max_audio_seconds=2**62, max_video_seconds=2**62,
)  # fmt: skip
"""Limits were the builder's business; here only readability counts."""


@dataclass(frozen=True)
class Finding:
    """What is known about one shard after checking it."""

    shard: str
    problems: list[str]
    keys: list[str]


def check_shard(output: Path, entry: dict) -> Finding:
    """Read a shard completely and compare it with its entry in the corpus manifest.

    Args:
        output: folder of the corpus.
        entry: shard, sha256, samples and bytes.
    """
    path, keys = output / entry["shard"], []
    problems = list(_manifest_problems(path, entry))
    if entry["samples"] == 0:
        return Finding(entry["shard"], problems, keys)
    try:
        data_hash, size = _sha256(path)
    except OSError as error:
        return Finding(entry["shard"], [*problems, f"cannot be read: {error}"], keys)
    if size != entry["bytes"]:
        problems.append(f"has {size} bytes instead of {entry['bytes']}")
    if data_hash != entry["sha256"]:
        problems.append("has another sha256 than the manifest")
    offsets: list[int] = []
    try:
        for offset, key, members in _samples(path):
            offsets.append(offset)
            keys.append(key)
            problems.extend(f"sample {key}: {problem}" for problem in _sample_problems(entry["shard"], members))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        problems.append(f"is no complete tar: {type(error).__name__}: {error}")
    if len(keys) != entry["samples"]:
        problems.append(f"has {len(keys)} samples instead of {entry['samples']}")
    problems.extend(_index_problems(path, offsets))
    return Finding(entry["shard"], problems, keys)


def _manifest_problems(path: Path, entry: dict) -> Iterator[str]:
    try:
        manifest = json.loads(manifest_path(path).read_bytes())
        different = [name for name, value in entry.items() if manifest[name] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"has no usable manifest: {type(error).__name__}: {error}"
        return
    if different:
        yield f"manifest differs from the corpus manifest in {', '.join(different)}"


def _sha256(path: Path) -> tuple[str, int]:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def _samples(path: Path) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Offset, key and members of each sample; also the end mark is checked."""
    key, offset, members = None, 0, {}
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            stem, _, extension = member.name.partition(".")
            if stem != key:
                if key is not None:
                    yield offset, key, members
                key, offset, members = stem, member.offset, {}
            members[extension] = tar.extractfile(member).read()
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    if key is not None:
        yield offset, key, members


def _sample_problems(shard: str, members: dict[str, bytes]) -> Iterator[str]:
    kind = shard.split("/")[0]
    try:
        meta = json.loads(members["json"])
        if meta["kind"] != DOCUMENT_KIND.get(kind, kind):
            yield f"is of kind {meta['kind']}"
        names = meta["media"]
        if sorted(members) != sorted([*names, "json"]):
            yield f"has members {sorted(members)} instead of {sorted([*names, 'json'])}"
            return
        types = _media_types(kind, meta)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        yield f"has no usable JSON: {type(error).__name__}: {error}"
        return
    for name in names:
        try:
            probe(Media(types[name], members[name]), ANY_SIZE)
        except (Rejected, KeyError) as error:
            yield f"{name}: {error}"


def _media_types(kind: str, meta: dict) -> dict[str, str]:
    """Type of each medium, as the sample declares it: the suffix does not tell sound in an MP4 from a video."""
    if kind in MODALITIES:
        return dict.fromkeys(meta["media"], kind)
    turns = [meta["segments"]] if kind == "interleaved" else [turn["content"] for turn in meta["messages"]]
    return {part["media"]: part["type"] for parts in turns for part in parts if part["type"] != "text"}


def _index_problems(path: Path, offsets: list[int]) -> Iterator[str]:
    index = path.with_name(path.name + ".idx")
    try:
        found = np.frombuffer(index.read_bytes(), dtype="<u8")
    except (OSError, ValueError) as error:
        yield f"index cannot be read: {error}"
        return
    # One entry per sample and the end of the last one.
    if found[:-1].tolist() != offsets:
        yield f"index does not point at its {len(offsets)} samples"


def corpus_problems(output: Path, manifest: dict, findings: list[Finding]) -> list[str]:
    """Problems beyond single shards: keys that occur twice, foreign tars, Energon's counts, the tokenizer."""
    problems = []
    seen: dict[tuple[str, str], str] = {}
    for finding in findings:
        kind = finding.shard.split("/")[0]
        for key in finding.keys:
            if (kind, key) in seen:
                problems.append(f"key {key} is in {seen[kind, key]} and in {finding.shard}")
            seen[kind, key] = finding.shard
    listed = {entry["shard"] for entry in manifest["shards"] if entry["samples"]}
    for path in sorted(output.glob("*/*/*.tar")):
        if str(path.relative_to(output)) not in listed:
            problems.append(f"{path.relative_to(output)} is not in the manifest")
    for kind in manifest["kinds"]:
        expected = {
            entry["shard"].partition("/")[2]: entry["samples"]
            for entry in manifest["shards"]
            if entry["samples"] and entry["shard"].startswith(f"{kind}/")
        }
        try:
            found = json.loads((output / kind / ".nv-meta" / ".info.json").read_bytes())["shard_counts"]
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"Energon metadata of {kind} cannot be read: {error}")
            continue
        if found != expected:
            problems.append(f"Energon metadata of {kind} lists other shards or counts than the manifest")
    tokenizer = output / "tokenizer" / "tokenizer.json"
    actual = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None
    if actual != manifest["tokenizer_sha256"]:
        problems.append("tokenizer/tokenizer.json is missing or another one than the shards were counted with")
    return problems


def read_manifest(output: Path) -> dict:
    """The manifest of a finished corpus.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        with open(output / "manifest.json", "rb") as file:
            manifest = json.load(file)
        if not {"shards", "kinds", "tokens", "tokenizer_sha256"} <= manifest.keys():
            raise ValueError("entries are missing")
        return manifest
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{output} holds no finished corpus: {error}; build it with build_shards.py") from None
