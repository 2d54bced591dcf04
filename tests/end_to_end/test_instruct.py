"""Instruction tuning starts from pretrained weights, tunes what it is told to, and resumes like pretraining."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_anyexperts.models.build import part_of
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.training.step_stats import read_sample_log
from tests.end_to_end.launch import ROOT, Finished, pretrain
from tests.feed import corpus as small_corpus

ENTRY = ROOT / "pretrain/instruct_tune.py"
PARTS = ("--freeze-audio-encoder", "--freeze-importance", "--lr-scale-vision-encoder", "1e-6")


@pytest.fixture(scope="module")
def chats(corpus, tmp_path_factory) -> Path:
    """Conversations about pictures, and the tokenizer of the pretraining corpus."""
    folder = tmp_path_factory.mktemp("chats")
    small_corpus.build(folder / "shards", {"chat": 80})
    shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory) -> Path:
    run = pretrain(corpus, tmp_path_factory.mktemp("pretrained"), "--exit-interval", "3").run
    return run.checkpoints


def tune(chats: Path, run_dir: Path, *flags: str, **options) -> Finished:
    return pretrain(chats, run_dir, *PARTS, *flags, entry=ENTRY, **options)


def weights(checkpoints: Path, iteration: int, file: Path) -> dict[str, torch.Tensor]:
    """Model tensors of a checkpoint."""
    dcp_to_torch_save(checkpoints / f"iter_{iteration:07d}", file)
    state = torch.load(file, weights_only=False)
    return {
        name: value
        for name, value in state.items()
        if name.startswith(("vision.", "audio.", "language_model.")) and isinstance(value, torch.Tensor)
    }


def test_tuning_moves_each_part_as_told_and_resumes_exactly(chats, pretrained, tmp_path):
    start = ("--pretrained-checkpoint", str(pretrained))
    whole = tune(chats, tmp_path / "whole", *start, "--eval-interval", "3")
    tune(chats, tmp_path / "broken", *start, "--exit-interval", "3")
    resumed = tune(chats, tmp_path / "broken", *start)

    assert list(whole.losses) == [1, 2, 3, 4, 5, 6]
    assert resumed.losses == whole.losses
    assert read_sample_log(resumed.run.samples) == read_sample_log(whole.run.samples)

    before = weights(pretrained, 3, tmp_path / "before.pt")
    after = weights(whole.run.checkpoints, 6, tmp_path / "after.pt")
    moved: dict[str, list[float]] = {}
    for name in before.keys() & after.keys():
        if before[name].is_floating_point():
            change = (before[name].float() - after[name].float()).abs().max().item()
            moved.setdefault(part_of(name), []).append(change)
    assert max(moved["audio_encoder"]) == 0.0
    assert max(moved["vision_encoder"]) < 1e-6 < 1e-4 < max(moved["vision_projector"])
    assert max(moved["decoder"]) > 1e-4

    answers = [event for event in runlog.read_events(whole.run) if event["event"] == "answers"]
    assert [event["iteration"] for event in answers][:2] == [3, 6]
    assert all(0 <= share <= 1 for event in answers for share in event["exact_match"].values())


def test_tuning_from_nothing_is_refused(chats, tmp_path):
    assert "--pretrained-checkpoint" in tune(chats, tmp_path / "run", succeed=False).output
    missing = tune(chats, tmp_path / "run", "--pretrained-checkpoint", str(tmp_path), succeed=False)
    assert "holds no latest_checkpointed_iteration.txt" in missing.output
