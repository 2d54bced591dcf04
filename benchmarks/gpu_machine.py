"""What the measurements of `gpu.sh` run on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_anyexperts.checks import driver

ROOT = Path(__file__).resolve().parents[1]
_PROBE = """
import importlib.metadata, json
import torch
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
def imports(name):
    try: __import__(name)
    except Exception: return False
    return True
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton"),
    "megatron": version("megatron-core"),
    "gpu": torch.cuda.get_device_name(0) if cuda else None,
    "capability": torch.cuda.get_device_capability(0) if cuda else None,
    "transformer_engine": version("transformer-engine") if imports("transformer_engine.pytorch") else None,
    "async_strategy": "nvrx" if imports("nvidia_resiliency_ext") else "mcore",
}))
"""


@dataclass(frozen=True)
class Machine:
    """Versions and hardware; None for what is not there."""

    torch: str
    cuda: str | None
    triton: str | None
    megatron: str | None
    gpu: str | None
    capability: tuple[int, int] | None
    transformer_engine: str | None
    async_strategy: str
    driver: str | None = None
    """Version of NVIDIA's."""

    @classmethod
    def look(cls, environment: dict[str, str]) -> Machine:
        """Ask a new process, so that nothing is imported before Transformer Engine is there.

        Raises:
            SystemExit: torch cannot be imported.
        """
        command = [sys.executable, "-W", "ignore", "-c", _PROBE]
        asked = subprocess.run(command, capture_output=True, text=True, env=environment)
        if asked.returncode:
            raise SystemExit(f"error: {sys.executable} cannot import torch:\n{asked.stderr[-2000:]}")
        found = json.loads(asked.stdout.splitlines()[-1])
        capability = found.pop("capability")
        return cls(**found, capability=tuple(capability) if capability else None, driver=driver.look().version)


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it."""
    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return ask("rev-parse", "--short=12", "HEAD") + ("+" if ask("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(on_cpu: bool) -> dict[str, str]:
    """Variables of the steps; `on_cpu` hides a GPU."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    return kept | hidden | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
