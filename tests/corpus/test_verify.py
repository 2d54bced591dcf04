"""Verification finds each kind of damage and names the shard."""

import json
import shutil

import pytest

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.corpus import load_corpus
from megatron_anyexperts.corpus.verify import check_shard, corpus_problems, read_manifest
from megatron_anyexperts.corpus.workers import Share
from tests.corpus.media import encoded_audio, tone
from tests.corpus.raw import corpus_of, raw_corpus, write

SHARD = "interleaved/train/shard-000000.tar"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    build(load_corpus(raw_corpus(root)), root / "out", Share(), workers=0, quiet=True)
    return root / "out"


@pytest.fixture
def corpus(original, tmp_path):
    shutil.copytree(original, tmp_path / "out")
    return tmp_path / "out"


def problems(corpus):
    manifest = read_manifest(corpus)
    findings = [check_shard(corpus, entry) for entry in manifest["shards"]]
    damaged = {finding.shard: "; ".join(finding.problems) for finding in findings if finding.problems}
    return damaged, "; ".join(corpus_problems(corpus, manifest, findings))


def test_a_sound_corpus_has_no_problems(corpus):
    assert problems(corpus) == ({}, "")


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(b""), "is no complete tar"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is no complete tar"),
        (lambda path: flip(path, 150), "is no complete tar"),
        (lambda path: flip(path, path.read_bytes().index(b"IDAT") + 10), "unreadable image"),
        (lambda path: flip(path, path.read_bytes().index(b'"kind"')), "has no usable JSON"),
        (lambda path: flip(path.with_name(path.name + ".idx"), 9), "index does not point"),
        (lambda path: path.with_name(path.name + ".idx").unlink(), "index cannot be read"),
        (lambda path: path.with_suffix(".manifest.json").unlink(), "has no usable manifest"),
        (lambda path: path.with_suffix(".manifest.json").write_text("{}"), "has no usable manifest"),
    ],
)
def test_damage_to_a_shard_is_found_and_nothing_else_is_blamed(corpus, damage, expected):
    damage(corpus / SHARD)
    damaged, _ = problems(corpus)
    assert list(damaged) == [SHARD] and expected in damaged[SHARD]


def test_problems_of_the_whole_corpus_are_found(corpus):
    shutil.copy(corpus / SHARD, corpus / "interleaved/train/shard-000099.tar")
    (corpus / "chat/.nv-meta/.info.json").write_text('{"shard_counts": {}}')
    (corpus / "text/.nv-meta/.info.json").unlink()
    (corpus / "tokenizer/tokenizer.json").write_text("{}")
    _, found = problems(corpus)
    for message in (
        "shard-000099.tar is not in the manifest",
        "metadata of chat lists other shards",
        "metadata of text cannot be read",
        "tokenizer.json is missing or another one",
    ):
        assert message in found


def test_a_key_in_two_shards_is_found(corpus):
    manifest = read_manifest(corpus)
    first, second = [entry for entry in manifest["shards"] if entry["shard"].startswith("text/train")][:2]
    shutil.copy(corpus / first["shard"], corpus / second["shard"])
    _, found = problems(corpus)
    assert f"is in {first['shard']} and in {second['shard']}" in found


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"shards": 1})])
def test_a_damaged_manifest_is_no_corpus(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="holds no finished corpus"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("codec", "container"), [("aac", "mp4"), ("libopus", "matroska")])
def test_sound_in_a_container_for_films_is_sound(tmp_path, codec, container):
    samples = tone(0.5, 48000, "mono")
    write(tmp_path / "audio/a.m4a", encoded_audio(codec, container, 48000, "mono", samples))
    write(tmp_path / "audio/a.txt", "A tone.")
    corpus = corpus_of(tmp_path, {"type": "audio_folder", "path": "audio"}, validation_fraction=0)
    manifest = build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["samples"] == 1, manifest["rejected"]
    assert problems(tmp_path / "out") == ({}, "")
