"""Loader throughput: plain webdataset, Energon with its own reader, and ours, on the same shards.

    python benchmarks/data_loader.py --blend SHARDS/blend.yaml --tokenizer SHARDS/tokenizer

All three cook, tokenize, decode, pack and collate with the same functions and in as many worker processes; they differ
in how samples reach these functions. Their repeats are interleaved. CPU time is that of workers and main process
together; unlike wall time it hardly depends on what else the machine does. The second table takes one stream apart,
stage by stage, in one process.
"""

import argparse
import pickle
import random
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import psutil
import torch
import webdataset
from megatron.energon import WorkerConfig, get_savable_loader
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from torch.utils.data import DataLoader, IterableDataset

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.cookers import cook
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.faults import FaultLedger
from megatron_anyexperts.data.loader import MicrobatchLoader, open_blend
from megatron_anyexperts.data.packing import assemble_row, collate, pack_rows, row_order
from megatron_anyexperts.data.samples import Planned, SampleError
from megatron_anyexperts.data.shard_reader import ShardReader
from megatron_anyexperts.data.task_encoder import FeedTaskEncoder
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MediaShape


def fill_rows(samples: list[Planned], encoder: DocumentEncoder) -> Iterator[dict[str, Any]]:
    """The stages after planning: pack, decode, assemble, collate; microbatches of one row."""
    packed = pack_rows([sample.size for sample in samples], encoder.limits)
    rows = [[samples[index] for index in row] for row in packed]
    for index in row_order([[sample.__key__ for sample in row] for row in rows]):
        row = [encoder.decode(sample) for sample in rows[index]]
        pad = encoder.vocabulary.special["<|pad|>"]
        arrays = assemble_row(row, encoder.limits[0], encoder.shape, pad)
        yield collate([arrays], [[sample.__key__ for sample in row]])


class PlainStream(IterableDataset):
    """What one would write with webdataset alone: weighted tars, a shuffle buffer, then the shared stages."""

    def __init__(self, datasets: list, config: DataConfig, encoder: DocumentEncoder) -> None:
        self._datasets, self._config, self._encoder = datasets, config, encoder

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        streams = [self._stream(entry.dataset) for entry in self._datasets]
        weights = [entry.weight for entry in self._datasets]
        rng = random.Random(worker.id)
        buffer: list[Planned] = []
        while True:
            [stream] = rng.choices(streams, weights)
            buffer.extend(next(stream))
            if len(buffer) >= self._config.data_packing_buffer:
                yield from fill_rows(buffer, self._encoder)
                buffer = []

    def _stream(self, dataset: Any) -> Iterator[list[Planned]]:
        tars = [str(shard.path) for shard in dataset.shards]
        for crude in webdataset.WebDataset(tars, resampled=True).shuffle(self._config.data_shuffle_buffer):
            try:
                yield list(self._encoder.plan(cook(dataset.subflavors["kind"], crude | {"__restore_key__": ()})))
            except SampleError:
                yield []


def energon_loader(args: argparse.Namespace, config: DataConfig, encoder: DocumentEncoder) -> Any:
    """Energon as it comes, around our task encoder."""
    workers = WorkerConfig(rank=0, world_size=1, num_workers=args.workers)
    datasets = open_blend(args.blend, "train", config, workers)
    dataset = FeedTaskEncoder(encoder, FaultLedger(10**9, 1.0)).build_train_datasets(
        datasets=datasets.datasets,
        worker_config=workers,
        batch_size=1,
        packing_buffer_size=config.data_packing_buffer,
        shuffle_buffer_size=config.data_shuffle_buffer,
        blend_mode=datasets.blend_mode,
    )
    return get_savable_loader(dataset)


