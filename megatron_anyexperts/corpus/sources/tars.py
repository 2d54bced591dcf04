"""Existing WebDataset tars: ours, to be merged or cut anew, and those of img2dataset and others."""

import json
import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

from megatron_anyexperts.corpus.sample import DOCUMENT_KIND, TEXT_FIELD, Media, Rejected, Sample
from megatron_anyexperts.corpus.sources.base import (
    Chunk,
    Item,
    Source,
    check_file,
    decode_text,
    lost_chunk,
    lost_item,
    walk_files,
    with_suffix,
)
from megatron_anyexperts.corpus.sources.folders import AudioFolder, ImageFolder, VideoFolder
from megatron_anyexperts.corpus.sources.sidecars import TEXT_NAMES
from megatron_anyexperts.corpus.sources.unread import is_unread, refusal, unread
from megatron_anyexperts.corpus.unforeseen import foreseen

MEDIA_BY_SUFFIX = {
    suffix: source.kind for source in (ImageFolder, AudioFolder, VideoFolder) for suffix in source.suffixes
}
MEDIA_FIELDS = ("width", "height", "original_width", "original_height", "exif", "duration", "fps", "sample_rate")
"""Fields of a sample's JSON that tell of a medium."""

KIND_OF_DOCUMENT = {name: kind for kind, name in DOCUMENT_KIND.items()} | {"interleaved": "interleaved", "chat": "chat"}


class WebDataset(Source):
    """Samples of a tar, or of all tars below a folder.

    Samples written by this tool come back as they were. Others have one medium and a text, in a `.txt` member or
    in a field of a `.json` member; a text without a medium is a document.
    """

    type: ClassVar[str] = "webdataset"
    text_field: str | None = None
    """Field of the `.json` member that holds the text; by default text, caption or transcript."""
    kinds: list[str] | None = None
    """Kinds of samples to keep (text, image, audio, video, interleaved, chat)."""
    languages: list[str] | None = None
    """Languages to keep."""

    def forms(self) -> str:
        return ".tar"

    def chunks(self, seed: int, chunk_items: int, chunk_bytes: int) -> Iterator[Chunk]:
        if not self.path.is_dir():
            if is_unread("tar", self.path.name):
                yield lost_chunk(refusal(self.path.name, self.type, self.forms()))
            else:
                yield {"file": self.path.name}
            return
        tar = with_suffix({".tar"})
        walked = walk_files(self.path, lambda name: tar(name) or is_unread("tar", name), self.follow_links)
        found = unread(walked, "tar", self.type, self.forms())
        yield from ({"file": name} for name in sorted(name for name in found if isinstance(name, str)))
        yield from (lost_chunk(lost) for lost in found if isinstance(lost, Rejected))

    def read(self, chunk: Chunk, wanted: Collection[int] | None, max_bytes: int) -> Iterator[Item]:
        if "lost" in chunk:
            yield lost_item(self.label, chunk)
            return
        try:
            file = check_file(self.path, chunk["file"], self.follow_links) if self.path.is_dir() else self.path
        except Rejected as rejected:
            rejected.origin = f"{self.label}:{chunk['file']}"
            yield -1, rejected
            return
        for position, members in enumerate(tar_samples(file, wanted, max_bytes)):
            if members is None:
                continue
            try:
                if isinstance(members, Rejected):
                    raise members
                with foreseen():
                    item = self._sample(members)
            except Rejected as rejected:
                item = rejected
            item.origin = self.origin(chunk, position)
            yield position, item

    def _sample(self, members: dict[str, bytes]) -> Sample:
        meta = _json_member(members)
        sample = (
            _own_sample(meta, members) if "media" in meta and "kind" in meta else self._foreign_sample(meta, members)
        )
        if self.kinds is not None and sample.kind not in self.kinds:
            raise Rejected("left out: other kind", sample.kind)
        if self.languages is not None and sample.fields.get("language") not in self.languages:
            raise Rejected("left out: other language", str(sample.fields.get("language"))[:35])
        return sample

    def _foreign_sample(self, meta: dict[str, Any], members: dict[str, bytes]) -> Sample:
        media = [
            Media(MEDIA_BY_SUFFIX[f".{suffix}"], data)
            for suffix, data in members.items()
            if f".{suffix}" in MEDIA_BY_SUFFIX
        ]
        if len(media) > 1:
            raise Rejected("more than one medium", str(sorted(members))[:200])
        if not media:
            _check_document(meta, members)
        names = [self.text_field] if self.text_field else TEXT_NAMES
        texts = [meta[name] for name in names if isinstance(meta.get(name), str)]
        if not texts and "txt" in members:
            texts = [decode_text(members["txt"])]
        if not texts:
            raise Rejected("no text in the sample", str(sorted(members))[:200])
        kind = media[0].type if media else "text"
        language = meta.get("language", self.language)
        known = {"language": language} if isinstance(language, str) and len(language) <= 35 else {}
        return Sample(kind, {TEXT_FIELD[kind]: texts[0] if kind == "text" else texts[0].strip()} | known, media)


