"""Every source: what it makes of good and bad records; reading again gives the same items."""

import base64
import gzip
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.sample import Rejected, Sample
from megatron_anyexperts.corpus.workers import Share
from tests.corpus.raw import corpus_of, data_url, items, png, raw_corpus, wav, write, write_lines


def one(root, record, **source):
    """The single item of a single record."""
    write_lines(root / "one.jsonl", [record])
    [item] = items(corpus_of(root, {"path": "one.jsonl"} | source))
    return item


def reasons(found):
    return [item.reason if isinstance(item, Rejected) else "good" for item in found]


def test_reading_chosen_positions_gives_exactly_those_items_for_every_source(tmp_path):
    from megatron_anyexperts.corpus.corpus import load_corpus

    corpus = load_corpus(raw_corpus(tmp_path))
    for source in corpus.sources:
        for chunk in source.chunks(0, 8, 300):
            everything = dict(source.read(chunk, None, 10**9))
            chosen = set(list(everything)[::3])
            again = dict(source.read(chunk, chosen, 10**9))
            assert again.keys() == chosen
            for position, item in again.items():
                assert type(item) is type(everything[position]) and item.origin == everything[position].origin
                if isinstance(item, Sample):
                    assert item.content_hash() == everything[position].content_hash()


def test_captions_by_language_make_a_sample_each(tmp_path):
    write(tmp_path / "images/a.png", png(1))
    write(tmp_path / "images/a.json", json.dumps({"en": "A lion.", "fr": "Un lion.", "de": "Ein Löwe."}))
    found = items(corpus_of(tmp_path, {"type": "image_folder", "path": "images", "languages": ["en", "de"]}))
    assert [item.fields for item in found] == [
        {"caption": "A lion.", "language": "en"},
        {"caption": "Ein Löwe.", "language": "de"},
    ]
    assert found[0].group_hash() == found[1].group_hash()


@pytest.mark.parametrize("sidecar", ['["a"]', "{", '{"en": 3}', '{"xx": "a"}', "[" * 100_000])
def test_unusable_sidecars_are_rejected(tmp_path, sidecar):
    write(tmp_path / "images/a.png", png(1))
    write(tmp_path / "images/a.json", sidecar)
    [item] = items(corpus_of(tmp_path, {"type": "image_folder", "path": "images", "languages": ["en"]}))
    assert isinstance(item, Rejected)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 100_000])
