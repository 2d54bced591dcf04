"""Raw folders and tars as people have them: sidecars, links, folders that cannot be listed, downloads that failed."""

import io
import json
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.corpus import CorpusError
from megatron_anyexperts.corpus.failed_download import failed_download
from megatron_anyexperts.corpus.sample import Rejected
from megatron_anyexperts.corpus.workers import Share
from tests.corpus.raw import corpus_of, items, png, write, write_lines

METADATA = {"url": "http://x", "caption": "a cat", "width": 10, "status": "success", "error": None}


def reasons(found):
    return [item.reason if isinstance(item, Rejected) else "good" for item in found]


@pytest.mark.parametrize(
    ("sidecar", "text", "expected"),
    [
        (METADATA, "A cat.", [(None, "A cat.")]),
        ({"url": "http://x", "sha": "00ff"}, "A cat.", [(None, "A cat.")]),
        (METADATA, None, [(None, "a cat")]),
        ({"text": "Un chat", "language": "fr"}, None, [("fr", "Un chat")]),
        ([1, 2], "A cat.", [(None, "A cat.")]),
        ({"en": "A cat", "zh-Hant": "\u8c93"}, "Unused.", [("en", "A cat"), ("zh-Hant", "\u8c93")]),
        ({"url": "http://x", "sha": "00ff"}, None, "no text in the sidecar"),
        ({"en": 3}, None, "no text in the sidecar"),
        (None, None, "no caption beside the file"),
    ],
)
def test_a_json_beside_an_image_holds_languages_or_metadata(tmp_path, sidecar, text, expected):
    write(tmp_path / "images/a.png", png(1))
    if sidecar is not None:
        write(tmp_path / "images/a.json", json.dumps(sidecar))
    if text is not None:
        write(tmp_path / "images/a.txt", text)
    found = items(corpus_of(tmp_path, {"type": "image_folder", "path": "images"}))
    if isinstance(expected, str):
        assert reasons(found) == [expected]
    else:
        assert [(item.fields.get("language"), item.fields["caption"]) for item in found] == expected


def source_of(kind):
    return {
        "text_folder": {"type": "text_folder", "path": "in"},
        "image_folder": {"type": "image_folder", "path": "in"},
        "text_table": {"type": "text_table", "path": "in"},
        "webdataset": {"type": "webdataset", "path": "in"},
    }[kind]


def fill(folder, kind):
    """One good item for a source of the kind."""
    if kind == "image_folder":
        write(folder / "a.png", png(1))
    write(folder / "a.txt", "A text.")
    write_lines(folder / "a.jsonl", [{"text": "A record."}])
    write(folder / "a.tar", tar({"a.txt": b"In a tar."}))