def measure(loader: Any, torch_iterator: Any, warm_up: int, microbatches: int) -> dict[str, float]:
    """Samples and tokens per second of wall time, and samples per second of CPU time, after a warm-up."""
    iterator = iter(loader)
    for _ in range(warm_up):
        next(iterator)
    owner = torch_iterator(iterator)
    processes = [psutil.Process(), *(psutil.Process(worker.pid) for worker in owner._workers)]
    samples = tokens = 0
    cpu, start = _cpu_seconds(processes), time.perf_counter()
    for _ in range(microbatches):
        microbatch = next(iterator)
        samples += sum(map(len, microbatch["sample_keys"]))
        tokens += int((microbatch["segment_ids"] > 0).sum())
    wall, cpu = time.perf_counter() - start, _cpu_seconds(processes) - cpu
    fill = tokens / (microbatches * microbatch["tokens"].numel())
    return {"samples/s": samples / wall, "tokens/s": tokens / wall, "samples/CPU s": samples / cpu, "fill": fill}


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def compare(args: argparse.Namespace, config: DataConfig, shape: MediaShape, encoder: DocumentEncoder) -> None:
    """Print the first table."""
    alone = WorkerConfig(rank=0, world_size=1, num_workers=args.workers)
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(args.repeats):
        plain = PlainStream(open_blend(args.blend, "train", config, alone).datasets, config, encoder)
        loader = DataLoader(plain, batch_size=None, num_workers=args.workers, multiprocessing_context="fork")
        results["plain webdataset"].append(measure(loader, lambda it: it, args.warm_up, args.microbatches))
        theirs = energon_loader(args, config, encoder)
        results["Energon"].append(measure(theirs, lambda _, it=theirs: it._iterator, args.warm_up, args.microbatches))
        ours = MicrobatchLoader(args.blend, config, shape, args.tokenizer, args.seq_length, 1, 0, 1, seed=1)
        results["ours"].append(measure(ours, lambda _, it=ours: it._loader._iterator, args.warm_up, args.microbatches))
        ours.close()
        del loader, theirs
    names = ("samples/s", "tokens/s", "samples/CPU s", "fill")
    medians = {peer: {n: statistics.median(run[n] for run in runs) for n in names} for peer, runs in results.items()}
    print(f"{'':18}" + "".join(f"{name:>15}" for name in names) + f"{'wall ratio':>12}{'CPU ratio':>12}")
    base = medians["plain webdataset"]
    for peer, row in medians.items():
        ratios = (row["samples/s"] / base["samples/s"], row["samples/CPU s"] / base["samples/CPU s"])
        figures = f"{row['samples/s']:15.1f}{row['tokens/s']:15.0f}{row['samples/CPU s']:15.1f}{row['fill']:15.3f}"
        print(f"{peer:18}{figures}{ratios[0]:12.2f}{ratios[1]:12.2f}")


def take_apart(args: argparse.Namespace, config: DataConfig, encoder: DocumentEncoder) -> None:
    """Print CPU milliseconds per sample of each stage, over the first samples of every dataset."""
    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    spent: dict[str, float] = defaultdict(float)
    count, planned = 0, []
    for entry in open_blend(args.blend, "train", config, alone).datasets:
        dataset = entry.dataset
        kind, size = dataset.subflavors["kind"], min(args.samples, dataset.shards[0].count)
        theirs, ours = (ShardInfosITarReader(dataset.path, dataset.shards) for _ in range(2))
        ours = ShardReader(ours, 0, 0.0)
        plain = iter(webdataset.WebDataset([str(dataset.shards[0].path)], shardshuffle=False))
        for index in range(size):
            _timed(spent, "read: webdataset", lambda it=plain: next(it))
            _timed(spent, "read: Energon", lambda it=theirs, i=index: it[i])
            crude = _timed(spent, "read: ours", lambda it=ours, i=index: it[i])
            document = _timed(spent, "cook", lambda k=kind, c=crude: cook(k, c))
            try:
                planned += _timed(spent, f"plan {kind}", lambda d=document: list(encoder.plan(d)))
            except SampleError:
                continue
        count += size
    for sample in planned:
        _timed(spent, "decode images and video", lambda s=sample: encoder.decode(s))
    start = time.process_time()
    rows = list(fill_rows(planned, encoder))
    spent["pack, assemble, collate"] = time.process_time() - start - spent["decode images and video"]
    _timed(spent, "pickle", lambda: [pickle.dumps(row) for row in rows])
    print("\nCPU ms per sample, one process")
    for stage, seconds in spent.items():
        print(f"  {stage:30}{1000 * seconds / count:8.3f}")


def _timed(spent: dict[str, float], stage: str, call: Any) -> Any:
    start = time.process_time()
    try:
        return call()
    finally:
        spent[stage] += time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blend", required=True, help="Energon blend with dataset weights")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer directory")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a row")
    parser.add_argument(
        "--packing-buffer", type=int, default=128, help="samples among which to pack; measure over many of them"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each loader; the median counts")
    parser.add_argument("--warm-up", type=int, default=8, help="microbatches before measuring; fills the buffers")
    parser.add_argument("--microbatches", type=int, default=80, help="microbatches measured in each run")
    parser.add_argument("--samples", type=int, default=300, help="samples of each dataset in the second table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    config = DataConfig(
        data_streams=args.workers,
        data_shuffle_buffer=200,
        data_packing_buffer=args.packing_buffer,
        data_error_budget=10**9,
        data_error_rate=1.0,
    )
    shape = MediaShape()
    encoder = DocumentEncoder(config, shape, Vocabulary(args.tokenizer), args.seq_length)
    compare(args, config, shape, encoder)
    take_apart(args, config, encoder)


if __name__ == "__main__":
    main()