def test_every_json_line_is_read_once_wherever_the_file_is_cut(tmp_path, chunk_bytes):
    texts = [f"Line {number} " + "x" * (number % 50) for number in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    write(tmp_path / "a.jsonl", "\n\n".join(lines[:30]) + "\r\n" + "\n".join(lines[30:]))
    corpus = corpus_of(tmp_path, {"type": "text_table", "path": "a.jsonl"}, chunk_bytes=chunk_bytes)
    assert [item.fields["text"] for item in items(corpus)] == texts


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.csv", "a.tsv", "a.ndjson"])
def test_record_files_of_every_format_hold_the_same_records(tmp_path, name):
    records = [{"text": f'Row {number}, "quoted"', "lang": "en"} for number in range(300)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    table = pyarrow.Table.from_pylist(records)
    path = tmp_path / "rows" / name
    path.parent.mkdir()
    if name.endswith(".gz"):
        write(path, gzip.compress(lines))
    elif name.endswith(".zst"):
        write(path, pyarrow.compress(lines, codec="zstd", asbytes=True))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=128)
    elif name.endswith("sv"):
        mark = "\t" if name.endswith(".tsv") else ","
        rows = "".join(f'"{r["text"].replace(chr(34), chr(34) * 2)}"{mark}en\n' for r in records)
        write(path, f"text{mark}lang\n" + rows)
    else:
        write(path, lines)
    found = items(corpus_of(tmp_path, {"type": "text_table", "path": "rows", "language_field": "lang"}))
    assert [item.fields for item in found] == [{"text": r["text"], "language": "en"} for r in records]


def test_damaged_record_files_give_what_precedes_the_damage_and_one_rejection(tmp_path):
    whole = gzip.compress("".join(json.dumps({"text": f"{n} " * 50}) + "\n" for n in range(2000)).encode(), 1)
    write(tmp_path / "cut.jsonl.gz", whole[: len(whole) // 2])
    found = reasons(items(corpus_of(tmp_path, {"type": "text_table", "path": "cut.jsonl.gz"})))
    assert found.count("good") > 100 and found[-1] == "damaged compressed file" and len(set(found)) == 2
    write(tmp_path / "bad.parquet", b"PAR1 rubbish PAR1")
    found = reasons(items(corpus_of(tmp_path, {"type": "text_table", "path": "bad.parquet"})))
    assert found == ["damaged Parquet file"] or found == []


def test_an_unreadable_parquet_file_is_one_rejection(tmp_path):
    write(tmp_path / "bad.parquet", b"rubbish")
    found = items(corpus_of(tmp_path, {"type": "text_table", "path": "bad.parquet"}))
    assert reasons(found) == ["damaged Parquet file"]


def test_a_gzip_bomb_is_stopped(tmp_path):
    write(tmp_path / "bomb.jsonl.gz", gzip.compress((b"x" * 2**20 + b"\n") * 100, 6))
    found = reasons(items(corpus_of(tmp_path, {"type": "text_table", "path": "bomb.jsonl.gz"})))
    assert found[-1] == "decompression bomb" and set(found[:-1]) == {"damaged JSON"}


def test_a_line_above_the_limit_is_rejected_and_the_next_one_read(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x" * 5000}, {"text": "short"}])
    corpus = corpus_of(tmp_path, {"type": "text_table", "path": "a.jsonl"}, limits={"max_media_bytes": 1000})
    assert reasons(items(corpus)) == ["too many bytes", "good"]


@pytest.mark.parametrize(
    "value",
    [
        "pictures/a.png",
        data_url(png(1)),
        {"path": "pictures/a.png"},
        {"bytes": None, "path": "pictures/a.png"},
        {"url": data_url(png(1))},
        {"data": base64.b64encode(png(1)).decode()},
    ],
)
def test_a_table_takes_media_as_path_data_url_or_mapping(tmp_path, value):
    write(tmp_path / "pictures/a.png", png(1))
    source = {"type": "media_table", "media_field": "image", "text_field": "caption"}
    item = one(tmp_path, {"image": value, "caption": " A thing. "}, **source)
    assert item.media[0].data == png(1) and item.fields == {"caption": "A thing."}


def test_a_parquet_table_holds_media_bytes(tmp_path):
    rows = [{"audio": {"bytes": wav(n), "path": None}, "text": f"Tone {n}"} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = {"type": "media_table", "kind": "audio", "media_field": "audio", "text_field": "text", "path": "a.parquet"}
    assert [item.media[0].data for item in items(corpus_of(tmp_path, source))] == [wav(n) for n in range(3)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("/etc/passwd", "media path leaves its folder"),
        ("../secret.png", "media path leaves its folder"),
        ("link.png", "media path leaves its folder"),
        ("missing.png", "missing file"),
        ("x" * 5000, "unusable media path|unreadable file"),
        ("a/" * 2100 + "b.png", "unusable media path|unreadable file"),
        ("nul\0.png", "unusable media path"),
        ("line\nbreak.png", "missing file"),
        (".", "not a regular file"),
        ("pipe", "not a regular file"),
        ("", "no media path"),
        (7, "no media path"),
        (None, "no media path"),
        ({}, "no media"),
        ("https://example.org/a.png", "remote media are not fetched"),
        ("data:image/png,plain", "data URL is not base64"),
        ("data:image/png;base64,@@", "damaged base64"),
    ],
)
def test_unusable_media_references_are_rejected(tmp_path, value, reason):
    import os

    root = tmp_path / "inside"
    write(tmp_path / "secret.png", png(1))
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(root / "pipe")
    item = one(root, {"image": value, "caption": "x"}, type="media_table", media_field="image", text_field="caption")
    assert isinstance(item, Rejected) and item.reason in reason.split("|"), item


@pytest.mark.parametrize(
    "record",
    [
        {
            "segments": [
                {"type": "text", "text": "Before"},
                {"type": "image", "media": "a.png"},
                {"type": "text", "text": "after"},
            ]
        },
        {"texts": ["Before", None, "after"], "images": [None, "a.png", None]},
        {"text_list": ["Before", "after"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
    ],
)
def test_interleaved_documents_of_three_forms_are_the_same_sample(tmp_path, record):
    write(tmp_path / "a.png", png(1))
    item = one(tmp_path, record, type="interleaved")
    assert item.fields["segments"] == [
        {"type": "text", "text": "Before"},
        {"type": "image", "media": 0},
        {"type": "text", "text": "after"},
    ]
    assert [medium.data for medium in item.media] == [png(1)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"texts": ["a"], "images": []}, "texts and images differ in length"),
        ({"segments": [{"type": "smell"}]}, "unknown segment"),
        ({"segments": ["x"]}, "unknown segment"),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "b", "matched_text_index": 4}]},
            "matched_text_index outside",
        ),
        ({"other": 1}, "no interleaved document"),
    ],
)
def test_malformed_documents_are_rejected(tmp_path, record, reason):
    assert one(tmp_path, record, type="interleaved").reason.startswith(reason)


