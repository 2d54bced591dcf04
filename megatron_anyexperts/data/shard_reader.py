"""Reads samples out of indexed tars with one read each, with retries, and with damage named instead of raised.

Energon's own reader seeks and parses each member through `tarfile` and lets damage end the run, past every error
handler. This one reads a sample at once and hands damage on as data, so that the cooker can report it like any other
bad sample. Storage, its cache and its credentials remain Energon's business.
"""

import io
import struct
import tarfile
import time
from bisect import bisect_right
from collections import OrderedDict

import numpy as np
from megatron.energon import SavableDataset
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.source_info import SourceInfo

DAMAGE = "__damage__"  # the key under which an unreadable sample carries its reason
_BLOCK = 512
_DAMAGE_ERRORS = (tarfile.TarError, ValueError, IndexError, EOFError, struct.error)


def parse_members(block: bytes) -> list[tuple[str, bytes]]:
    """Regular files in a slice of a tar: (name, content), in order.

    Plain ustar headers are read here; anything else (long names, pax records) goes to `tarfile`.

    Raises:
        ValueError, tarfile.TarError: the slice is not a valid run of tar members.
    """
    members, offset = [], 0
    while offset + _BLOCK <= len(block):
        header = block[offset : offset + _BLOCK]
        if not any(header):
            break  # end-of-archive padding
        if header[156:157] not in (b"0", b"\0"):
            return _parse_with_tarfile(block)
        # The checksum counts its own field as blanks.
        if sum(header[:148]) + sum(header[156:]) + 256 != int(header[148:156].rstrip(b" \0") or b"-1", 8):
            raise ValueError(f"tar header at byte {offset} of the sample fails its checksum")
        size = int(header[124:136].rstrip(b" \0") or b"0", 8)
        start = offset + _BLOCK
        if start + size > len(block):
            raise ValueError(f"tar member at byte {offset} of the sample runs past its end")
        name = header[:100].split(b"\0", 1)[0].decode()
        if header[257:262] == b"ustar" and header[345:346] != b"\0":
            name = f"{header[345:500].split(b'\0', 1)[0].decode()}/{name}"
        members.append((name, block[start : start + size]))
        offset = start + -(-size // _BLOCK) * _BLOCK
    return members


def _parse_with_tarfile(block: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]


class _Shard:
    """An open tar and its index of sample offsets."""

    def __init__(self, path: EPath) -> None:
        with path.with_suffix(".tar.idx").open("rb") as index:
            self._offsets = np.frombuffer(index.read(), "<u8")
        # For local files the multi-storage client would only add its bookkeeping to every read.
        self._file = io.FileIO(path.local_path()) if path.is_local() else path.open("rb")

    def read(self, index: int) -> bytes:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        self._file.seek(start)
        block = self._file.read(end - start)
        if len(block) != end - start:
            raise ValueError(f"the tar ends at byte {start + len(block)}, its index expects {end}")
        return block

    def close(self) -> None:
        self._file.close()


class ShardReader:
    """A drop-in for Energon's indexed reader of one dataset.

    Args:
        inner: Energon's reader; names the shards and says how many samples each holds.
        retries: repetitions of a read that failed with an operating-system or network error.
        backoff: seconds before the first repetition, doubled before each further one.
    """

    def __init__(self, inner: ShardInfosITarReader, retries: int, backoff: float) -> None:
        self._inner, self._retries, self._backoff = inner, retries, backoff
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._given_up: set[int] = set()

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> dict:
        """Sample `index` of the dataset; an unreadable one holds only its reason under `DAMAGE`."""
        shard = bisect_right(self._inner.shard_count_cumsum, index) - 1
        try:
            return self._read_patiently(shard, index)
        except (OSError, *_DAMAGE_ERRORS) as error:
            name = self._inner.shard_infos[shard].name
            local = index - self._inner.shard_count_cumsum[shard]
            return {
                **self._identity(shard, index, f"{name}#{local}", ()),
                DAMAGE: f"sample {local} of shard {name} is unreadable: {type(error).__name__}: {error}",
            }

    def _read_patiently(self, shard: int, index: int) -> dict:
        # One sample waits for a failing shard; those after it find out at once.
        attempts = 1 if shard in self._given_up else self._retries + 1
        for attempt in range(attempts):
            try:
                sample = self._read(shard, index)
                self._given_up.discard(shard)
                return sample
            except (OSError, *_DAMAGE_ERRORS) as error:
                self._forget(shard)
                if isinstance(error, _DAMAGE_ERRORS) or attempt + 1 == attempts:
                    if isinstance(error, OSError):
                        self._given_up.add(shard)
                    raise
                time.sleep(self._backoff * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _read(self, shard: int, index: int) -> dict:
        if shard not in self._open:
            self._open[shard] = _Shard(self._inner.shard_infos[shard].path)
            if len(self._open) > self._inner.itar_cache_size:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        members = parse_members(self._open[shard].read(index - self._inner.shard_count_cumsum[shard]))
        parts, names, keys = {}, [], set()
        for name, content in members:
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            keys.add(f"{folder}/{stem}" if folder else stem)
            parts[extension] = content
            names.append(name)
        if len(keys) != 1:
            raise ValueError(f"expected one sample, found the keys {sorted(keys)}")
        return {**parts, **self._identity(shard, index, keys.pop(), tuple(names))}

    def _identity(self, shard: int, index: int, key: str, names: tuple[str, ...]) -> dict:
        name = self._inner.shard_infos[shard].name
        source = SourceInfo(dataset_path=self._inner.base_path, index=index, shard_name=name, file_names=names)
        return {
            "__key__": key,
            "__shard__": name,
            "__restore_key__": ("Webdataset", index),
            "__sources__": (source,),
        }

    def _forget(self, shard: int) -> None:
        if opened := self._open.pop(shard, None):
            opened.close()


def install(dataset: SavableDataset, retries: int, backoff: float) -> None:
    """Put a `ShardReader` in place of every Energon reader below `dataset`."""
    if isinstance(dataset, WebdatasetSampleLoaderDataset):
        dataset.join_readers = [ShardReader(reader, retries, backoff) for reader in dataset.join_readers]
    for inner in getattr(dataset, "datasets", ()):
        install(inner, retries, backoff)
