"""The list of files, sizes and hashes that makes a checkpoint directory verifiable.

A checkpoint is *sealed* once its manifest lies in it. The manifest is written last, after every file was flushed to
the disk, so a sealed checkpoint was complete at that moment; `verify` says whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
_DIRECTORY = re.compile(r"iter_(\d{7,})")
_HASH_THREADS = 8


def iteration_directory(save_dir: Path, iteration: int) -> Path:
    """Directory in which Megatron keeps the checkpoint of `iteration`."""
    return save_dir / f"iter_{iteration:07d}"


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


def payload_files(checkpoint_dir: Path) -> list[str]:
    """Relative names of all files of a checkpoint except its manifest, sorted."""
    return sorted(
        str(path.relative_to(checkpoint_dir))
        for path in checkpoint_dir.rglob("*")
        if path.is_file() and not path.name.startswith(MANIFEST)
    )


def digest(checkpoint_dir: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Flush and hash some files of a checkpoint.

    Ranks may share the work: each digests `payload_files(dir)[rank::world_size]`, and the merged result goes to
    `seal`.

    Returns:
        name -> {"bytes": int, "sha256": hex digest}.
    """
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest_file(checkpoint_dir / name), names), strict=True))


def seal(checkpoint_dir: Path, digests: dict[str, dict[str, Any]] | None = None) -> Path:
    """Declare a finished checkpoint complete: flush its files, then write its manifest.

    Args:
        checkpoint_dir: an `iter_NNNNNNN` directory to which nobody writes any more.
        digests: what `digest` returned for all files, when several ranks hashed them; hashed here otherwise.

    Raises:
        FileNotFoundError: the directory is missing or holds no files.
        OSError: the disk refused; the checkpoint then stays unsealed and is never resumed from.
    """
    names = payload_files(checkpoint_dir) if checkpoint_dir.is_dir() else []
    if not names:
        raise FileNotFoundError(f"no checkpoint files in {checkpoint_dir}; save before sealing")
    files = digest(checkpoint_dir, names) if digests is None else digests
    if sorted(files) != names:
        odd = sorted(set(files) ^ set(names))
        raise ValueError(f"digests do not match the files of {checkpoint_dir}: {', '.join(odd[:5])}")
    for folder in {path.parent for path in map(checkpoint_dir.joinpath, names)}:
        _flush_directory(folder)
    text = json.dumps({"version": 1, "files": files}, indent=1, sort_keys=True)
    write_durably(checkpoint_dir / MANIFEST, text + "\n")
    return checkpoint_dir / MANIFEST


def verify(checkpoint_dir: Path, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one sentence each; an empty list means that it may be loaded.

    Args:
        checkpoint_dir: an `iter_NNNNNNN` directory.
        hashes: read every byte; False compares names and sizes only.
    """
    if not checkpoint_dir.is_dir():
        return [f"{checkpoint_dir.name} does not exist"]
    try:
        expected = json.loads((checkpoint_dir / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: int(entry["bytes"]) for name, entry in expected.items()}
        wanted = {name: str(entry["sha256"]) for name, entry in expected.items()}
    except FileNotFoundError:
        return ["it was never sealed: the save did not finish"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"its manifest is unreadable: {error!r}"]
    problems, present = [], []
    for name, size in sizes.items():
        path = checkpoint_dir / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {size}")
        else:
            present.append(name)
    if hashes and not problems:
        found = digest(checkpoint_dir, present)
        problems = [
            f"{name} has other content than when it was saved"
            for name in present
            if found[name]["sha256"] != wanted[name]
        ]
    return problems


def payload_bytes(checkpoint_dir: Path) -> int:
    """Size of a checkpoint in bytes, without its manifest."""
    return sum((checkpoint_dir / name).stat().st_size for name in payload_files(checkpoint_dir))


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves either the old or the new content."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_directory(path.parent)


def _digest_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
