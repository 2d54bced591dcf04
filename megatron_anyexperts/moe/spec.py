"""Where the mixture layer goes into a model spec of Megatron's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.controllers import with_controllers
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.router import AnyExpertsRouter


def moe_spec(config: AnyExpertsConfig, use_te: bool) -> Any:
    """What Megatron's layer specs take as `mlp`: its experts and shared experts under our layer and router.

    With `anyexperts_stock_moe` layer and router stay Megatron's as well, as the reference of comparisons.

    Args:
        config: of the model.
        use_te: experts of Transformer Engine's layers, else of Megatron's own.
    """
    stock = get_moe_module_spec(
        use_te=use_te, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    if config.anyexperts_stock_moe:
        return stock
    # On every pipeline stage: moving the controllers ends in a collective that stages without mixture layers join.
    config.finalize_model_grads_func = with_controllers(config.finalize_model_grads_func)
    submodules = replace(stock.keywords["submodules"], router=AnyExpertsRouter)
    return partial(AnyExpertsMoELayer, submodules=submodules)
