"""First reading: check every item of a chunk and keep what planning needs to know about it."""

import io
import json
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from megatron_anyexperts.corpus import near
from megatron_anyexperts.corpus.corpus import Corpus, Limits
from megatron_anyexperts.corpus.facts import Facts
from megatron_anyexperts.corpus.failed_download import failed_download
from megatron_anyexperts.corpus.probe import probe
from megatron_anyexperts.corpus.sample import KINDS, TEXT_FIELD, Rejected, Sample
from megatron_anyexperts.corpus.sources.base import Chunk
from megatron_anyexperts.corpus.unforeseen import foreseen, guarded
from megatron_anyexperts.files import atomic_file

ACCEPTED = np.dtype(
    [("hash_high", "<u8"), ("hash_low", "<u8"), ("group", "<u8"), ("position", "<i8"), ("bytes", "<i8"), ("kind", "u1")]
)
"""One accepted item: content hash (two halves), group hash, position in its chunk, size, index into KINDS."""


@dataclass
class Scan:
    """What is known about the items of one chunk; N of them are accepted."""

    accepted: np.ndarray
    """[N] of ACCEPTED, in reading order."""
    facts: list[list[Facts]]
    """What is known about the media of each accepted item; length N."""
    rejected: list[dict]
    """Origin, reason and detail of the others."""
    text_signatures: np.ndarray
    """uint64 [N, near.PERMUTATIONS], or [0, ...] when near-duplicate texts are not looked for."""
    image_signatures: np.ndarray
    """uint64 [N] perceptual hashes, or [0] when near-duplicate images are not looked for."""

    @property
    def items(self) -> int:
        """Number of items that were read."""
        return len(self.accepted) + len(self.rejected)


def check(sample: Sample, limits: Limits) -> list[Facts]:
    """Hold a sample against the limits; return the facts about its media.

    Raises:
        Rejected: the first thing that is wrong with it.
    """
    try:
        json.dumps(sample.fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("text is not Unicode", str(error)[:200]) from None
    length = sum(len(text.strip()) for text in sample.texts())
    if length == 0:
        raise Rejected("empty text")
    if length < limits.min_text_chars:
        raise Rejected("text too short", f"{length} characters, min_text_chars {limits.min_text_chars}")
    if length > limits.max_text_chars:
        raise Rejected("text too long", f"{length} characters, max_text_chars {limits.max_text_chars}")
    if sample.kind in TEXT_FIELD and (error := failed_download(next(sample.texts()))):
        raise Rejected("failed download instead of a text", error)
    if len(sample.media) > limits.max_media:
        raise Rejected("too many media", f"{len(sample.media)}, max_media {limits.max_media}")
    return [probe(media, limits) for media in sample.media]


def _row(position: int, item: Sample) -> tuple:
    digest = item.content_hash()
    halves = (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big"))
    group = int.from_bytes(item.group_hash(), "big")
    return (*halves, group, position, item.byte_count(), KINDS.index(item.kind))


def describe(rejected: Rejected) -> dict[str, str]:
    """A line of the list of rejected samples."""
    return {"origin": rejected.origin, "reason": rejected.reason, "detail": rejected.detail}


def scan_chunk(corpus: Corpus, chunk: Chunk, crashed: set[int] = frozenset(), on_item=lambda position: None) -> Scan:
    """Read and check a whole chunk.

    Args:
        corpus: limits and sources.
        chunk: one of the corpus' chunks.
        crashed: positions whose decoding killed an earlier process; they are rejected without decoding.
        on_item: called with each position before the item is decoded.
    """
    rows, facts, rejected, texts, images = [], [], [], [], []
    source = corpus.sources[chunk["source"]]
    items = source.read(chunk, None, corpus.limits.max_media_bytes)
    for position, item in guarded(items, source.label):
        try:
            if isinstance(item, Rejected):
                raise item
            if position in crashed:
                raise Rejected("decoding it kills the process")
            on_item(position)
            with foreseen():
                found = check(item, corpus.limits)
                row = _row(position, item)
                image = text = None
                if corpus.dedup.near_image is not None:
                    image = near.image_signature(item, corpus.limits.max_pixels)
                if corpus.dedup.near_text is not None:
                    text = near.text_signature(item)
        except Rejected as problem:
            problem.origin = item.origin
            rejected.append(describe(problem))
            continue
        rows.append(row)
        facts.append(found)
        if image is not None:
            images.append(image)
        if text is not None:
            texts.append(text)
    return Scan(
        np.array(rows, dtype=ACCEPTED),
        facts,
        rejected,
        np.array(texts, dtype=np.uint64).reshape(-1, near.PERMUTATIONS),
        np.array(images, dtype=np.uint64),
    )


def work_file(work: Path, folder: str, number: int, suffix: str) -> Path:
    """A file about chunk `number` in the working folder of a build, at most 1000 in a folder."""
    return work / folder / f"{number // 1000:06d}" / f"{number:09d}.{suffix}"


def scan_path(work: Path, number: int) -> Path:
    """Where the scan of chunk `number` is stored."""
    return work_file(work, "scan", number, "npz")


def save_scan(scan: Scan, path: Path, scratch: Path) -> None:
    """Store a scan atomically; one that is there stays, so that its time identifies it."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        accepted=scan.accepted,
        facts=_json_array([[astuple(fact) for fact in facts] for facts in scan.facts]),
        rejected=_json_array(scan.rejected),
        texts=scan.text_signatures,
        images=scan.image_signatures,
    )
    with atomic_file(path, scratch, first_wins=True) as file:
        file.write(buffer.getvalue())


def _json_array(content: list) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)


def load_scan(path: Path) -> Scan:
    """Read what `save_scan` stored."""
    with np.load(path, allow_pickle=False) as content:
        facts = [[Facts(*fact) for fact in facts] for facts in json.loads(content["facts"].tobytes())]
        rejected = json.loads(content["rejected"].tobytes())
        return Scan(content["accepted"], facts, rejected, content["texts"], content["images"])


def load_planned(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What planning needs of a scan: accepted items, text signatures, image signatures."""
    with np.load(path, allow_pickle=False) as content:
        return content["accepted"], content["texts"], content["images"]


def load_outcome(path: Path) -> tuple[int, list[dict]]:
    """How many items of a chunk were accepted, and the rejected ones."""
    with np.load(path, allow_pickle=False) as content:
        return len(content["accepted"]), json.loads(content["rejected"].tobytes())
