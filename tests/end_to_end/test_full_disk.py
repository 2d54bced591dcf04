"""A full disk costs a training its checkpoints, which its exit code says, or its logs, which end nothing."""

import pytest

from megatron_anyexperts.survival import checkpoints, runlog
from megatron_anyexperts.survival.exit_codes import ExitCode
from megatron_anyexperts.survival.run_directory import Run
from tests.end_to_end.launch import pretrain
from tests.full_disk import fill, small_disk


@pytest.mark.parametrize(
    ("flags", "failed"),
    [(("--train-iters", "2"), [2]), (("--save-interval", "1", "--max-failed-saves", "2"), [1, 2])],
    ids=["the last save", "save after save"],
)
def test_a_run_that_cannot_save_is_not_finished(corpus, tmp_path, flags, failed):
    run = Run(tmp_path / "run").create()
    with small_disk(run.checkpoints, 1 << 16):
        result = pretrain(corpus, run.root, *flags, succeed=False)
    assert result.codes == [ExitCode.NOT_SAVED]
    assert list(result.losses) == [1, 2]
    events = [(event["event"], event.get("iteration")) for event in runlog.read_events(run)]
    assert events == [("start", None), *(("save_failed", iteration) for iteration in failed), ("not_saved", None)]


def test_a_full_disk_for_all_but_checkpoints_ends_no_training(corpus, tmp_path):
    run = Run(tmp_path / "run")
    run.root.mkdir()
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        for folder in (run.logs, run.tensorboard, run.samples):
            (disk / folder.name).mkdir()
            folder.symlink_to(disk / folder.name)
        run.create()
        fill(disk)
        result = pretrain(corpus, run.root, "--train-iters", "2")
        assert result.losses == {}
    for log in (run.events, run.metrics, run.samples / "rank0000.jsonl", f"TensorBoard in {run.tensorboard}"):
        assert f"WARNING: {log}: 1 write(s) lost, training goes on" in result.output, log
    assert "WARNING: heartbeat of rank 0: 1 write(s) lost" in result.output
    assert checkpoints.select_resume(run.checkpoints).iteration == 2
