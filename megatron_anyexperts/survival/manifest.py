"""The list of files, sizes and hashes that makes a checkpoint directory verifiable.

A checkpoint is *sealed* once its manifest lies in it. The manifest is written last, after every file was flushed to
the disk, so a sealed checkpoint was complete at that moment; `verify` says whether it still is. A marker lies in the
directory from the beginning of a save to its seal: with it the save did not finish, without both a manifest was lost.
With a key (see `signing`) manifests are signed, and none is believed without its signature.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_anyexperts.files import sync_folder, write_text

from .signing import is_signed, signature, signing_key

MANIFEST = "manifest.json"
UNFINISHED = "save_not_finished"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for weights without a training state; a run that loads them starts at iteration 0."""
RELEASE_ITERATION = -1
"""What a manifest says of such weights instead of an iteration."""
_DIRECTORY = re.compile(r"iter_(\d{7,})")
_VERSION = 2
_HASH_THREADS = 8


def iteration_directory(save_dir: Path, iteration: int) -> Path:
    """Directory in which Megatron keeps the checkpoint of `iteration`."""
    return save_dir / f"iter_{iteration:07d}"


def tracked_checkpoint(save_dir: Path) -> Path:
    """Directory of the checkpoint that Megatron's tracker names.

    Raises:
        OSError: there is no tracker.
        ValueError: it names none.
    """
    newest = (save_dir / TRACKER).read_text(encoding="utf-8").strip()
    return save_dir / RELEASE if newest == RELEASE else iteration_directory(save_dir, int(newest))


