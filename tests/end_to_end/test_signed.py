"""With a key only checkpoints that its holder signed are loaded, by training and by tools."""

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.manifest import iteration_directory, seal
from megatron_anyexperts.survival.signing import KEY
from tests.end_to_end.launch import ROOT, pretrain

SECRET = "a key of this test alone"
FLAGS = ("--lr-decay-style", "constant", "--save-interval", "1", "--change-schedule", "--train-iters")


def test_only_signed_checkpoints_are_loaded(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    run = pretrain(corpus, tmp_path / "run", *FLAGS, "2")
    files = [path for path in run.run.root.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in files) and SECRET not in run.output
    assert list(pretrain(corpus, tmp_path / "run", *FLAGS, "3").losses) == [1, 2, 3]

    monkeypatch.delenv(KEY)
    seal(iteration_directory(run.run.checkpoints, 3))  # as whoever has changed its files would

    monkeypatch.setenv(KEY, SECRET)
    prompt = ("--prompt", "a red boat", "--anyexperts-dispatch-eps", "inf")
    refused = pretrain(corpus, tmp_path / "run", *prompt, entry=ROOT / "pretrain/generate.py", succeed=False)
    assert refused.codes == [2]
    assert "iter_0000003 may not be loaded: its manifest is not signed, and a key is set" in refused.output
    assert list(pretrain(corpus, tmp_path / "run", *FLAGS, "4").losses) == [1, 2, 3, 4]
    [fallback] = [event for event in runlog.read_events(run.run) if event["event"] == "fallback"]
    assert fallback["iteration"] == 2 and "not signed" in fallback["reason"]
    assert (run.run.checkpoints / "damaged-iter_0000003").is_dir()

    monkeypatch.setenv(KEY, "short")
    refused = pretrain(corpus, tmp_path / "run", *FLAGS, "4", succeed=False)
    assert refused.codes == [2] and f"{KEY}: a key of 5 bytes" in refused.output
