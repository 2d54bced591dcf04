"""Where Transformer Engine is not installed nothing here can run; where there is CUDA, it needs no reference."""

from importlib.util import find_spec

import pytest
import torch

from tests.end_to_end.conftest import corpus  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("transformer_engine") is None:
        reason = "Transformer Engine is not installed (./bootstrap.sh dev,fp8)"
    elif torch.cuda.is_available():
        reason = "there is CUDA: `anyexperts gpu-check` runs Transformer Engine itself"
    else:
        return
    for item in items:
        if item.path.is_relative_to(__file__.removesuffix("conftest.py")):
            item.add_marker(pytest.mark.skip(reason=reason))