QUESTION = [{"type": "image", "media": 0}, {"type": "text", "text": "What is this?"}]


@pytest.mark.parametrize(
    "record",
    [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": "A thing."},
            ],
        },
        {
            "images": ["a.png"],
            "conversations": [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A thing."}],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_url(png(1))}},
                        {"type": "text", "text": "What is this?"},
                    ],
                },
                {"role": "assistant", "content": "A thing."},
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is this?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]},
            ]
        },
    ],
)
def test_chats_of_every_form_are_the_same_sample(tmp_path, record):
    write(tmp_path / "a.png", png(1))
    item = one(tmp_path, record, type="chat")
    assert item.fields["messages"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]},
    ]
    assert item.media[0].data == png(1)


def test_an_openai_message_holds_sound(tmp_path):
    sound = {"data": base64.b64encode(wav(1)).decode(), "format": "wav"}
    record = {
        "messages": [
            {"role": "developer", "content": "Listen."},
            {"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]},
            {"role": "assistant", "content": "A tone."},
        ]
    }
    item = one(tmp_path, record, type="chat")
    assert item.media[0].data == wav(1) and item.fields["messages"][0]["role"] == "system"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
            "tag without a medium",
        ),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "unknown role"),
        ({"conversations": []}, "no conversation"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no answer in the conversation"),
        ({"messages": [{"role": "user", "content": 3}]}, "turn without content"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "unknown part of a message"),
        ({"image": "a.png", "messages": [{"role": "assistant", "content": "x"}]}, "media without a user turn"),
    ],
)
def test_malformed_chats_are_rejected(tmp_path, record, reason):
    assert one(tmp_path, record, type="chat").reason == reason


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_tars_of_others_are_read(tmp_path):
    members = {
        "00000.jpg": png(1),
        "00000.json": json.dumps({"caption": "From JSON."}).encode(),
        "00001.png": png(2),
        "00001.txt": b"From text.",
        "00002.txt": b"No medium.",
        "00003.png": png(3),
    }
    write(tmp_path / "shards/a.tar", tar(members))
    found = items(corpus_of(tmp_path, {"type": "webdataset", "path": "shards"}))
    assert [item.fields for item in found[:3]] == [
        {"caption": "From JSON."},
        {"caption": "From text."},
        {"text": "No medium."},
    ]
    assert found[3].reason == "no text in the sample"


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "garbage in the middle", "no end mark"])
def test_a_damaged_tar_gives_what_precedes_the_damage_and_one_rejection(tmp_path, damage):
    whole = tar({f"{number:04d}.txt": f"Text {number}".encode() * 200 for number in range(20)})
    middle = 10 * 3 * 512
    data = {
        "cut in a member": whole[: 9 * 5 * 512 + 700],
        "cut in a header": whole[: 9 * 5 * 512 + 100],
        "garbage in the middle": whole[:middle] + b"\x7f" * 5120 + whole[middle + 5120 :],
        "no end mark": whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512],
    }[damage]
    write(tmp_path / "shards/a.tar", data)
    found = reasons(items(corpus_of(tmp_path, {"type": "webdataset", "path": "shards"})))
    assert found.count("good") >= 3 and found.count("damaged or truncated shard") == 1 == len(found) - found.count(
        "good"
    )


def keys_below(folder) -> set[str]:
    found = set()
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as file:
            found |= {member.name.partition(".")[0] for member in file}
    return found


def test_own_shards_come_back_as_they_were_and_can_be_filtered(tmp_path):
    from megatron_anyexperts.corpus.corpus import load_corpus

    first = build(load_corpus(raw_corpus(tmp_path)), tmp_path / "first", Share(), workers=0, quiet=True)
    keys = {}
    for name, options in {"all": {}, "chats": {"kinds": ["chat"]}, "english": {"languages": ["en"]}}.items():
        (tmp_path / name).mkdir()
        corpus = corpus_of(tmp_path, {"type": "webdataset", "path": "first"} | options, name=name)
        manifest = build(corpus, tmp_path / f"out-{name}", Share(), workers=0, quiet=True)
        assert manifest["items"] == first["samples"]
        keys[name] = keys_below(tmp_path / f"out-{name}")
    assert keys["all"] == keys_below(tmp_path / "first")
    assert len(keys["chats"]) == 16 and len(keys["english"]) == 32
