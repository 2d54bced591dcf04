import argparse

import pytest

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.training.arguments import add_arguments
from tests.unit.moe.builders import config

REFUSED = [
    ({"anyexperts_k_min": 5, "anyexperts_k_max": 4}, "k_min=5, anyexperts_k_max=4"),
    ({"anyexperts_k_max": 9}, "num_moe_experts=8"),
    ({"anyexperts_k_min": 0}, "1 <= k_min"),
    ({"anyexperts_rho_max": 1.0}, r"anyexperts_rho_max=1.0 lies outside \[0, 1\)"),
    ({"anyexperts_k_max": 6, "anyexperts_target_slots": 7}, r"outside \[4, 6\]"),
    ({"anyexperts_target_real": 3.5}, "needs virtual experts"),
    ({"anyexperts_rho_max": 0.25, "anyexperts_target_real": 2.0}, r"anyexperts_target_real=2.0 lies outside \[3, 4\]"),
    ({"anyexperts_rho_max": 0.5, "anyexperts_virtual_experts": 1}, "fewer than the 2 virtual slots"),
    ({"anyexperts_budget_slack": 1.1}, "relative to anyexperts_target_slots"),
    ({"anyexperts_budget_loss_coeff": 1.0}, "relative to anyexperts_target_slots"),
    ({"anyexperts_alpha": float("nan")}, "finite"),
    ({"anyexperts_dispatch_eps": -0.1}, "anyexperts_dispatch_eps=-0.1"),
    ({"anyexperts_k_max": 6, "moe_router_num_groups": 4, "moe_router_group_topk": 2}, "exceeds the 4 experts"),
    ({"moe_token_dispatcher_type": "allgather"}, "alltoall"),
    ({"moe_token_dispatcher_type": "flex"}, "alltoall"),
    ({"moe_expert_capacity_factor": 1.0, "moe_router_load_balancing_type": "aux_loss"}, "anyexperts_dispatch_eps"),
    ({"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}, "anyexperts_dispatch_eps"),
    ({"moe_apply_probs_on_input": True}, "top-1 only"),
    ({"overlap_moe_expert_parallel_comm": True, "expert_model_parallel_size": 2, "bf16": True}, "stages one by one"),
    (
        {"transformer_impl": "inference_optimized", "gated_linear_unit": False, "normalization": "RMSNorm"},
        "fixed top-k",
    ),
    ({"moe_router_load_balancing_type": "sinkhorn"}, "fixed top-k"),
    ({"moe_router_load_balancing_type": "quantile_balancing"}, "fixed top-k"),
    ({"moe_enable_routing_replay": True}, "fixed top-k"),
    ({"moe_router_fusion": True, "anyexperts_k_max": 5}, "fixed top-k"),
    ({"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True}, "shared expert"),
    ({"cuda_graph_impl": "transformer_engine"}, "fixed shapes"),
    ({"moe_router_score_function": "softmax", "anyexperts_k_min": 1, "anyexperts_k_max": 1}, "constant gate 1"),
    ({"anyexperts_k_max": 6, "anyexperts_slot_gradient": "none", "anyexperts_alpha": 0.0}, "without a gradient"),
    ({"anyexperts_importance_gradient": "centred", "anyexperts_slot_gradient": "none"}, "has none; use fractional"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_work_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_slot_range_defaults_to_the_routers_top_k():
    cfg = config()
    assert (cfg.anyexperts_k_min, cfg.anyexperts_k_max, cfg.anyexperts_static) == (4, 4, True)


def test_every_own_field_is_a_flag_with_help():
    parser = add_arguments(argparse.ArgumentParser())
    flags = {action.dest: action for action in parser._actions if action.dest.startswith("anyexperts_")}
    own = {name for name in AnyExpertsConfig.__dataclass_fields__ if name.startswith("anyexperts_")}
    assert own <= set(flags)  # those of traces are of the run, not of a layer
    assert all(action.help for action in flags.values())


def test_flags_parse_to_the_field_types():
    parser = add_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--anyexperts-k-min", "2", "--anyexperts-rho-max", "0.2", "--anyexperts-learn-alpha"])
    assert (args.anyexperts_k_min, args.anyexperts_rho_max, args.anyexperts_learn_alpha) == (2, 0.2, True)
    assert args.anyexperts_k_max is None


def test_dynamic_routing_computes_in_fp32_unless_told_otherwise():
    assert config(moe_router_dtype=None, anyexperts_k_max=5).moe_router_dtype == "fp32"
    assert config(moe_router_dtype="fp64", anyexperts_k_max=5).moe_router_dtype == "fp64"
    assert config(moe_router_dtype=None).moe_router_dtype is None


def test_a_config_without_experts_is_left_alone():
    assert AnyExpertsConfig(num_layers=1, hidden_size=8, num_attention_heads=1).finalize_model_grads_func is None
