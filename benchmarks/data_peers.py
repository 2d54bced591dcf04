"""Peers of the data path on one corpus, from one run: other loaders beside ours, another shard writer beside ours.

    pip install --target PEERS --no-deps --requirement benchmarks/peers.txt
    PYTHONPATH=PEERS python benchmarks/data_peers.py --blend SHARDS/blend.yaml --tokenizer SHARDS/tokenizer

Loaders: plain webdataset, LitData and MosaicML Streaming read the same samples, each in its own format, shuffled, with
one worker; all then cook, tokenize, decode, pack and collate with the same functions, so they differ in how samples
reach these. Writers: pictures with captions from a folder, one
process. img2dataset's writer gets the bytes and writes; our build also decodes each picture, rejects, hashes, looks for
duplicates, counts tokens, shuffles and writes indexes; the second row is its writing alone, from a finished scan.

Repeats are interleaved and medians count. CPU time is that of all processes; it hardly depends on what else runs. A
peer that is not installed is left out with a line.
"""

import argparse
import importlib.util
import pickle
import shutil
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_loader import ONE_WORKER, PlainStream, cpu_seconds, fill_rows, measure, one_epoch
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from megatron_anyexperts.corpus.build import build
from megatron_anyexperts.corpus.corpus import load_corpus
from megatron_anyexperts.corpus.workers import Share
from megatron_anyexperts.data.blend import open_blend
from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.cookers import cook
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.loader import MicrobatchLoader
from megatron_anyexperts.data.samples import Planned, SampleError
from megatron_anyexperts.data.shard_reader import ShardReader
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MediaShape

RATES = ("samples/s", "samples/CPU s")


def installed(package: str) -> bool:
    """Whether a peer is there; says so when it is not."""
    if importlib.util.find_spec(package) is None:
        print(f"{package} is not installed and left out; see benchmarks/peers.txt", file=sys.stderr)
        return False
    return True


def crude_samples(datasets: list) -> Iterator[bytes]:
    """Every training sample, pickled with its kind, as a peer stores it."""
    for entry in datasets:
        reader = ShardReader(ShardInfosITarReader(entry.dataset.path, entry.dataset.shards), 0, 0.0)
        for index in range(len(reader)):
            sample = {name: value for name, value in reader[index].items() if not name.startswith("__sources")}
            yield pickle.dumps((entry.dataset.subflavors["kind"], sample))


class PeerStream(IterableDataset):
    """Samples of another loader, then the stages that all share."""

    def __init__(self, samples: Callable[[], Iterator[bytes]], config: DataConfig, encoder: DocumentEncoder) -> None:
        self._samples, self._config, self._encoder = samples, config, encoder

    def __iter__(self) -> Iterator[dict[str, Any]]:
        buffer: list[Planned] = []
        for data in self._samples():
            kind, crude = pickle.loads(data)
            try:
                buffer += self._encoder.plan(cook(kind, crude | {"__restore_key__": ()}))
            except SampleError:
                continue
            if len(buffer) >= self._config.data_packing_buffer:
                yield from fill_rows(buffer, self._encoder)
                buffer = []
        yield from fill_rows(buffer, self._encoder)


def write_litdata(samples: list[bytes], folder: Path) -> Callable[[], Iterator[bytes]]:
    """Store samples in LitData's format; returns what reads them in a worker."""
    from litdata.streaming.dataset import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=1 << 26)
    for index, sample in enumerate(samples):
        writer.add_item(index, {"sample": sample})
    writer.done()
    writer.merge()

    def read() -> Iterator[bytes]:
        for item in StreamingDataset(str(folder), shuffle=True, seed=1):
            yield item["sample"]

    return read