def saved_iterations(save_dir: Path) -> list[int]:
    """Iterations with a checkpoint directory, sealed or not, ascending."""
    if not save_dir.is_dir():
        return []
    matches = (_DIRECTORY.fullmatch(entry.name) for entry in save_dir.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def is_sealed(checkpoint_dir: Path) -> bool:
    """Whether the checkpoint was complete once; does not read its files."""
    return (checkpoint_dir / MANIFEST).is_file()


def sealed_iterations(save_dir: Path) -> list[int]:
    """Iterations whose checkpoint is sealed, ascending; does not verify them."""
    return [
        iteration for iteration in saved_iterations(save_dir) if is_sealed(iteration_directory(save_dir, iteration))
    ]


def is_unfinished(checkpoint_dir: Path) -> bool:
    """Whether a save into this directory began and did not get to its seal."""
    return (checkpoint_dir / UNFINISHED).exists() and not is_sealed(checkpoint_dir)


def begin_save(checkpoint_dir: Path) -> None:
    """Make the directory of a checkpoint and mark it as unfinished until `seal`."""
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    (checkpoint_dir / UNFINISHED).touch()


def payload_files(checkpoint_dir: Path) -> list[str]:
    """Relative names of all files of a checkpoint except its manifest and marker, sorted."""
    return sorted(
        str(path.relative_to(checkpoint_dir))
        for path in checkpoint_dir.rglob("*")
        if path.is_file() and not path.name.startswith(MANIFEST) and path.name != UNFINISHED
    )


def share_files(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Deal files out to ranks so that each reads about as many bytes: the largest first, to the rank with the least.

    Returns:
        the names of each rank's files; every rank computes the same.
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(name)
        heapq.heappush(loads, (load + sizes[name], rank))
    return shares


def file_sizes(checkpoint_dir: Path) -> dict[str, int]:
    """Size in bytes of each of a checkpoint's `payload_files`."""
    return {name: (checkpoint_dir / name).stat().st_size for name in payload_files(checkpoint_dir)}


def digest(checkpoint_dir: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Flush and hash some files of a checkpoint.

    Ranks may share the work: each digests its part of `share_files`, and the merged result goes to `seal` or to
    `changed_files`.

    Returns:
        name -> {"bytes": int, "sha256": hex digest}.
    """
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest_file(checkpoint_dir / name), names), strict=True))


def seal(checkpoint_dir: Path, digests: dict[str, dict[str, Any]] | None = None) -> Path:
    """Declare a finished checkpoint complete: flush its files, then write its manifest.

    Args:
        checkpoint_dir: an `iter_NNNNNNN` or `release` directory to which nobody writes any more.
        digests: what `digest` returned for all files, when several ranks hashed them; hashed here otherwise.

    Raises:
        FileNotFoundError: the directory is missing or holds no files.
        ValueError: the directory has another name, or `digests` are of other files.
        UnusableKey: there should be a key to sign with, and is none.
        OSError: the disk refused; the checkpoint then stays unsealed and is never resumed from.
    """
    names = payload_files(checkpoint_dir) if checkpoint_dir.is_dir() else []
    if not names:
        raise FileNotFoundError(f"no checkpoint files in {checkpoint_dir}; save before sealing")
    iteration = _iteration_of(checkpoint_dir)
    if iteration is None:
        raise ValueError(f"{checkpoint_dir} is not called iter_NNNNNNN or {RELEASE}, so its iteration is not known")
    key = signing_key()
    files = digest(checkpoint_dir, names) if digests is None else digests
    if sorted(files) != names:
        odd = sorted(set(files) ^ set(names))
        raise ValueError(f"digests do not match the files of {checkpoint_dir}: {', '.join(odd[:5])}")
    for folder in {path.parent for path in map(checkpoint_dir.joinpath, names)}:
        sync_folder(folder)
    content = {"version": _VERSION, "iteration": iteration, "files": files}
    if key is not None:
        content["signature"] = signature(content, key)
    write_text(checkpoint_dir / MANIFEST, json.dumps(content, indent=1, sort_keys=True) + "\n")
    (checkpoint_dir / UNFINISHED).unlink(missing_ok=True)
    return checkpoint_dir / MANIFEST


_UNSIGNED = (
    "its manifest is {}, and a key is set; if you vouch for its files, sign it by "
    "`python -m megatron_anyexperts.survival seal`"
)


class Unsound(ValueError):
    """A checkpoint cannot be vouched for; the message is one sentence."""


def sound_list(checkpoint_dir: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file, after comparing iteration, names and sizes; reads no file's content.

    Raises:
        Unsound: the checkpoint may not be loaded.
        UnusableKey: there should be a key to check the signature with, and is none.
    """
    key = signing_key()
    if not checkpoint_dir.is_dir():
        raise Unsound(f"{checkpoint_dir.name} does not exist")
    try:
        content = json.loads((checkpoint_dir / MANIFEST).read_text(encoding="utf-8"))
        files = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in content["files"].items()
        }
        iteration = None if content["version"] == 1 else int(content["iteration"])
        signed = content.pop("signature", None)
    except FileNotFoundError as error:
        why = "the save did not finish" if is_unfinished(checkpoint_dir) else f"its {MANIFEST} is lost"
        raise Unsound(f"it is not sealed: {why}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsound(f"its manifest is unreadable: {error!r}") from error
    if key is not None:
        if not is_signed(content, signed, key):
            raise Unsound(_UNSIGNED.format("signed with another key, or changed since" if signed else "not signed"))
        if spare := sorted(set(payload_files(checkpoint_dir)) - files.keys()):
            raise Unsound(f"{spare[0]} is not in its signed manifest")
    if iteration not in (None, _iteration_of(checkpoint_dir)):
        raise Unsound(f"its manifest is of iteration {iteration}: the directory was renamed or swapped")
    if not files:
        raise Unsound("its manifest lists no files")
    for name, entry in files.items():
        path = checkpoint_dir / name
        if not path.is_file():
            raise Unsound(f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise Unsound(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
    return files


def changed_files(expected: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each file whose content is not the expected one; both as `digest` returns them."""
    return [
        f"{name} has other content than when it was saved"
        for name in expected
        if found[name]["sha256"] != expected[name]["sha256"]
    ]


def verify(checkpoint_dir: Path, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one sentence each; an empty list means that it may be loaded.

    Args:
        checkpoint_dir: an `iter_NNNNNNN` directory.
        hashes: read every byte; False compares iteration, names and sizes only.
    """
    try:
        expected = sound_list(checkpoint_dir)
    except Unsound as problem:
        return [str(problem)]
    return changed_files(expected, digest(checkpoint_dir, list(expected))) if hashes else []


def _iteration_of(checkpoint_dir: Path) -> int | None:
    if checkpoint_dir.name == RELEASE:
        return RELEASE_ITERATION
    match = _DIRECTORY.fullmatch(checkpoint_dir.name)
    return int(match[1]) if match else None


def _digest_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}
