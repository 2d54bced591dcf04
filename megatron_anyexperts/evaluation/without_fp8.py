"""Passes of a trained model over any number of rows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_fp8(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model that was trained in FP8 multiplies in the precision of its weights; its scales stay as they are.

    FP8 products take multiples of 16 rows: a microbatch of training is one, a new token or a question is not.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    formats = [(config, config.fp8) for config in configs.values()]
    for config, _ in formats:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in formats:
            config.fp8 = fp8
