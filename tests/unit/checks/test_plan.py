"""The command `anyexperts plan`, and the table of docs/planning.md."""

import json
import runpy
from types import SimpleNamespace

import pytest

from megatron_anyexperts.checks.plan_config import vocabulary_rows
from megatron_anyexperts.commands.plan import main
from tests.end_to_end.launch import ROOT
from tests.feed.corpus import write_tokenizer

LING = ["--config", "ling_mini_2_0_anyexperts", "--nodes", "8"]


def test_ling_on_64_gpus(capsys):
    assert main([*LING, "--tokens", "2.2e11", "--price-per-gpu-hour", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    mine, best = answer["configuration"], answer["best"]
    assert mine["layout"]["expert"] == 8 and mine["layout"]["data"] == 64 and mine["refused"] is None
    gib = mine["gib_per_gpu"]
    parts = ("static", "activations", "logits", "exchange")
    assert gib["text_rows"] == pytest.approx(sum(gib[part] for part in parts))
    assert gib["text_rows"] < gib["picture_rows"] < mine["room_gib"]
    speed = mine["speed"]
    assert speed["step_seconds"] == pytest.approx(sum(mine["seconds"].values()))
    assert speed["step_seconds"] >= best["speed"]["step_seconds"]
    assert speed["tokens_per_second"] == pytest.approx(4096 * 4096 / speed["step_seconds"])
    assert speed["days"] == pytest.approx(2.2e11 / speed["tokens_per_second"] / 86_400)
    assert speed["cost"] == pytest.approx(speed["days"] * 24 * 64 * 2)
    assert 0 < speed["mfu"] < 1 and answer["neighbours"] and answer["refused"]["does not fit"] > 0
    assert any("vocabulary" in note for note in answer["assumptions"])
    page, saved = (ROOT / "docs/cluster.md").read_text(encoding="utf-8"), mine["save"]
    assert f"step_seconds: {speed['step_seconds']:.0f}," in page
    assert f"{saved['stored_gib']:.0f} GiB | a rank writes {saved['shard_gib']:.1f} GiB; a save takes " in page
    assert f"takes {saved['host_gib']:.0f} to {saved['host_most_gib']:.0f} GiB of each node's host memory" in page


def test_a_named_tokenizer_gives_the_rows_of_the_embedding(tmp_path):
    write_tokenizer(tmp_path)
    flags = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2, "padded_vocab_size": None}
    args = SimpleNamespace(**flags, vocab_size=None, tokenizer_model=tmp_path)
    assert vocabulary_rows(args, None) == (512, None)
    assert vocabulary_rows(args, 513) == (768, None)


def test_what_does_not_fit_ends_with_1(capsys):
    assert main([*LING, "--seq-length", "16384"]) == 1
    text = capsys.readouterr().out
    assert "refused: needs" in text and "the fastest of" in text and "its neighbours" in text


@pytest.mark.parametrize(
    "words, why",
    [
        (["--config", "demo", "--nodes", "0"], "--nodes 0"),
        (["--config", "demo", "--nodes", "1", "--pictures", "2"], "--pictures 2"),
        (["--config", "demo", "--nodes", "1", "--price-per-gpu-hour", "2"], "needs --tokens"),
        (["--config", "demo", "--nodes", "1", "--context-parallel-size", "2"], "context-parallel-size 2"),
        (["--config", "demo", "--nodes", "1", "--vision-num-layers", "0", "--pictures", "0.5"], "no vision encoder"),
        (["--config", "no_such", "--nodes", "1"], "no_such"),
    ],
)
def test_what_cannot_be_planned_ends_with_2(words, why, capsys):
    assert main(words) == 2
    assert why in capsys.readouterr().err


def test_the_published_table_of_docs_is_what_the_benchmark_prints(capsys):
    runpy.run_path(str(ROOT / "benchmarks/plan_published.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) > 5 and [line for line in printed if line not in page] == []
