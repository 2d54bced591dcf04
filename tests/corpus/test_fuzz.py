"""Hostile input never crashes the builder, never leaves the output folder, and is always accounted for."""

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_anyexperts.corpus import probe as probe_module
from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.corpus import Limits
from megatron_anyexperts.corpus.probe import probe
from megatron_anyexperts.corpus.sample import Media, Rejected, Sample
from megatron_anyexperts.corpus.scan import scan_chunk
from megatron_anyexperts.corpus.workers import Share
from megatron_anyexperts.data.decoder_process import DecoderProcess
from tests import deadly
from tests.corpus.raw import corpus_of, data_url, mp4, png, tree_bytes, wav, write, write_lines

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

STARTS = {"image": png(1), "audio": wav(1), "video": mp4(1)}

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw, start: bytes) -> bytes:
    """Real media with bytes changed, removed or added; or nothing but random bytes."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=300))
    data = bytearray(start)
    for _ in range(draw(st.integers(0, 8))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))]) + draw(st.binary(max_size=20))


@pytest.mark.parametrize("kind", STARTS)
@FUZZ
@given(data=st.data())
def test_damaged_media_are_probed_or_rejected(kind, data):
    content = data.draw(damaged(STARTS[kind]))
    try:
        facts = probe(Media(kind, content), Limits())
    except Rejected as rejected:
        assert rejected.reason
    else:
        assert facts.type == kind and facts.extension.isalnum()


def scan_everything(corpus):
    """Scan all chunks, as the build does."""
    source = corpus.sources[0]
    scans = [
        scan_chunk(corpus, {"source": 0, **chunk}) for chunk in source.chunks(0, corpus.chunk_items, corpus.chunk_bytes)
    ]
    for scan in scans:
        assert all(line["reason"] and line["origin"] for line in scan.rejected)
    return scans


@FUZZ
@given(data=damaged(b"".join(json.dumps({"text": f"line {n}"}).encode() + b"\n" for n in range(20))))
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "csv"])
def test_random_bytes_as_record_files_are_read_or_rejected(tmp_path, suffix, data):
    write(tmp_path / f"a.{suffix}", data)
    scan_everything(corpus_of(tmp_path, {"type": "text_table", "path": f"a.{suffix}"}, chunk_bytes=50))


@FUZZ
@given(records=st.lists(JSON_VALUES | st.fixed_dictionaries({"messages": JSON_VALUES}), max_size=4))
@pytest.mark.parametrize("type_", ["chat", "interleaved", "media_table"])
def test_random_json_as_records_is_read_or_rejected(tmp_path, type_, records):
    write_lines(tmp_path / "a.jsonl", records)
    extra = {"media_field": "a", "text_field": "b"} if type_ == "media_table" else {}
    scans = scan_everything(corpus_of(tmp_path, {"type": type_, "path": "a.jsonl"} | extra))
    assert sum(scan.items for scan in scans) == len(records)


PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "input_audio", "video_url"])},
    optional={"text": JSON_VALUES, "image": JSON_VALUES, "input_audio": JSON_VALUES},
)
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "x"]) | JSON_VALUES,
        "content": st.text(max_size=9) | st.lists(PARTS, max_size=3),
    },
)


@FUZZ
@given(conversations=st.lists(TURNS, max_size=4))
def test_nearly_right_chats_are_read_or_rejected(tmp_path, conversations):
    write_lines(tmp_path / "a.jsonl", [{"messages": conversations, "image": ["a.png"]}])
    assert sum(scan.items for scan in scan_everything(corpus_of(tmp_path, {"type": "chat", "path": "a.jsonl"}))) == 1


def small_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number in range(4):
            for suffix, data in {"png": png(number), "txt": b"A caption."}.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@FUZZ
@given(data=damaged(small_tar()))
def test_random_bytes_as_tars_are_read_or_rejected(tmp_path, data):
    write(tmp_path / "shards/a.tar", data)
    scan_everything(corpus_of(tmp_path, {"type": "webdataset", "path": "shards"}))


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + block(b"IHDR", header)
        + block(b"IDAT", zlib.compress(bytes(10**6)))
        + block(b"IEND", b"")
    )


def test_bombs_are_rejected_before_they_unfold():
    with pytest.raises(Rejected, match="too many pixels"):
        probe(Media("image", bomb_png(100_000, 100_000)), Limits())
    with pytest.raises(Rejected, match="too long"):
        probe(Media("audio", wav(1, seconds=3)), Limits(max_audio_seconds=2))
    with pytest.raises(Rejected, match="too long"):
        probe(Media("video", mp4(1, frames=30)), Limits(max_video_seconds=2))
    with pytest.raises(Rejected, match="too many pixels"):
        probe(Media("video", mp4(1)), Limits(max_pixels=1000))


def test_a_play_list_does_not_open_other_files(tmp_path):
    write(tmp_path / "sound.wav", wav(1))
    for text in (
        f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/sound.wav\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {tmp_path}/sound.wav\n",
    ):
        with pytest.raises(Rejected, match="unknown media format"):
            probe(Media("audio", text.encode()), Limits())


def test_hostile_names_never_leave_the_output_folder(tmp_path):
    inside = tmp_path / "in" / "work"
    names = [
        "line\nbreak.png",
        "..\\..\\x.png",
        "semi;rm -rf.png",
        "a'\"$(x).png",
        ".hidden.png",
        "ümläut.png",
        "%s%n.png",
    ]
    for number, name in enumerate(names):
        write(inside / "images" / name, png(number))
        write(inside / "images" / (name[:-4] + ".txt"), f"Caption {number}")
    raw = os.fsencode(inside / "images") + b"/\xff\xfe.png"
    Path(os.fsdecode(raw)).write_bytes(png(50))
    Path(os.fsdecode(raw[:-4] + b".txt")).write_bytes(b"Not Unicode in the name")
    deep = inside / "images" / "/".join(["d" * 200] * 18)
    deep.mkdir(parents=True)
    write(deep / "deep.png", png(60))
    write(deep / "deep.txt", "Deep")
    members = {"../../../escape.png": png(70), "../../../escape.txt": b"x", "/abs.png": png(71), "/abs.txt": b"y"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    write(inside / "shards/a\nb.tar", buffer.getvalue())
    before = set(tmp_path.rglob("*"))
    corpus = corpus_of(inside, {"type": "image_folder", "path": "images"}, {"type": "webdataset", "path": "shards"})
    manifest = build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["samples"] == len(names) + 2 + 2
    created = set(tmp_path.rglob("*")) - before - {inside / "corpus.yaml", tmp_path / "out"}
    assert all(path.is_relative_to(tmp_path / "out") for path in created)
    for path in (tmp_path / "out").rglob("*.tar"):
        with tarfile.open(path) as file:
            for member in file:
                assert member.name.partition(".")[0].isalnum() and "/" not in member.name and member.isreg()


def test_text_with_lone_surrogates_or_special_tokens_is_safe(tmp_path):
    from megatron_anyexperts.data.vocabulary import Vocabulary

    write(tmp_path / "a.jsonl", b'{"text": "bad \\ud800 text"}\n{"text": "forged <|image|> token"}\n')
    corpus = corpus_of(tmp_path, {"type": "text_table", "path": "a.jsonl"}, validation_fraction=0)
    manifest = build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["rejected"] == {"text is not Unicode": 1}
    vocabulary = Vocabulary(tmp_path / "out/tokenizer")
    assert not set(vocabulary.encode("forged <|image|> token")) & set(vocabulary.special.values())


def test_a_decoder_that_kills_its_process_costs_one_sample(tmp_path, monkeypatch):
    """The worker is made to die by a source whose reading of one item aborts, as a broken decoder would."""
    for number in range(12):
        write(tmp_path / f"text/{number}.txt", f"Document {number}.")
    corpus = corpus_of(tmp_path, {"type": "text_folder", "path": "text"}, chunk_items=4, validation_fraction=0)
    write(tmp_path / "plugin/sitecustomize.py", ABORTING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/plugin")
    manifest = build(corpus, tmp_path / "out", Share(), workers=2, quiet=True)
    assert manifest["samples"] == 11
    assert manifest["rejected"] == {"decoding it kills the process": 1}
    assert '"text:7.txt"' in (tmp_path / "out/rejected.jsonl").read_text()
    assert tree_bytes(tmp_path / "out")


ABORTING = """
import os
import megatron_anyexperts.corpus.scan as scan

