"""Starts real pretraining processes for tests."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run import Run
from tests.multirank import free_port

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/end_to_end/tiny.yaml"
ENTRY = ROOT / "pretrain/pretrain_multimodal.py"


@dataclass(frozen=True)
class Finished:
    """What a run left: exit code per rank, output of all ranks, and its directory."""

    codes: list[int]
    output: str
    run: Run

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by iteration."""
        return {record["iteration"]: record["loss"] for record in runlog.read_metrics(self.run)}


def start_ranks(entry: Path, ranks: int, words: list[str]) -> list[subprocess.Popen]:
    """Start one process per rank, over gloo on loopback."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
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
        command = [sys.executable, str(entry), *words]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return processes


def pretrain(
    corpus: Path, run_dir: Path, *flags: str, ranks: int = 1, entry: Path = ENTRY, config: Path = TINY, succeed=True
) -> Finished:
    """Run an entry point to its end on `ranks` processes and check that it succeeded (or, on request, failed)."""
    paths = ["--data-path", str(corpus / "shards/blend.yaml"), "--tokenizer-model", str(corpus / "tokenizer")]
    words = ["--config", str(config), "--run-dir", str(run_dir), *paths, *flags]
    processes = start_ranks(entry, ranks, words)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    result = Finished([process.returncode for process in processes], "\n".join(outputs), Run(run_dir))
    tail = result.output[-4000:]
    if succeed:
        assert not any(result.codes), f"exit codes {result.codes}\n{tail}"
    else:
        assert all(result.codes), f"expected a failure, got exit codes {result.codes}\n{tail}"
    return result
