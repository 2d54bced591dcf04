"""Existing WebDataset tars: ours, to be merged or cut anew, and those of img2dataset and others."""

import json
import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

from megatron_anyexperts.data.build.sample import DOCUMENT_KIND, TEXT_FIELD, Media, Rejected, Sample
from megatron_anyexperts.data.build.sources.base import Chunk, Item, Source, decode_text
from megatron_anyexperts.data.build.sources.folders import AudioFolder, ImageFolder, VideoFolder

MEDIA_BY_SUFFIX = {
    suffix: source.kind for source in (ImageFolder, AudioFolder, VideoFolder) for suffix in source.suffixes
}
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

    def chunks(self, seed: int, chunk_items: int, chunk_bytes: int) -> Iterator[Chunk]:
        if not self.path.is_dir():
            yield {"file": self.path.name}
            return
        for file in sorted(file for file in self.path.rglob("*.tar") if file.is_file()):
            yield {"file": str(file.relative_to(self.path))}

    def read(self, chunk: Chunk, wanted: Collection[int] | None, max_bytes: int) -> Iterator[Item]:
        file = self.path / chunk["file"] if self.path.is_dir() else self.path
        for position, members in enumerate(tar_samples(file, wanted, max_bytes)):
            if members is None:
                continue
            try:
                if isinstance(members, Rejected):
                    raise members
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
        names = [self.text_field] if self.text_field else ["text", "caption", "transcript"]
        texts = [meta[name] for name in names if isinstance(meta.get(name), str)]
        if not texts and "txt" in members:
            texts = [decode_text(members["txt"])]
        if not texts:
            raise Rejected("no text in the sample", str(sorted(members))[:200])
        kind = media[0].type if media else "text"
        language = meta.get("language", self.language)
        known = {"language": language} if isinstance(language, str) and len(language) <= 35 else {}
        return Sample(kind, {TEXT_FIELD[kind]: texts[0] if kind == "text" else texts[0].strip()} | known, media)


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
                if not member.isreg() or not stem or not extension:
                    continue
                if key != (folder, stem):
                    if key is not None:
                        yield members
                    key, number = (folder, stem), number + 1
                    members = {} if wanted is None or number in wanted else None
                if isinstance(members, dict):
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
