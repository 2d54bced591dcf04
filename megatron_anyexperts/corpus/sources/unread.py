"""Forms of files that people have and no source reads: they are counted as rejected instead of passed over.

Other files of a folder (notes, indexes, media of another kind) are passed over: nobody expects them in the corpus.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_anyexperts.corpus.sample import Rejected

_PACKED = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".7z", ".zip", ".rar", ".snappy")
_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

UNREAD: dict[str, tuple[str, ...]] = {
    "text": (".html", ".htm", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub")
    + (".txt.gz", ".txt.zst", ".txt.bz2", ".txt.xz"),
    "image": (".avif", ".heic", ".heif", ".svg", ".ico", ".pdf", ".ppm", ".pgm", ".pnm", ".jp2", ".j2k", ".jxl", ".tga")
    + (".psd", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr"),
    "audio": (".aif", ".aiff", ".caf", ".wv", ".ape", ".ac3", ".amr", ".wma", ".mid", ".midi", ".au", ".sph", ".mp2"),
    "video": (".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".3gp", ".ogv", ".rm", ".vob", ".mxf"),
    "records": (".arrow", ".feather", ".orc", ".avro", ".xlsx", ".xls", ".sqlite", ".db", ".parquet.gz", ".parquet.zst")
    + tuple(f"{table}{packed}" for table in _TABLES for packed in _PACKED),
    "tar": (".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar"),
}  # fmt: skip
"""Suffixes by what a source reads."""


def is_unread(kind: str, name: str) -> bool:
    """Whether a file is one that people would expect to be read, and is not."""
    return name.lower().endswith(UNREAD[kind])


def unread(names: Iterator[str | Rejected], kind: str, reader: str, forms: str) -> list[str | Rejected]:
    """What `walk_files` found, with a rejection in place of each file that is not read.

    Args:
        names: paths, or what could not be listed.
        kind: key of `UNREAD`.
        reader: type of the source.
        forms: what it reads.
    """
    return [
        refusal(name, reader, forms) if isinstance(name, str) and is_unread(kind, name) else name for name in names
    ]


def refusal(name: str, reader: str, forms: str) -> Rejected:
    """The rejection of a file in a form that is not read."""
    return Rejected("form of file is not read", f"{Path(name).name}: {reader} reads {forms}"[:300], name)