KINDS = ["text_folder", "image_folder", "text_table", "webdataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_listed_is_counted(tmp_path, kind):
    fill(tmp_path / "in", kind)
    # Too long a path is what even root cannot list.
    start = os.getcwd()
    try:
        os.chdir(tmp_path / "in")
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(start)
    corpus = corpus_of(tmp_path, source_of(kind), validation_fraction=0)
    assert reasons(items(corpus)) == ["good", "unreadable folder"]
    manifest = build(corpus, tmp_path / "out", Share(), 0, True)
    assert manifest["items"] == 2 and manifest["rejected"] == {"unreadable folder": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_leave_their_folder_only_where_that_is_declared(tmp_path, kind, what):
    fill(tmp_path / "elsewhere", kind)
    (tmp_path / "in").mkdir()
    if what == "folder":
        (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    else:
        for path in (tmp_path / "elsewhere").iterdir():
            (tmp_path / "in" / path.name).symlink_to(path)
    [item] = items(corpus_of(tmp_path, source_of(kind)))
    assert item.reason == "link leads out of its folder" and "follow_links: true" in item.detail
    assert reasons(items(corpus_of(tmp_path, source_of(kind) | {"follow_links": True}))) == ["good"]


def test_a_linked_sidecar_does_not_leave_its_folder(tmp_path):
    write(tmp_path / "secret", "Secret.")
    write(tmp_path / "in/a.png", png(1))
    (tmp_path / "in/a.txt").symlink_to(tmp_path / "secret")
    assert reasons(items(corpus_of(tmp_path, source_of("image_folder")))) == ["link leads out of its folder"]


def test_links_within_the_folder_are_as_good_as_files_and_loops_end(tmp_path):
    fill(tmp_path / "in/real", "image_folder")
    (tmp_path / "in/b.png").symlink_to("real/a.png")
    (tmp_path / "in/b.txt").symlink_to("real/a.txt")
    (tmp_path / "in/real/up").symlink_to("..")
    (tmp_path / "in/again").symlink_to("real")
    for follow in (False, True):
        found = items(corpus_of(tmp_path, source_of("image_folder") | {"follow_links": follow}))
        assert reasons(found) == ["good", "good"]


def test_a_source_that_is_a_link_out_of_the_root_is_refused_unless_declared(tmp_path):
    fill(tmp_path / "elsewhere", "text_folder")
    root = tmp_path / "root"
    root.mkdir()
    (root / "in").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match="leads out of .*follow_links: true"):
        corpus_of(root, source_of("text_folder"))
    assert reasons(items(corpus_of(root, source_of("text_folder") | {"follow_links": True}))) == ["good"]
    assert reasons(items(corpus_of(root, {"type": "text_folder", "path": "../elsewhere"}))) == ["good"]


def test_media_references_follow_links_where_declared_but_never_dots(tmp_path):
    write(tmp_path / "secret.png", png(1))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link.png").symlink_to(tmp_path / "secret.png")
    write_lines(tmp_path / "in/a.jsonl", [{"i": "link.png", "t": "x"}, {"i": "../secret.png", "t": "x"}])
    source = {"type": "media_table", "path": "in", "media_field": "i", "text_field": "t"}
    assert reasons(items(corpus_of(tmp_path, source))) == ["media path leaves its folder"] * 2
    assert reasons(items(corpus_of(tmp_path, source | {"follow_links": True})))[0] == "good"
    assert reasons(items(corpus_of(tmp_path, source | {"follow_links": True})))[1] == "media path leaves its folder"


def tar(members: dict[str, bytes | str]) -> bytes:
    """A tar; a member that is text is a hard link to the member of that name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.LNKTYPE, data
                file.addfile(member)
            else:
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"0.png": png(1), "0.txt": b"x", "1.png": "0.png", "1.txt": b"y"}, "no regular member"),
        ({"1.txt": b"y", "1.json": b'{"status": "failed_to_download"}'}, "medium was not downloaded"),
        ({"1.txt": b"y", "1.json": b'{"width": 20, "height": 10}'}, "medium is missing"),
        ({"1.heic": b"...", "1.txt": b"y"}, "unknown member"),
        ({"1.v2.png": png(1), "1.txt": b"y"}, "unknown member"),
    ],
)
def test_a_sample_without_its_medium_is_no_document(tmp_path, members, reason):
    write(tmp_path / "a.tar", tar(members))
    found = items(corpus_of(tmp_path, {"type": "webdataset", "path": "a.tar"}))
    assert reasons(found)[-1] == reason and set(reasons(found)[:-1]) <= {"good"}


PAGE = "<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>nginx</body></html>"


@pytest.mark.parametrize(
    "text",
    ["404: Not Found", "404 page not found", "HTTP/1.1 502 Bad Gateway", "403 Forbidden", PAGE]
    + ["<?xml version='1.0'?>\n<Error><Code>NoSuchKey</Code></Error>", "<html><h1>Access Denied</h1></html>"],
)
def test_error_pages_are_no_documents_and_no_captions(tmp_path, text):
    write(tmp_path / "text/a.txt", text)
    write(tmp_path / "text/b.txt", "A good document.")
    write(tmp_path / "images/a.png", png(1))
    write(tmp_path / "images/a.txt", text)
    sources = [{"type": "text_folder", "path": "text"}, {"type": "image_folder", "path": "images"}]
    manifest = build(corpus_of(tmp_path, *sources, validation_fraction=0), tmp_path / "out", Share(), 0, True)
    assert manifest["samples"] == 1 and manifest["rejected"] == {"failed download instead of a text": 2}


@given(st.text() | st.sampled_from(["404 errors are common", "500 Miles", "<p>404 Not Found</p>", "Not all is lost."]))
def test_other_texts_are_documents(text):
    assert failed_download(text) is None
    assert failed_download(f"<html><title>How HTTP works: 404 and others</title>{text}</html>") is None


def test_a_failed_build_says_how_to_mend_it_and_looks_again(tmp_path):
    for number in range(3):
        write(tmp_path / f"images/{number}.png", png(number))
    corpus = corpus_of(tmp_path, {"type": "image_folder", "path": "images"}, validation_fraction=0)
    with pytest.raises(CorpusError, match=r"no caption beside the file \(3 x, such as images:.*neither .txt nor .json"):
        build(corpus, tmp_path / "out", Share(), 0, True)
    for number in range(3):
        write(tmp_path / f"images/{number}.txt", f"Picture {number}.")
    write(tmp_path / "images/3.png", png(3))
    write(tmp_path / "images/3.txt", "Picture 3.")
    assert build(corpus, tmp_path / "out", Share(), 0, True)["samples"] == 4


def test_items_that_ended_in_unforeseen_errors_are_read_again(tmp_path, monkeypatch):
    from megatron_anyexperts.corpus import scan

    for number in range(6):
        write(tmp_path / f"text/{number}.txt", f"Text {number}.")
    options = {"validation_fraction": 0, "chunk_items": 1, "tolerance": {"unforeseen_items": 0, "unforeseen_share": 0}}
    corpus = corpus_of(tmp_path, {"type": "text_folder", "path": "text"}, **options)
    with monkeypatch.context() as broken:
        check = scan.check
        broken.setattr(scan, "check", lambda item, limits: check(item, limits) if "3" not in item.origin else 1 / 0)
        with pytest.raises(CorpusError, match="ZeroDivisionError"):
            build(corpus, tmp_path / "out", Share(), 0, True)
    assert build(corpus, tmp_path / "out", Share(), 0, True)["samples"] == 6


def test_a_source_without_readable_files_names_those_that_are(tmp_path):
    write(tmp_path / "in/a.xyz", "x")
    for kind, known in {"text_folder": ".rst", "text_table": ".json", "webdataset": ".tar"}.items():
        with pytest.raises(CorpusError, match=f"holds nothing that a {kind} can read: .*\\{known}"):
            build(corpus_of(tmp_path, source_of(kind)), tmp_path / f"out-{kind}", Share(), 0, True)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ({"type": "text_folder"}, "a.PDF"),
        ({"type": "text_folder"}, "a.txt.gz"),
        ({"type": "image_folder"}, "a.avif"),
        ({"type": "audio_folder"}, "a.aiff"),
        ({"type": "video_folder"}, "a.MPG"),
        ({"type": "text_table"}, "a.jsonl.bz2"),
        ({"type": "chat"}, "a.arrow"),
        ({"type": "webdataset"}, "a.tar.gz"),
    ],
)
def test_files_that_people_would_expect_in_the_corpus_are_counted_when_they_are_not_read(tmp_path, source, file):
    write(tmp_path / "in/sub" / file, b"whatever")
    write(tmp_path / "in/notes.xyz", "x")
    for path in ("in", f"in/sub/{file}")[: 2 if source["type"] in ("text_table", "chat", "webdataset") else 1]:
        [item] = items(corpus_of(tmp_path, source | {"path": path}))
        assert item.reason == "form of file is not read" and item.origin.endswith(file)
        assert item.detail.startswith(f"{file}: {source['type']} reads .")


@pytest.mark.parametrize("suffix", ["jpe", "JFIF"])
def test_all_suffixes_of_a_jpeg_are_read(tmp_path, suffix):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    write(tmp_path / f"in/a.{suffix}", buffer.getvalue())
    write(tmp_path / "in/a.txt", "A picture.")
    assert reasons(items(corpus_of(tmp_path, source_of("image_folder")))) == ["good"]
