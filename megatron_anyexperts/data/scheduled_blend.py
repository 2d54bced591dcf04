"""Energon's blend with weights that depend on how far its stream is, and the counter that says how far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.energon import WorkerConfig
from megatron.energon.flavors.base_dataset import SavableDataset, add_sample_restore_key
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDatasetList
from megatron.energon.wrappers import BlendDataset
from megatron.energon.wrappers.base import BaseWrapperDataset

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.mixture_schedule import (
    MixtureSchedule,
    MixtureScheduleError,
    constant,
    dataset_name,
    load_schedule,
)


class EmittedMicrobatches(BaseWrapperDataset):
    """Counts what a stream has emitted; part of the stream's state, so independent of prefetching and layout.

    Args:
        dataset: yields the microbatches of a stream.
    """

    _savable_fields = ("emitted",)

    def __init__(self, dataset: SavableDataset, worker_config: WorkerConfig):
        super().__init__(dataset, worker_config=worker_config)
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self.emitted = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Any]:
        for microbatch in self.dataset:
            self.emitted += 1
            yield microbatch

    def config(self) -> dict[str, Any]:
        return self.dataset.config()


class ScheduledBlend(BlendDataset):
    """Draws like `BlendDataset`, each sample with the weights of the microbatch that its stream is preparing.

    A dataset of weight 0 is not read and keeps its place. The datasets must be endless.
    """

    _schedule: MixtureSchedule
    _counter: EmittedMicrobatches

    @classmethod
    def convert(cls, blend: BlendDataset, schedule: MixtureSchedule, counter: EmittedMicrobatches) -> None:
        """Make one of a blend in place: buffers above it hold references to it besides `datasets`."""
        blend.__class__ = cls
        blend._schedule, blend._counter = schedule, counter

    def __iter__(self) -> Iterator[Any]:
        present = torch.tensor([float(dataset.worker_has_samples()) for dataset in self.datasets])
        iterators = [iter(dataset) if here else None for dataset, here in zip(self.datasets, present, strict=True)]
        position, weights = None, present
        while True:
            if position != self._counter.emitted:
                position = self._counter.emitted
                weights = torch.tensor(self._schedule.weights_at(position), dtype=torch.float32) * present
            index = self._worker_rng.choice_idx(probs=weights)
            yield add_sample_restore_key(next(iterators[index]), index, src=self)


def of_repetitions(blend: LoadedDatasetList) -> bool:
    """Whether a blend says how often each dataset is read, and not with which weight."""
    return blend.blend_mode is DatasetBlendMode.SAMPLE_REPETITIONS


def mixture_of(
    blend: LoadedDatasetList, config: DataConfig, micro_batch_size: int, rows_per_step: int | None
) -> MixtureSchedule:
    """The weights with which the datasets of a blend are drawn.

    Raises:
        MixtureScheduleError: the schedule of `config` does not fit the blend, or a weight of the blend cannot be drawn.
    """
    names = [dataset_name(entry.dataset.subflavors or {}) for entry in blend.datasets]
    weights = [1.0 if entry.weight is None else float(entry.weight) for entry in blend.datasets]
    unscheduled = constant(names, weights)
    if config.data_mixture_schedule is None:
        if 0 in weights:
            name = names[weights.index(0)]
            raise MixtureScheduleError(f"{name} has weight 0 in the blend and no schedule raises it; leave it out")
        return unscheduled
    if of_repetitions(blend):
        raise MixtureScheduleError(
            f"{config.data_mixture_schedule}: the blend is a blend_epochized, which has repetitions and no weights; "
            "use `blend` and `weight`"
        )
    rows = micro_batch_size * config.data_streams
    return load_schedule(config.data_mixture_schedule, names, weights, rows, rows_per_step)


def install(dataset: SavableDataset, schedule: MixtureSchedule | None) -> SavableDataset:
    """Let the blend below `dataset` follow a schedule; return what stands for `dataset` then.

    A single dataset needs no blend and stays as it is.

    Args:
        dataset: what the streams of this rank yield.
        schedule: None for a blend of repetitions, whose datasets end and which draws by what is left.

    Raises:
        MixtureScheduleError: a stream has no sample of the datasets of a stage.
    """
    counter = EmittedMicrobatches(dataset, dataset.worker_config)
    blend = counter._find_wrapped_dataset(BlendDataset)
    if blend is not None and schedule is not None:
        _check_streams(blend, schedule)
        ScheduledBlend.convert(blend, schedule, counter)
    return counter


def _check_streams(blend: BlendDataset, schedule: MixtureSchedule) -> None:
    """Small datasets do not reach every stream: refuse stages that would leave one with nothing, name the others."""
    config = blend.worker_config
    streams = range(max(1, config.num_workers))
    empty = [[dataset.len_worker(stream) == 0 for stream in streams] for dataset in blend.datasets]
    for stage, weights in enumerate(schedule.weights):
        used = [lacks for lacks, weight in zip(empty, weights, strict=True) if weight]
        for stream, lacks in enumerate(zip(*used, strict=True)):
            if all(lacks):
                raise MixtureScheduleError(
                    f"stream {config.rank * len(streams) + stream} of {config.world_size * len(streams)} has no sample "
                    f"of mixture stage {stage + 1} of {len(schedule.weights)} ({schedule.describe(stage)}): their "
                    "datasets are too small; add data or other datasets to it, or begin a run of fewer --data-streams"
                )
    for name, lacks in zip(schedule.names, empty, strict=True):
        if any(lacks):
            print(
                f"WARNING: {name} is so small that {sum(lacks)} of the {len(streams)} streams of dp_rank={config.rank} "
                "have no sample of it; there the other datasets of the blend take its share",
                flush=True,
            )