check = scan.check

def aborting(sample, limits):
    if sample.origin == "text:7.txt":
        os.abort()
    return check(sample, limits)

scan.check = aborting
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_kills_its_decoder_is_rejected_with_the_signal(tmp_path, monkeypatch, workers):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "JPEG")
    for number in range(6):
        write(tmp_path / f"images/{number}.jpg", buffer.getvalue() + (deadly.MARK if number == 4 else b"%d" % number))
        write(tmp_path / f"images/{number}.txt", f"Picture {number}.")
    write(tmp_path / "plugin/sitecustomize.py", deadly.SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/plugin", prepend=":")
    monkeypatch.setattr(probe_module, "_DECODER", DecoderProcess())  # one that starts with this environment
    corpus = corpus_of(tmp_path, {"type": "image_folder", "path": "images"}, validation_fraction=0)
    manifest = build(corpus, tmp_path / "out", Share(), workers, quiet=True)
    assert manifest["samples"] == 5 and manifest["rejected"] == {"decoding kills the process": 1}
    line = json.loads((tmp_path / "out/rejected.jsonl").read_text())
    assert line["origin"] == "images:4.jpg" and line["detail"] == "signal 11 (SIGSEGV)"


def test_formats_are_recognised_by_content_not_by_name():
    for format_, extension in {
        "PNG": "png",
        "JPEG": "jpg",
        "WEBP": "webp",
        "GIF": "gif",
        "BMP": "bmp",
        "TIFF": "tif",
    }.items():
        buffer = io.BytesIO()
        Image.new("RGB", (20, 10), "red").save(buffer, format_)
        facts = probe(Media("image", buffer.getvalue()), Limits())
        assert (facts.extension, facts.width, facts.height) == (extension, 20, 10)
    assert probe(Media("audio", wav(1)), Limits()).extension == "wav"
    video = probe(Media("video", mp4(1)), Limits())
    assert (video.extension, video.frames, video.width, video.seconds) == ("mp4", 5, 32, 0.5)
    with pytest.raises(Rejected, match="no audio in the file"):
        probe(Media("audio", mp4(1)), Limits())


def test_an_item_is_either_a_sample_or_a_rejection(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"texts": ["a"], "images": [data_url(png(1))]}, 3, "x", None, []])
    corpus = corpus_of(tmp_path, {"type": "interleaved", "path": "a.jsonl"})
    found = [
        item for chunk in corpus.sources[0].chunks(0, 9, 9999) for _, item in corpus.sources[0].read(chunk, None, 9999)
    ]
    assert [isinstance(item, Sample) for item in found] == [True, False, False, False, False]
