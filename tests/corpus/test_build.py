"""Raw files to shards, end to end."""

import json
import shutil

import pytest
import webdataset

from megatron_anyexperts.corpus.build import build, rebuild_shard
from megatron_anyexperts.corpus.corpus import CorpusError, load_corpus
from megatron_anyexperts.corpus.workers import Share
from megatron_anyexperts.data.vocabulary import Vocabulary
from tests.corpus.raw import corpus_of, png, raw_corpus, tree_bytes, write


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(corpus, output, manifest) of a small corpus of every kind, built in this process."""
    root = tmp_path_factory.mktemp("raw")
    corpus = load_corpus(raw_corpus(root))
    output = root / "out"
    return corpus, output, build(corpus, output, Share(), workers=0, quiet=True)


def test_counts_add_up_and_every_bad_item_is_listed_with_its_reason(built):
    _, output, manifest = built
    assert manifest["samples"] == 96 and manifest["items"] == 102
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert {(line["origin"], line["reason"]) for line in lines} == {
        ("images:broken.png", "unreadable image"),
        ("images:uncaptioned.png", "no caption beside the file"),
        ("images:blank.png", "empty text"),
        ("text:latin.txt", "text is not UTF-8"),
        ("speech:en/silent.wav", "empty audio file"),
        next((line["origin"], line["reason"]) for line in lines if line["reason"] == "exact duplicate"),
    }
    assert manifest["tokens"]["text"] > 0 and manifest["tokens"]["audio"] == 16 * 3


def test_plain_webdataset_reads_every_sample_with_its_media(built):
    _, output, manifest = built
    read = {}
    for entry in manifest["shards"]:
        pipeline = webdataset.WebDataset(str(output / entry["shard"]), shardshuffle=False)
        for sample in pipeline:
            meta = json.loads(sample["json"])
            assert all(sample[name] for name in meta["media"])
            assert sample["__key__"] not in read
            read[sample["__key__"]] = meta
    kinds = [meta["kind"] for meta in read.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "image_text": 16,
        "audio_text": 16,
        "video_text": 4,
        "text": 32,
        "interleaved": 12,
        "chat": 16,
    }
    page = next(meta for meta in read.values() if meta["kind"] == "interleaved")
    assert [segment["type"] for segment in page["segments"]] == ["text", "image", "text"]
    assert page["segments"][1]["media"] == page["media"][0] == "0.png"
    spoken = next(meta for meta in read.values() if meta["kind"] == "audio_text")
    assert spoken["language"] == "en" and spoken["seconds"] == 0.2


def test_media_keep_their_bytes_unless_a_change_is_asked_for(built):
    _, output, _ = built
    samples = webdataset.WebDataset(str(output / "image/train/shard-000000.tar"), shardshuffle=False)
    originals = {png(number) for number in range(16)}
    assert all(sample["png"] in originals for sample in samples)


def test_energon_reads_each_sample_of_the_blend_once(built):
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        TextSample,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_val_dataset,
        stateless,
    )

    @stateless
    def cook(sample):
        return TextSample(**basic_sample_keys(sample), text=sample["json"].decode())

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(cook)]
        decoder = None

    _, output, manifest = built
    dataset = get_val_dataset(
        output / "blend.yaml",
        split_part="train",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        task_encoder=Encoder(),
    )
    keys = [key for batch in get_savable_loader(dataset) for key in batch.__key__]
    train = sum(splits["train"]["samples"] for splits in manifest["kinds"].values())
    assert len(keys) == len(set(keys)) == train


def test_energon_lint_passes_on_every_kind(built):
    from click.testing import CliRunner
    from megatron.energon.tools.lint import command

    _, output, manifest = built
    for kind in manifest["kinds"]:
        result = CliRunner().invoke(command, [str(output / kind), "--parallel", "0"])
        assert result.exit_code == 0, f"{kind}: {result.output}"


def test_any_partition_of_the_work_gives_the_same_bytes(built):
    corpus, output, _ = built
    expected = tree_bytes(output)
    for parts in ([2, 1, 0], [0], [1, 0]):
        other = output.parent / f"out-{len(parts)}"
        for part in parts:
            build(corpus, other, Share(part, max(parts) + 1), workers=0, quiet=True)
        assert tree_bytes(other) == expected


def test_worker_processes_give_the_same_bytes(built):
    corpus, output, _ = built
    other = output.parent / "out-workers"
    build(corpus, other, Share(), workers=2, quiet=True)
    assert tree_bytes(other) == tree_bytes(output)


def test_a_finished_build_is_left_alone(built):
    corpus, output, manifest = built
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar*")}
    assert build(corpus, output, Share(), workers=0, quiet=True) == manifest
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.tar*")} == times


def test_one_damaged_shard_is_rebuilt_alone(built):
    corpus, output, _ = built
    copy = output.parent / "out-rebuild"
    shutil.copytree(output, copy)
    expected = tree_bytes(copy)
    name = "image/train/shard-000000.tar"
    (copy / name).write_bytes(b"damage")
    others = {path: path.stat().st_mtime_ns for path in copy.rglob("*.tar") if path != copy / name}
    rebuild_shard(corpus, copy, name)
    assert tree_bytes(copy) == expected
    assert {path: path.stat().st_mtime_ns for path in others} == others
    with pytest.raises(CorpusError, match="no shard 'image/train/shard-000009.tar'; it has"):
        rebuild_shard(corpus, copy, "image/train/shard-000009.tar")


def test_validation_samples_stay_when_data_is_added(tmp_path):
    def held_out(scale):
        root = tmp_path / str(scale)
        corpus = load_corpus(raw_corpus(root, scale))
        manifest = build(corpus, root / "out", Share(), workers=0, quiet=True)
        origins = {"train": set(), "val": set()}
        for entry in manifest["shards"]:
            for sample in webdataset.WebDataset(str(root / "out" / entry["shard"]), shardshuffle=False):
                origins[entry["shard"].split("/")[1]].add(sample["__key__"])
        return origins

    small, large = held_out(1), held_out(2)
    assert small["val"] and small["val"] < large["val"] and small["train"] < large["train"]


def test_a_file_that_changes_between_the_readings_is_rejected(tmp_path, monkeypatch):
    from megatron_anyexperts.corpus import build as module

    for number in range(6):
        write(tmp_path / f"text/{number}.txt", f"Document {number}.")
    corpus = corpus_of(tmp_path, {"type": "text_folder", "path": "text"}, validation_fraction=0)

    def meddle(*arguments):
        write(tmp_path / "text/2.txt", "Something else.")
        (tmp_path / "text/4.txt").unlink()
        return plan(*arguments)

    plan = module.make_plan
    monkeypatch.setattr(module, "make_plan", meddle)
    manifest = build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["samples"] == 4
    assert manifest["rejected"] == {"changed since it was scanned": 1, "missing file": 1}


def test_a_given_tokenizer_is_used_and_counted_with(built, tmp_path):
    _, output, _ = built
    write(tmp_path / "text/a.txt", "Some words to count.")
    corpus = corpus_of(tmp_path, {"type": "text_folder", "path": "text"}, tokenizer={"path": str(output / "tokenizer")})
    manifest = build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["tokens"]["text"] == len(Vocabulary(output / "tokenizer").encode("Some words to count."))


def test_token_limit_and_size_limits_reject_with_the_figures(tmp_path):
    write(tmp_path / "text/long.txt", "word " * 400)
    write(tmp_path / "text/short.txt", "word")
    for name, side in (("large", 40), ("bomb", 64)):
        write(tmp_path / f"images/{name}.png", png(1, side, side))
        write(tmp_path / f"images/{name}.txt", name)
    corpus = corpus_of(
        tmp_path,
        {"type": "text_folder", "path": "text"},
        {"type": "image_folder", "path": "images"},
        limits={"max_tokens": 100, "max_pixels": 1000},
    )
    manifest = build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)
    assert manifest["samples"] == 1
    assert manifest["rejected"] == {"too many pixels": 2, "too many tokens": 1}
    rejected = (tmp_path / "out/rejected.jsonl").read_text()
    assert "40 x 40, limit 1000" in rejected
    assert "4096 pixels" in rejected and rejected.count("limit 1000") == 2


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"type": "text_folder", "path": "nowhere"}], "nowhere does not exist; point --root at"),
        ([{"type": "text_folder", "path": "empty"}], "empty holds nothing that a text_folder can read"),
        ([{"type": "image_folder", "path": "bad"}], "none of 1 items can be used: unreadable image"),
    ],
)
def test_unusable_sources_end_in_one_clear_message(tmp_path, sources, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "bad/a.png", b"x")
    write(tmp_path / "bad/a.txt", "x")
    with pytest.raises(CorpusError, match=message):
        build(corpus_of(tmp_path, *sources), tmp_path / "out", Share(), workers=0, quiet=True)


def test_optional_sources_may_be_missing(tmp_path):
    write(tmp_path / "text/a.txt", "Something.")
    corpus = corpus_of(
        tmp_path,
        {"type": "text_folder", "path": "text"},
        {"type": "audio_folder", "path": "speech", "optional": True},
    )
    assert build(corpus, tmp_path / "out", Share(), workers=0, quiet=True)["samples"] == 1


def test_another_description_for_the_same_folder_is_refused(built, tmp_path):
    corpus, output, _ = built
    with pytest.raises(CorpusError, match="holds a build with another seed"):
        build(corpus.model_copy(update={"seed": 1}), output, Share(), workers=0, quiet=True)
    write(tmp_path / "mine/thesis.txt", "Do not touch.")
    with pytest.raises(CorpusError, match="was not made by this tool"):
        build(corpus, tmp_path / "mine", Share(), workers=0, quiet=True)
