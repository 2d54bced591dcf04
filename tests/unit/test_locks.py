"""The locks fit each other: Transformer Engine's torch part is compiled against what the first one installs."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pinned(name: str) -> dict[str, str]:
    """Version by package of a lock."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.MULTILINE))


def test_what_both_locks_install_is_the_same():
    base, fp8 = pinned("requirements.lock"), pinned("requirements-fp8.lock")
    assert {name: (base[name], fp8[name]) for name in base.keys() & fp8.keys() if base[name] != fp8[name]} == {}
    assert {"torch", "transformer-engine-torch", "nvidia-cudnn-frontend", "ninja", "pybind11"} <= fp8.keys()


def test_the_cuda_headers_are_of_one_release():
    fp8 = pinned("requirements-fp8.lock")
    assert fp8["nvidia-cuda-crt"] == fp8["nvidia-cuda-runtime"]
