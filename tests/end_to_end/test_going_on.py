"""The same command again goes on with its run; a second training in a run at the same time is refused."""

import pytest

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.exit_codes import ExitCode
from megatron_anyexperts.survival.lock import RunLock
from megatron_anyexperts.survival.run_directory import Run
from tests.end_to_end.launch import Finished, pretrain

TWO, ONE = (("--save-interval", "1", "--exit-interval", steps) for steps in "21")


@pytest.fixture(scope="module")
def old(corpus, tmp_path_factory) -> Run:
    """A run of two iterations whose checkpoints hold no optimizer state."""
    return pretrain(corpus, tmp_path_factory.mktemp("old"), *TWO, "--no-save-optim").run


def trained(result: Finished) -> tuple[list[int], int]:
    """Iterations in the log, and the samples consumed by then."""
    return list(result.losses), runlog.read_metrics(result.run)[-1]["consumed_samples"]


def test_a_requeued_finetuning_goes_on_with_its_own_checkpoints(corpus, old, tmp_path):
    load, note = ("--load", str(old.checkpoints)), "acts on the first start only; the run goes on after its own"
    first = pretrain(corpus, tmp_path, *load, "--finetune", *TWO)
    assert trained(first) == ([1, 2], 8) and note not in first.output
    # The first start took the weights: those of a new model lose more.
    assert first.losses[1] < runlog.read_metrics(old)[0]["loss"] - 0.05
    again = pretrain(corpus, tmp_path, *load, "--finetune", *TWO)
    assert trained(again) == ([1, 2, 3, 4], 16)
    assert f"--load {old.checkpoints} {note} iteration 2" in again.output and f"--finetune {note}" in again.output
    loads = [event for event in runlog.read_events(first.run) if event["event"] == "load"]
    assert [event["iteration"] for event in loads] == [2, 2]
    assert [event["reason"].split(",")[0] for event in loads] == ["weights alone", "resumed"]


def test_a_checkpoint_without_optimizer_state_names_the_way_out(corpus, old):
    refused = pretrain(corpus, old.root, *ONE, succeed=False)
    said = "iteration 2 in {} holds no optimizer state (it was saved with --no-save-optim): add --no-load-optim"
    assert said.format(old.checkpoints) in refused.output
    assert trained(pretrain(corpus, old.root, *ONE, "--no-load-optim")) == ([1, 2, 3], 12)


def test_a_second_training_in_a_run_directory_is_refused(corpus, tmp_path):
    lock = RunLock(Run(tmp_path / "run").create())
    lock.acquire()
    try:
        refused = pretrain(corpus, tmp_path / "run", *ONE, succeed=False)
    finally:
        lock.release()
    assert refused.codes == [ExitCode.USAGE]
    assert f"{tmp_path / 'run'} is in use by process" in refused.output and "use another --run-dir" in refused.output
    assert runlog.read_events(refused.run) == []
