"""The two kinds of tasks: scan a chunk, write a shard."""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_anyexperts.corpus.chunk_list import ChunkList
from megatron_anyexperts.corpus.corpus import Corpus
from megatron_anyexperts.corpus.files import write_json
from megatron_anyexperts.corpus.plan import ShardFile
from megatron_anyexperts.corpus.scan import save_scan, scan_chunk, scan_path, work_file
from megatron_anyexperts.corpus.workers import Handled
from megatron_anyexperts.corpus.write import is_written, write_shard


@dataclass(frozen=True, slots=True)
class ScanTask:
    """Scan one chunk."""

    corpus: Corpus = field(repr=False)
    number: int
    chunks: ChunkList = field(repr=False)
    work: Path
    """Working folder of the build."""

    @property
    def path(self) -> Path:
        """Where the scan is stored."""
        return scan_path(self.work, self.number)

    def _file(self, folder: str, suffix: str) -> Path:
        return work_file(self.work, folder, self.number, suffix)

    @property
    def claim(self) -> Path:
        return self._file("claims", "scan")

    def done(self) -> bool:
        return self.path.is_file()

    def run(self) -> Handled:
        # The file names the item in progress, in case decoding it kills the process.
        trace = self._file("trace", "position")
        trace.parent.mkdir(parents=True, exist_ok=True)
        with open(trace, "wb", buffering=0) as file:

            def on_item(position: int) -> None:
                file.seek(0)
                file.write(b"%20d" % position)

            scan = scan_chunk(self.corpus, self.chunks[self.number], self._crashed(), on_item)
        save_scan(scan, self.path, self.work / "tmp")
        trace.unlink(missing_ok=True)
        return Handled(scan.items, scan.rejected)

    def _crashed(self) -> set[int]:
        with contextlib.suppress(FileNotFoundError):
            return set(json.loads(self._file("crashed", "json").read_bytes()))
        return set()

    def after_crash(self, signal_number: int) -> None:
        crashed = self._crashed()
        with contextlib.suppress(OSError, ValueError):
            crashed.add(int(self._file("trace", "position").read_bytes()))
        if crashed == self._crashed():
            chunk = self.chunks[self.number]
            raise RuntimeError(f"scanning {chunk} ends with signal {signal_number}, not because of one item")
        write_json(self._file("crashed", "json"), self.work / "tmp", sorted(crashed))


@dataclass(frozen=True, slots=True)
class WriteTask:
    """Write one shard."""

    corpus: Corpus = field(repr=False)
    chunks: ChunkList = field(repr=False)
    shard: ShardFile
    output: Path
    version: str

    @property
    def claim(self) -> Path:
        return self.output / ".build" / "claims" / self.shard.name

    def done(self) -> bool:
        return is_written(self.shard, self.output)

    def run(self) -> Handled:
        plan = self.shard.load()
        manifest = write_shard(self.corpus, self.chunks, plan, self.output, self.version)
        return Handled(len(plan.samples), manifest["rejected"])

    def after_crash(self, signal_number: int) -> None:
        raise RuntimeError(f"writing {self.shard.name} ends with signal {signal_number}; is there enough memory?")
