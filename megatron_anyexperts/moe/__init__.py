"""Dynamic expert slots: router, virtual experts, dispatch and their controllers. Knows only torch and Megatron-Core.

The names below are the library; docs/library.md shows them in a model and in a loop of your own.
"""

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.controllers import with_controllers
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.losses import token_weights
from megatron_anyexperts.moe.metrics import install_metrics, token_modality
from megatron_anyexperts.moe.router import AnyExpertsRouter
from megatron_anyexperts.moe.spec import moe_spec

__all__ = [
    "AnyExpertsConfig",
    "AnyExpertsMoELayer",
    "AnyExpertsRouter",
    "install_metrics",
    "moe_spec",
    "token_modality",
    "token_weights",
    "with_controllers",
]
