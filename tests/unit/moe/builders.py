"""Small configurations, routers and layers for the tests of `moe/`."""

from dataclasses import replace

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.moe.controllers import with_controllers
from megatron_anyexperts.moe.layer import AnyExpertsMoELayer
from megatron_anyexperts.moe.router import AnyExpertsRouter

HIDDEN = 16
EXPERTS = 8


def config(**options) -> AnyExpertsConfig:
    """A config of one small mixture layer, top-4 of 8 unless told."""
    defaults = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "moe_ffn_hidden_size": 24,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 4,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "finalize_model_grads_func": with_controllers(),  # as the layer does, for routers alone
    }
    return AnyExpertsConfig(**(defaults | options))


def static(**options) -> AnyExpertsConfig:
    """A config under which everything must be Megatron's own."""
    return config(anyexperts_alpha=0.0, **options)


def groups() -> ProcessGroupCollection:
    return get_default_pg_collection()


def routers(cfg: AnyExpertsConfig) -> tuple[TopKRouter, AnyExpertsRouter]:
    """Megatron's router and ours with the same weights and biases, both in training mode as layer 1."""
    pair = TopKRouter(cfg, groups()), AnyExpertsRouter(cfg, groups())
    state = pair[0].state_dict()
    if cfg.moe_router_enable_expert_bias:
        state["expert_bias"] = 0.1 * torch.randn(EXPERTS)
    pair[0].load_state_dict(state)
    pair[1].load_state_dict(state, strict=False)
    for router in pair:
        router.set_layer_number(1)
    return pair


def layer(cfg: AnyExpertsConfig, kind: type[MoELayer] = AnyExpertsMoELayer) -> MoELayer:
    """A layer of `kind` with Megatron's sequential experts, or Transformer Engine's grouped ones, as layer 1."""
    grouped = cfg.moe_grouped_gemm
    spec = get_moe_module_spec(use_te=grouped, num_experts=cfg.num_moe_experts, moe_grouped_gemm=grouped)
    router = AnyExpertsRouter if kind is AnyExpertsMoELayer else TopKRouter
    built = kind(cfg, replace(spec.keywords["submodules"], router=router), layer_number=1, pg_collection=groups())
    built.set_layer_number(1)
    return built