def _check_document(meta: dict[str, Any], members: dict[str, bytes]) -> None:
    """A sample without a medium is a text, unless something says that it should have one.

    Raises:
        Rejected: its medium is missing or of an unknown kind.
    """
    if isinstance(meta.get("status"), str) and meta["status"] != "success":
        raise Rejected("medium was not downloaded", f"status {meta['status']}"[:200])
    if described := [name for name in MEDIA_FIELDS if meta.get(name) is not None]:
        raise Rejected("medium is missing", f"the JSON has {described}, the members are {sorted(members)}"[:200])
    if unknown := sorted(members.keys() - {"json", "txt"}):
        raise Rejected("unknown member", f"{unknown}; media are {', '.join(sorted(MEDIA_BY_SUFFIX))}"[:300])


def _json_member(members: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        meta = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise Rejected("damaged JSON", str(error)[:200]) from None
    if not isinstance(meta, dict):
        raise Rejected("JSON is not an object")
    return meta


def _own_sample(meta: dict[str, Any], members: dict[str, bytes]) -> Sample:
    """A sample as this tool wrote it.

    Raises:
        Rejected: it is not complete.
    """
    try:
        kind, names = KIND_OF_DOCUMENT[meta["kind"]], list(meta["media"])
        media = [Media(MEDIA_BY_SUFFIX["." + name.rpartition(".")[2]], members[name]) for name in names]
        if kind in TEXT_FIELD:
            fields = {TEXT_FIELD[kind]: str(meta[TEXT_FIELD[kind]])}
            if [medium.type for medium in media] != [kind] * (kind != "text"):
                raise Rejected("media do not fit the kind of the sample", f"{kind}: {names}"[:200])
        elif kind == "interleaved":
            fields = {"segments": [_numbered(part, names) for part in meta["segments"]]}
        else:
            fields = {
                "messages": [
                    {"role": str(turn["role"]), "content": [_numbered(part, names) for part in turn["content"]]}
                    | ({"loss": bool(turn["loss"])} if "loss" in turn else {})
                    for turn in meta["messages"]
                ]
            }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Rejected("incomplete sample", f"{type(error).__name__}: {error}"[:200]) from None
    language = meta.get("language")
    return Sample(kind, fields | ({"language": language} if isinstance(language, str) else {}), media)


def _numbered(part: dict[str, Any], names: list[str]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": str(part["text"])}
    number = names.index(part["media"])
    return {"type": MEDIA_BY_SUFFIX["." + names[number].rpartition(".")[2]], "media": number}


def tar_samples(
    path: Path, wanted: Collection[int] | None, max_bytes: int
) -> Iterator[dict[str, bytes] | Rejected | None]:
    """Samples of a tar as members by extension, in order; None for those that are not wanted.

    A damaged tar yields what comes before the damage, then a rejection.
    """
    key, number, members = None, -1, None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if member.isdir() or not stem or not extension:
                    continue
                if key != (folder, stem):
                    if key is not None:
                        yield members
                    key, number = (folder, stem), number + 1
                    members = {} if wanted is None or number in wanted else None
                if not member.isreg():
                    linked = f"{member.name} -> {member.linkname}"
                    way_out = "archive the files themselves (tar --dereference --hard-dereference)"
                    members = None if members is None else Rejected("no regular member", f"{linked}; {way_out}"[:300])
                elif isinstance(members, dict):
                    held = sum(map(len, members.values()))
                    if member.size + held > max_bytes:
                        members = Rejected("too many bytes", f"{member.size + held} bytes, limit {max_bytes}")
                    else:
                        members[extension.lower()] = tar.extractfile(member).read()
            file.seek(tar.offset)
            # tarfile takes a damaged header for the end of the file; the true end is marked by zeros.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        # The sample that was being collected may lack members: it goes with the damage.
        yield Rejected("damaged or truncated shard", f"{type(error).__name__}: {error}"[:200])
        return
    if key is not None:
        yield members
