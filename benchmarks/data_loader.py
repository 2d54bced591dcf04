"""Loader throughput: plain webdataset, Energon with its own reader, and ours, on the same shards.

    python benchmarks/data_loader.py --blend SHARDS/blend.yaml --tokenizer SHARDS/tokenizer

Each reads the training split once, whole, with one worker process, so all handle the same samples; all cook, tokenize,
decode, pack and collate with the same functions. They differ in how samples reach these functions. Their repeats are
interleaved. CPU time is that of worker, decoder and main process together; unlike wall time it hardly depends on what
else the machine does. The second table takes one stream apart, stage by stage, in one process; what the decoder process
spends is not in it.
"""

import argparse
import os
import pickle
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import webdataset
import yaml
from megatron.energon import WorkerConfig, get_savable_loader
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from torch.utils.data import DataLoader, IterableDataset

from megatron_anyexperts.data.blend import open_blend
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.cookers import cook
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.faults import FaultLedger
from megatron_anyexperts.data.loader import MicrobatchLoader
from megatron_anyexperts.data.microbatch import Microbatch, collate
from megatron_anyexperts.data.packing import assemble_row, pack_rows, row_order
from megatron_anyexperts.data.samples import Planned, SampleError
from megatron_anyexperts.data.shard_reader import ShardReader
from megatron_anyexperts.data.task_encoder import FeedTaskEncoder
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MediaShape

ONE_WORKER = WorkerConfig(rank=0, world_size=1, num_workers=1)


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
    """What one would write with webdataset alone: tars in random turns, a shuffle buffer, then the shared stages."""

    def __init__(self, datasets: list, config: DataConfig, encoder: DocumentEncoder) -> None:
        self._datasets, self._config, self._encoder = datasets, config, encoder

    def __iter__(self) -> Iterator[dict[str, Any]]:
        streams = [(self._stream(entry.dataset), len(entry.dataset)) for entry in self._datasets]
        mixed = webdataset.RandomMix([stream for stream, _ in streams], [size for _, size in streams], longest=True)
        buffer: list[Planned] = []
        for planned in mixed:
            buffer += planned
            if len(buffer) >= self._config.data_packing_buffer:
                yield from fill_rows(buffer, self._encoder)
                buffer = []
        yield from fill_rows(buffer, self._encoder)

    def _stream(self, dataset: Any) -> Iterator[list[Planned]]:
        tars = [str(shard.path) for shard in dataset.shards]
        source = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(self._config.data_shuffle_buffer)
        for crude in source:
            try:
                yield list(self._encoder.plan(cook(dataset.subflavors["kind"], crude | {"__restore_key__": ()})))
            except SampleError:
                yield []


def one_epoch(blend: Path, folder: Path) -> Path:
    """Write the blend again, each dataset's training split once instead of weighted."""
    content = yaml.safe_load(blend.read_text())
    entries = [
        {key: value for key, value in entry.items() if key != "weight"}
        | {"path": str(blend.resolve().parent / entry["path"]), "repetitions": 1}
        for entry in content["splits"]["train"]["blend"]
    ]
    content["splits"] = {"train": {"blend_epochized": entries}}
    file = folder / "epoch.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def energon_loader(blend: Path, config: DataConfig, encoder: DocumentEncoder) -> Any:
    """Energon as it comes, around our task encoder."""
    datasets = open_blend(blend, "train", config, ONE_WORKER)
    dataset = FeedTaskEncoder(encoder, FaultLedger(10**9, 1.0)).build_train_datasets(
        datasets=datasets.datasets,
        worker_config=ONE_WORKER,
        batch_size=1,
        packing_buffer_size=config.data_packing_buffer,
        shuffle_buffer_size=config.data_shuffle_buffer,
        blend_mode=datasets.blend_mode,
        repeat=False,
    )
    return (Microbatch(**packed) for packed in get_savable_loader(dataset))


def measure(loader: Any) -> dict[str, float]:
    """Read a whole epoch; rates count from the first microbatch, by when every loader has filled its buffers."""
    samples = tokens = positions = 0
    begin = time.perf_counter()
    microbatches = iter(loader)
    first = next(microbatches)
    cpu, start = cpu_seconds(), time.perf_counter()
    for microbatch in microbatches:
        samples += sum(map(len, microbatch.sample_keys))
        tokens += int((microbatch["segment_ids"] > 0).sum())
        positions += microbatch["tokens"].numel()
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return {
        "samples": samples + sum(map(len, first.sample_keys)),
        "start s": start - begin,
        "samples/s": samples / wall,
        "tokens/s": tokens / wall,
        "samples/CPU s": samples / cpu,
        "fill": tokens / positions,
    }


def cpu_seconds() -> float:
    """CPU time of this process and of all its children."""
    # Workers may have ended and been waited for, or still live.
    ended = os.times()
    living = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(ended[:4]) + sum(times.user + times.system for times in living)


def compare(args: argparse.Namespace, config: DataConfig, shape: MediaShape, encoder: DocumentEncoder) -> None:
    """Print the first table."""
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        blend = one_epoch(Path(args.blend), Path(folder))
        for _ in range(args.repeats):
            plain = PlainStream(open_blend(blend, "train", config, ONE_WORKER).datasets, config, encoder)
            loader = DataLoader(plain, batch_size=None, num_workers=1, multiprocessing_context="fork")
            results["plain webdataset"].append(measure(loader))
            theirs = energon_loader(blend, config, encoder)
            results["Energon"].append(measure(theirs))
            del theirs
            ours = MicrobatchLoader(
                blend, config, shape, args.tokenizer, args.seq_length, 1, 0, 1, seed=1, endless=False
            )
            results["ours"].append(measure(ours))
            ours.close()
    medians = {
        peer: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for peer, runs in results.items()
    }
    base = medians["plain webdataset"]
    decimals = {"samples": 0, "tokens/s": 0, "fill": 3}
    print(f"{'':18}" + "".join(f"{name:>15}" for name in base) + f"{'wall ratio':>12}{'CPU ratio':>12}")
    for peer, row in medians.items():
        figures = "".join(f"{value:15.{decimals.get(name, 1)}f}" for name, value in row.items())
        ratios = (row[name] / base[name] for name in ("samples/s", "samples/CPU s"))
        print(f"{peer:18}{figures}" + "".join(f"{ratio:12.2f}" for ratio in ratios))


def take_apart(args: argparse.Namespace, config: DataConfig, encoder: DocumentEncoder) -> None:
    """Print CPU milliseconds per sample of each stage, over the first samples of every dataset."""
    spent: dict[str, float] = defaultdict(float)
    count, planned = 0, []
    for entry in open_blend(args.blend, "train", config, ONE_WORKER).datasets:
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
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a row")
    parser.add_argument(
        "--packing-buffer", type=int, default=128, help="samples among which to pack; measure over many of them"
    )
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each loader; the median counts")
    parser.add_argument("--samples", type=int, default=300, help="samples of each dataset in the second table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    config = DataConfig(
        data_streams=1,
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
