"""The training loader of one data-parallel rank: endless microbatches, and state that any layout can resume."""

import functools
import gc
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from megatron.energon import SavableDataLoader, WorkerConfig, get_savable_loader
from megatron.energon.task_encoder.base import TaskEncoder

from megatron_anyexperts.console import say
from megatron_anyexperts.data import elastic, scheduled_blend, shard_reader
from megatron_anyexperts.data.blend import open_blend
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.faults import DataFeedError, ErrorBudgetExceeded, FaultLedger, Quarantine
from megatron_anyexperts.data.microbatch import Microbatch
from megatron_anyexperts.data.mixture_schedule import MixtureScheduleError
from megatron_anyexperts.data.task_encoder import FeedTaskEncoder
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.survival.signals import die_with_parent

_CHECKPOINT_SECONDS = 10.0  # a resumed stream repeats at most this much work
_COLLECT_EVERY = 100  # microbatches; Energon's 10 cost a hundredth of the time, and Python collects by itself as well


class MicrobatchLoader:
    """Iterator over the microbatches of one data-parallel rank (see `microbatch.FIELDS`).

    Args:
        blend: Energon dataset or metadataset file with a ``train`` split; may be an ``msc://`` address.
        config: feed settings.
        shape: media geometry.
        tokenizer: Hugging Face tokenizer directory.
        seq_length: positions of a row.
        micro_batch_size: rows of a microbatch.
        dp_rank, dp_size: place in the data-parallel group; all ranks of one model replica pass the same.
        seed: of the sample order.
        endless: False stops after one pass over the data (each rank at its own count); then the blend must not
            use weights.
        quarantine: file that lists samples which killed a decoder, for all ranks and restarts of a run.
        rows_per_step: global batch size, by which a mixture schedule counts steps; None when it changes.
        announces: False on processes that read the same as another one: stages of the mixture are said once.

    Raises:
        FileNotFoundError: blend or tokenizer are missing.
        MixtureScheduleError: the weights of the blend, or its schedule, cannot be followed.
        ValueError: `dp_size` does not divide the streams, or media limits exceed the row.
    """

    def __init__(
        self,
        blend: str | Path,
        config: DataConfig,
        shape: MediaShape,
        tokenizer: str | Path,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        endless: bool = True,
        quarantine: Path | None = None,
        rows_per_step: int | None = None,
        announces: bool = True,
    ) -> None:
        self._streams = elastic.streams_per_rank(config.data_streams, dp_size)
        self._micro_batch_size, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size
        self.ledger = FaultLedger(config.data_error_budget, config.data_error_rate)
        vocabulary = Vocabulary(tokenizer)
        encoder = DocumentEncoder(config, shape, vocabulary, seq_length, Quarantine(quarantine))
        task_encoder = FeedTaskEncoder(encoder, self.ledger)
        workers = WorkerConfig(
            rank=dp_rank,
            world_size=dp_size,
            num_workers=self._streams,
            seed_offset=seed,
            global_error_handler=self.ledger.handle,
        )
        datasets = open_blend(blend, "train", config, workers)
        self.fingerprint = {
            **config.order_fields(),
            "seq_length": seq_length,
            "micro_batch_size": micro_batch_size,
            "seed": seed,
            "media": repr(shape),
            "tokenizer": hashlib.sha256(vocabulary.fingerprint_bytes).hexdigest()[:16],
            "datasets": _describe(datasets.datasets),
        }
        self._announces = announces and dp_rank == 0
        self._rows_per_step = rows_per_step
        self._mixture_at = functools.partial(scheduled_blend.mixture_of, datasets, config, micro_batch_size)
        self.schedule = self._mixture_at(rows_per_step)
        self._loader = self._build(task_encoder, datasets, workers, config, endless)
        self._endless = endless
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._emitted = 0
        self._rounds_before = 0
        self._restored: elastic.RankState | None = None
        self._failed = False

    def _build(
        self, task_encoder: TaskEncoder, datasets: Any, workers: WorkerConfig, config: DataConfig, endless: bool
    ) -> SavableDataLoader:
        dataset = task_encoder.build_train_datasets(
            datasets=datasets.datasets,
            worker_config=workers,
            batch_size=self._micro_batch_size,
            batch_drop_last=False,
            packing_buffer_size=config.data_packing_buffer,
            shuffle_buffer_size=config.data_shuffle_buffer or None,
            blend_mode=datasets.blend_mode,
            repeat=endless,
        )
        shard_reader.install(dataset, config.data_storage_retries, config.data_storage_backoff)
        if endless:
            by_weight = not scheduled_blend.of_repetitions(datasets)
            dataset = scheduled_blend.install(dataset, self.schedule if by_weight else None)
        loader = get_savable_loader(
            dataset,
            checkpoint_every_sec=_CHECKPOINT_SECONDS,
            watchdog_timeout_seconds=config.data_watchdog_seconds,
            fail_on_timeout=True,
            gc_collect_every_n_steps=_COLLECT_EVERY,
        )
        if not loader.can_restore_sample():
            raise DataFeedError("a stage of the task encoder is not @stateless: the state could be saved, not restored")
        # torch seeds the workers from the process's own generator unless it is given another one; a resumed run, which
        # has restored that generator, would then go on one draw further. Energon seeds its workers by itself.
        loader.generator = torch.Generator()
        self._worker_init = loader.worker_init_fn = _WorkerInit(loader.worker_init_fn)
        return loader

    def __iter__(self) -> "MicrobatchLoader":
        return self

    def __next__(self) -> Microbatch:
        """The next microbatch.

        Raises:
            ErrorBudgetExceeded: too many samples were lost.
            DataFeedError: a worker process died, hung or raised.
        """
        if self._failed:
            raise DataFeedError("the data feed has failed before or was closed; restart the job from its checkpoint")
        try:
            if self._iterator is None:
                # A codec that is left in a reference cycle keeps its threads. A worker's garbage collector
                # would wait for those threads for ever, because a fork does not copy them: clear them away here.
                gc.collect()
                self._iterator = iter(self._loader)
                if len(self.schedule.starts) > 1 and self._rounds_before == 0:
                    self._announce_stage()
            microbatch = Microbatch(**next(self._iterator))
        except StopIteration:
            raise
        except ErrorBudgetExceeded as error:
            self._failed = True
            raise ErrorBudgetExceeded(str(error).strip().splitlines()[-1]) from error
        except Exception as error:
            self._failed = True
            raise DataFeedError(
                f"{describe_failure(error, self._dp_rank)}; restart the job from its checkpoint"
            ) from error
        self._emitted += 1
        if self._emitted % self._streams == 0:
            self._announce_stage()
        return microbatch

    def _announce_stage(self) -> None:
        rounds = self._rounds_before + self._emitted // self._streams
        stage = self.schedule.stage_at(rounds)
        if self._announces and rounds == self.schedule.starts[stage]:
            number = f"{stage + 1} of {len(self.schedule.starts)}"
            say(f"mixture stage {number} begins: {self.schedule.describe(stage)}")

    def save_state(self) -> elastic.RankState:
        """State of this rank's streams, between training steps.

        Raises:
            DataFeedError: the feed has failed; Energon would wait for the dead worker for ever.
            ValueError: the rank is in the middle of a round, or a one-pass stream has read all its samples.
        """
        if self._failed or self._emitted and not all(worker.is_alive() for worker in self._loader._iterator._workers):
            raise DataFeedError("a failed data feed has no state to save; restart from the last checkpoint")
        if self._emitted == 0:
            return self._restored or elastic.RankState(0, None)
        if self._emitted % self._streams:
            raise ValueError(
                f"{self._emitted} microbatches are not whole rounds of this rank's {self._streams} streams; save "
                "between training steps, with a global batch that is a multiple of micro_batch_size x data_streams"
            )
        rounds = self._rounds_before + self._emitted // self._streams
        state = elastic.split_state(self._loader.save_state_rank(), rounds)
        if not self._endless and any(map(elastic.has_ended, state.streams or ())):
            raise ValueError("a stream of this one-pass loader has read its last sample and could only start over")
        return state

    def state_for_checkpoint(self, group: torch.distributed.ProcessGroup | None = None) -> dict[str, Any]:
        """State of all streams, the same on every rank and for every layout; a collective over the data-parallel group.

        Args:
            group: the data-parallel group, in which this process has rank `dp_rank`; not needed for one rank.

        Returns:
            Plain values and uint8 tensors, see `elastic.merge_states`.
        """
        own = self.save_state()
        states = [own] * self._dp_size
        if self._dp_size > 1:
            torch.distributed.all_gather_object(states, own, group=group)
        return elastic.merge_states(states, self.fingerprint, self._micro_batch_size, self.mixture_state())

    def mixture_state(self) -> dict[str, Any]:
        """What a checkpoint holds of the schedule of the mixture, as plain values."""
        return {"stages": self.schedule.stages(), "rows_per_step": self._rows_per_step}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state_for_checkpoint` was called, in whatever layout that was; call before the first batch.

        Raises:
            ValueError: the settings differ from those saved, or the streams cannot be divided.
            DataFeedError: microbatches were already drawn.
        """
        if self._iterator is not None:
            raise DataFeedError("restore the data state before the first microbatch is drawn")
        mine = elastic.rank_state(state, self.fingerprint, self._dp_rank, self._dp_size)
        self._continue_mixture(state["mixture"], state["rounds"])
        self._restored = elastic.split_state(mine, state["rounds"])
        self._rounds_before = state["rounds"]
        self._loader.restore_state_rank(mine)

    def _continue_mixture(self, saved: dict[str, Any], rounds: int) -> None:
        if saved["rows_per_step"] != self._rows_per_step:
            try:
                self._mixture_at(None)
            except MixtureScheduleError as error:
                was = saved["rows_per_step"] or "of changing size"
                raise ValueError(f"{error} (a step was {was} rows until now, and is {self._rows_per_step})") from None
            self._rows_per_step = None
        if self.schedule.check_continues(saved["stages"], rounds) and self._announces:
            say("mixture stages to come are others than in the checkpoint")

    def close(self) -> None:
        """Stop the worker processes; the loader gives nothing afterwards."""
        self._worker_init.stop()
        self._failed = True
        if (torch_iterator := self._loader._iterator) is not None:
            torch_iterator._shutdown_workers()


def describe_failure(error: Exception, dp_rank: int) -> str:
    """Where the feed of a data-parallel rank failed and why, from what torch's loader raised."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Torch hands on what its threads and workers raised with the place in the first line and the cause in the last.
    pinning = "pin memory thread" in lines[0].lower()
    where = "copying a microbatch to pinned host memory" if pinning else "a data worker"
    return f"{where} of dp_rank={dp_rank} failed: {lines[-1]}"


def _describe(datasets: list) -> str:
    """What the blend consists of, independent of where it lies."""
    content = [
        [entry.weight, entry.repetitions, entry.dataset.subflavors]
        + [[shard.name, shard.count] for shard in entry.dataset.shards]
        for entry in datasets
    ]
    samples = sum(len(entry.dataset) for entry in datasets)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return f"{len(datasets)} datasets, {samples} samples, content {digest}"


def _set(flag: Any) -> None:
    flag.value = 1


class _WorkerInit:
    """Prepares a forked worker process, then runs Energon's own initialisation.

    Schedulers signal the whole process group. The main process answers SIGTERM by saving a checkpoint, for which it
    needs living workers: they heed the signal only once the main process is `stopping`.
    """

    def __init__(self, inner: Callable[[int], None]) -> None:
        self._inner = inner
        self._owner = os.getpid()
        self._stopping = multiprocessing.get_context("fork").Value("b", 0, lock=False)
        # At exit multiprocessing runs its finalizers first and then sends its children SIGTERM and waits for them.
        self._finalizer = Finalize(None, _set, (self._stopping,), exitpriority=0)

    def __call__(self, worker: int) -> None:
        die_with_parent(self._owner)  # torch looks for the parent's death only after Energon's initialisation
        signal.signal(signal.SIGTERM, self._on_sigterm)
        for each in (signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        self._inner(worker)

    def stop(self) -> None:
        self._finalizer()

    def _on_sigterm(self, _signal: int, _frame: Any) -> None:
        if self._stopping.value or os.getppid() != self._owner:
            os._exit(0)