def write_streaming(samples: list[bytes], folder: Path) -> Callable[[], Iterator[bytes]]:
    """Store samples in MosaicML Streaming's format; returns what reads them in a worker."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"sample": "bytes"}) as writer:
        for sample in samples:
            writer.write({"sample": sample})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=1, shuffle_seed=1)

    def read() -> Iterator[bytes]:
        for item in dataset:
            yield item["sample"]

    return read


def compare_loaders(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Rates of each loader, one entry per repeat."""
    config = DataConfig(
        data_streams=1, data_shuffle_buffer=200, data_packing_buffer=128, data_error_budget=10**9, data_error_rate=1.0
    )
    shape = MediaShape()
    encoder = DocumentEncoder(config, shape, Vocabulary(args.tokenizer), args.seq_length)
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blend = one_epoch(Path(args.blend), folder)
        datasets = open_blend(blend, "train", config, ONE_WORKER).datasets
        samples = list(crude_samples(datasets))
        np.random.default_rng(1).shuffle(samples)
        peers = {
            title: write(samples, folder / package)
            for title, package, write in (
                ("LitData", "litdata", write_litdata),
                ("MosaicML Streaming", "streaming", write_streaming),
            )
            if installed(package)
        }
        for _ in range(args.repeats):
            streams = {"plain webdataset": PlainStream(datasets, config, encoder)}
            streams |= {title: PeerStream(read, config, encoder) for title, read in peers.items()}
            for title, stream in streams.items():
                loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="fork")
                results[title].append(measure(loader))
            ours = MicrobatchLoader(
                blend, config, shape, args.tokenizer, args.seq_length, 1, 0, 1, seed=1, endless=False
            )
            results["ours"].append(measure(ours))
            ours.close()
    return results


def make_pictures(folder: Path, count: int) -> list[tuple[str, bytes, str]]:
    """Photograph-like JPEGs with captions, in a folder and in memory: key, bytes, caption."""
    folder.mkdir()
    rng, made = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        path, caption = folder / f"{number:06d}.jpg", f"Picture number {number} of a benchmark."
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=90)
        path.with_suffix(".txt").write_text(caption)
        made.append((path.stem, path.read_bytes(), caption))
    return made


def img2dataset_writer(pictures: list[tuple[str, bytes, str]], folder: Path) -> None:
    """What img2dataset does with pictures that it has downloaded and need no scaling."""
    import pyarrow

    if "img2dataset" not in sys.modules:
        # Its package imports the downloader with all that it needs; the writer alone needs none of it.
        package = types.ModuleType("img2dataset")
        package.__path__ = list(importlib.util.find_spec("img2dataset").submodule_search_locations)
        sys.modules["img2dataset"] = package
    from img2dataset.writer import WebDatasetSampleWriter

    folder.mkdir()
    schema = pyarrow.schema({"key": pyarrow.string(), "caption": pyarrow.string()})
    writer = WebDatasetSampleWriter(0, str(folder), True, 5, schema, "jpg")
    for key, data, caption in pictures:
        writer.write(data, key, caption, {"key": key, "caption": caption})
    writer.close()


def compare_writers(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Rates of each writer, one entry per repeat."""
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pictures = make_pictures(root / "pictures", args.pictures)
        description = root / "corpus.yaml"
        description.write_text("name: peers\nsources: [{type: image_folder, path: pictures}]\n")
        corpus = load_corpus(description, root)

        def rate(title: str, work: Callable[[], Any]) -> None:
            start, cpu = time.perf_counter(), cpu_seconds()
            work()
            wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
            results[title].append({"samples/s": len(pictures) / wall, "samples/CPU s": len(pictures) / cpu})

        theirs = installed("img2dataset")
        for repeat in range(args.repeats):
            peer, output = root / f"peer{repeat}", root / f"ours{repeat}"
            if theirs:
                rate("img2dataset's writer", lambda peer=peer: img2dataset_writer(pictures, peer))
            whole = lambda output=output: build(corpus, output, Share(), workers=0, quiet=True)  # noqa: E731
            rate("our build, whole", whole)
            for part in output.iterdir():  # the scan stays, the corpus goes
                if part.name != ".build":
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
            rate("our build, written again from its scan", whole)
    return results


def show(results: dict[str, list[dict[str, float]]], reference: str) -> None:
    """Print medians, lowest and highest of both rates, and their ratios to the reference."""
    header = "".join(f"{name:>16}{'lowest':>9}{'highest':>9}{'ratio':>7}" for name in RATES)
    print(f"{'':40}{header}")
    for title, runs in results.items():
        line = f"{title:40}"
        for name in RATES:
            rates = [run[name] for run in runs]
            base = statistics.median(run[name] for run in results[reference]) if reference in results else float("nan")
            middle = statistics.median(rates)
            line += f"{middle:16.1f}{min(rates):9.1f}{max(rates):9.1f}{middle / base:7.2f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blend", required=True, help="Energon blend of built shards")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer directory")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures that the writers write")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats; the median counts")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    loaders, writers = compare_loaders(args), compare_writers(args)
    print("\nloaders, one worker")
    show(loaders, "plain webdataset")
    print("\nwriters, one process")
    show(writers, "img2dataset's writer")


if __name__ == "__main__":
    main()
