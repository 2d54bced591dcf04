"""What training sees when shards, samples, storage or workers fail."""

import json
import os
import queue
import signal
import threading
import time
from unittest.mock import patch

import pytest
from torch.utils.data._utils import pin_memory

from megatron_anyexperts.data.faults import DataFeedError, ErrorBudgetExceeded
from megatron_anyexperts.data.loader import describe_failure
from tests import deadly
from tests.feed import corpus


@pytest.fixture
def text_blend(tmp_path):
    return corpus.build(tmp_path / "shards", {"text": 80})


def keys(loader, microbatches: int) -> set[str]:
    return {key for _ in range(microbatches) for row in next(loader).sample_keys for key in row}


def names(start: int, stop: int) -> set[str]:
    return {f"text/text-{index:05d}" for index in range(start, stop)}


def test_a_truncated_and_a_missing_shard_cost_their_samples_only(make_loader, text_blend):
    shards = text_blend.parent / "text"
    (shards / "shard-002.tar").write_bytes((shards / "shard-002.tar").read_bytes()[:3000])
    (shards / "shard-005.tar").unlink()
    loader = make_loader(text_blend, data_error_budget=10_000, data_error_rate=1.0)
    seen = keys(loader, 40)
    assert loader.ledger.lost >= 8
    gone = {f"text/text-{index:05d}" for index in range(40, 48)}
    assert not seen & gone
    # Samples 0..71 are for training; shard 2 keeps what lies before the cut.
    assert {f"text/text-{index:05d}" for index in range(72)} - gone - {
        f"text/text-{i:05d}" for i in range(16, 24)
    } <= seen


def test_bad_samples_are_counted_and_skipped(make_loader, tmp_path):
    samples = [corpus.crude("image_text", index) for index in range(40)]
    for index in (3, 17):
        samples[index]["jpg"] = b"not a picture"
    samples[9]["json"]["caption"] = " "
    corpus.write_dataset(tmp_path / "image_text", "image_text", samples, 8)
    loader = make_loader(corpus.write_epoch_blend(tmp_path, ["image_text"]), endless=False)
    seen = {key for microbatch in loader for row in microbatch.sample_keys for key in row}
    assert len(seen) == 32 - 3  # the last shard is held out
    assert loader.ledger.lost == 3


def test_too_many_bad_samples_stop_the_run_with_the_last_key(make_loader, tmp_path):
    samples = [corpus.crude("text", index) | {"json": {"text": ""}} for index in range(64)]
    corpus.write_dataset(tmp_path / "text", "text", samples, 8)
    loader = make_loader(corpus.write_epoch_blend(tmp_path, ["text"]), data_error_budget=5)
    with pytest.raises(ErrorBudgetExceeded, match=r"\d+ samples lost, more than data_error_budget=5; .* text-000\d\d "):
        next(loader)
    with pytest.raises(DataFeedError, match="has failed before"):
        next(loader)


def test_a_killed_worker_is_a_clear_stop_and_saving_does_not_hang(make_loader, text_blend):
    loader = make_loader(text_blend)
    next(loader)
    with pytest.raises(RuntimeError, match="is killed by signal"):  # torch tells the main process wherever it is
        os.kill(loader._loader._iterator._workers[0].pid, signal.SIGKILL)
        time.sleep(30)
    with pytest.raises(DataFeedError, match="no state to save"):
        loader.save_state()
    with pytest.raises(DataFeedError, match="a data worker of dp_rank=0 failed: .*restart the job"):
        for _ in range(100):
            next(loader)
    with pytest.raises(DataFeedError, match="no state to save"):
        loader.save_state()


@pytest.mark.slow
def test_storage_that_hangs_stops_the_run_within_the_watchdogs_time(make_loader, text_blend):
    shard = text_blend.parent / "text/shard-003.tar"
    shard.unlink()
    os.mkfifo(shard)  # opening it waits for a writer that never comes
    loader = make_loader(text_blend, data_watchdog_seconds=2.0)
    started = time.monotonic()
    with pytest.raises(DataFeedError, match="a data worker of dp_rank=0 failed: .*restart the job"):
        for _ in range(100):
            next(loader)
    assert 2 < time.monotonic() - started < 60
    with pytest.raises(DataFeedError, match="no state to save"):
        loader.save_state()


def test_workers_outlive_the_sigterm_that_asks_for_a_checkpoint(make_loader, text_blend):
    loader = make_loader(text_blend)
    for _ in range(4):
        next(loader)
    workers = loader._loader._iterator._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(8):
        next(loader)
    assert loader.save_state().rounds == 3
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_a_picture_that_kills_its_decoder_costs_one_sample_and_stays_out_after_a_restart(
    make_loader, tmp_path, monkeypatch
):
    samples = [corpus.crude("image_text", index) for index in range(40)]
    corpus.write_dataset(tmp_path / "clean/image_text", "image_text", samples, 8)
    samples[17]["jpg"] += deadly.MARK
    corpus.write_dataset(tmp_path / "image_text", "image_text", samples, 8)
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/sitecustomize.py").write_text(deadly.SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/plugin", prepend=os.pathsep)
    blend, listed = corpus.write_blend(tmp_path, {"image_text": 1.0}), tmp_path / "run/quarantine.jsonl"

    def read(loader, rounds: int) -> list[set[str]]:
        return [keys(loader, 4) for _ in range(rounds)]

    first = make_loader(blend, quarantine=listed)
    before = read(first, 2)
    state = first.state_for_checkpoint()
    after = read(first, 6)
    assert first.ledger.lost >= 1
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {(line["key"], line["stage"]) for line in lines} == {("image_text/image_text-00017", "decode")}
    assert "signal 11 (SIGSEGV)" in lines[0]["reason"]
    again = make_loader(blend, quarantine=listed)
    again.restore(state)
    assert read(again, 6) == after
    # All that is missing beside the same data without the fault is the one sample.
    undamaged = make_loader(corpus.write_blend(tmp_path / "clean", {"image_text": 1.0}))
    whole = read(undamaged, 8)
    assert [row - {"image_text/image_text-00017"} for row in whole] == before + after


def test_a_failure_to_pin_memory_is_not_a_workers():
    class Unpinnable:
        def pin_memory(self):
            raise RuntimeError("out of lockable memory")

    given, taken, done = queue.Queue(), queue.Queue(), threading.Event()
    given.put((0, Unpinnable()))
    place = (given, taken, 0, done, "cuda")
    with patch("torch.accelerator.set_device_index"):  # the thread is torch's own; there may be no accelerator
        thread = threading.Thread(target=pin_memory._pin_memory_loop, args=place)
        thread.start()
        failure = taken.get(timeout=60)[1]
        done.set()
        thread.join()
    with pytest.raises(RuntimeError) as raised:
        failure.reraise()
    expected = "copying a microbatch to pinned host memory of dp_rank=3 failed: RuntimeError: out of lockable memory"
    assert describe_failure(raised.value, 3) == expected


def test_a_missing_blend_is_named(make_loader, tmp_path):
    with pytest.raises(FileNotFoundError, match="blend.yaml does not exist; build it with data_tools/build_shards.py"):
        make_loader(tmp_path / "blend.yaml")
