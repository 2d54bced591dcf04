"""Models and jobs to plan."""

from types import SimpleNamespace

from megatron_anyexperts.checks.plan_layout import Layout
from megatron_anyexperts.checks.plan_memory import Precision
from megatron_anyexperts.checks.plan_sizes import EncoderSizes, MixtureSizes, ModelSizes
from megatron_anyexperts.checks.plan_time import Feed, Setting
from megatron_anyexperts.hardware import ASSUMED, GPUS

SEQUENCE = 4096

MIXTURE = ModelSizes(
    "*E" * 8, vocabulary=32_768, hidden=1024, ffn=4096, heads=16, groups=8, channels=64,
    mixture=MixtureSizes(64, 256, real=6.5, most=8),
    vision=EncoderSizes(6, 512, 2048, 8, front=512 * 588, merged=4),
)  # fmt: skip


def layout(gpus: int = 64, **changes) -> Layout:
    """Data parallelism with experts spread over a node."""
    sizes = {"tensor": 1, "pipeline": 1, "expert": 8, "expert_tensor": 1, "micro_batch": 1, "global_batch": 1024}
    return Layout(gpus, **(sizes | {"sequence": SEQUENCE} | changes))


def setting(sizes: ModelSizes = MIXTURE, **changes) -> Setting:
    """Of H100s in bf16."""
    parts = {"precision": Precision(), "gpu": GPUS["h100"], "reached": ASSUMED, "feed": Feed(SEQUENCE)}
    return Setting(sizes, **(parts | changes))


def megatron_arguments(sizes: ModelSizes, job: Layout) -> SimpleNamespace:
    """The same model and job for Megatron's own formulas, which know no hybrid pattern and no norms of heads."""
    mixture, latent = sizes.mixture, sizes.latent
    attention = {"group_query_attention": latent is None, "multi_latent_attention": latent is not None}
    if latent:
        attention |= {
            "q_lora_rank": latent.query_rank, "kv_lora_rank": latent.kv_rank, "qk_head_dim": latent.plain,
            "qk_pos_emb_head_dim": latent.rotary, "v_head_dim": latent.value,
        }  # fmt: skip
    return SimpleNamespace(
        **attention,
        hybrid_layer_pattern=None, is_hybrid_model=False,
        num_layers=sizes.decoder.count("*"), hidden_size=sizes.hidden, ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads, num_query_groups=sizes.groups,
        kv_channels=sizes.channels, swiglu=sizes.gated, normalization="RMSNorm",
        num_experts=mixture.experts, moe_layer_freq=1, moe_ffn_hidden_size=mixture.ffn,
        moe_router_topk=int(mixture.real), moe_shared_expert_intermediate_size=mixture.shared or None,
        moe_latent_size=mixture.latent, moe_shared_expert_gate=False, add_bias_linear=False, mtp_num_layers=None,
        padded_vocab_size=sizes.vocabulary, untie_embeddings_and_output_weights=not sizes.tied,
        tensor_model_parallel_size=job.tensor, pipeline_model_parallel_size=job.pipeline, seq_length=job.sequence,
        expert_model_parallel_size=job.expert, expert_tensor_parallel_size=job.expert_tensor, world_size=job.gpus,
        data_parallel_size=job.data, use_distributed_optimizer=True, micro_batch_size=job.micro_batch,
        experimental_attention_variant=None, linear_attention_freq=None, attention_output_gate=False,
    )  # fmt: skip
