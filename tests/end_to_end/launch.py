"""Starts real pretraining processes for tests."""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run_directory import Run
from tests.multirank import FORKED, free_port

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/end_to_end/tiny.yaml"
ENTRY = ROOT / "pretrain/pretrain_multimodal.py"
DUMPING = ROOT / "tests/end_to_end/dumping_pretrain.py"


@dataclass(frozen=True)
class Finished:
    """What a run left: exit code per rank, output of all ranks, and its directory."""

    codes: list[int]
    output: str
    run: Run

    @property
    def log(self) -> str:
        """All that its ranks, and those of earlier starts in the same directory, printed."""
        return "\n".join(path.read_text() for path in sorted(self.run.output.iterdir()))

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by iteration."""
        return {record["iteration"]: record["loss"] for record in runlog.read_metrics(self.run)}


def rank_environment(rank: int, ranks: int, port: str) -> dict[str, str]:
    """What torchrun and the launcher set for a rank."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def start_ranks(entry: Path, ranks: int, words: list[str]) -> list[subprocess.Popen]:
    """Start one process per rank, over gloo on loopback."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        environment = rank_environment(rank, ranks, port)
        command = [sys.executable, str(entry), *words]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return processes


def _run_forked(entry: str, words: list[str], environment: dict[str, str], output: str) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = [entry, *words]
    runpy.run_path(entry, run_name="__main__")


def run_ranks_fresh(entry: Path, ranks: int, words: list[str]) -> tuple[list[int], str]:
    """Like `run_ranks_forked`, on new interpreters, which run a `sitecustomize`."""
    processes = start_ranks(entry, ranks, words)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(outputs)


def run_ranks_forked(entry: Path, ranks: int, words: list[str]) -> tuple[list[int], str]:
    """Run an entry point to its end on processes forked from `tests.preloaded`.

    Returns:
        exit code of each rank, None where it was still running after 300 s, and the output of all ranks.
    """
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"rank{rank}") for rank in range(ranks)]
        processes = [
            FORKED.Process(
                target=_run_forked, args=(str(entry), words, rank_environment(rank, ranks, port), str(outputs[rank]))
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            end = time.monotonic() + 300
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        return codes, "\n".join(path.read_text() for path in outputs if path.exists())


def pretrain(
    corpus: Path,
    run_dir: Path,
    *flags: str,
    ranks: int = 1,
    entry: Path = ENTRY,
    config: Path = TINY,
    succeed: bool = True,
    run_ranks: Callable[[Path, int, list[str]], tuple[list[int], str]] = run_ranks_forked,
) -> Finished:
    """Run an entry point to its end on `ranks` processes and check that it succeeded (or, on request, failed)."""
    paths = ["--data-path", str(corpus / "shards/blend.yaml"), "--tokenizer-model", str(corpus / "tokenizer")]
    words = ["--config", str(config), "--run-dir", str(run_dir), *paths, *flags]
    result = Finished(*run_ranks(entry, ranks, words), Run(run_dir))
    tail = result.output[-4000:]
    if succeed:
        assert not any(result.codes), f"exit codes {result.codes}\n{tail}"
    else:
        assert all(result.codes), f"expected a failure, got exit codes {result.codes}\n{tail}"
    return result
