"""What each flag means to a checkpoint, said once: see `Kind`.

`tests/unit/training/test_identity.py` holds that every flag of this project, and every flag of Megatron's groups that
can matter to a model or its optimizer, is listed exactly once. Flags of Megatron's other groups (`EXECUTION_GROUPS`)
say how and where a run is executed, or belong to models and trainers that this project does not run.
"""

from enum import Enum


class Kind(Enum):
    """What happens to a flag that differs from the checkpoint's."""

    SHAPES = "shapes"
    """Sizes and structure of the model: always refused."""
    MEANING = "meaning"
    """Fits every tensor, but the weights were trained for the other value: refused without ``--accept-change``."""
    DIALS = "dials"
    """Meant to be turned on a trained model: reported."""
    SCHEDULE = "schedule"
    """Length, learning rates, weight decay and batch: refused on a resumed run without ``--change-schedule``."""
    STATE = "state"
    """What a resumed run continues beside the weights (data order, optimizer states): refused there; a run that takes
    the weights alone may differ."""
    EXECUTION = "execution"
    """How and where it is computed: neither recorded nor compared."""


TABLE: tuple[tuple[Kind, str, str], ...] = (
    # ---- shapes
    (Kind.SHAPES, "depth and widths of the decoder",
     """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups group_query_attention kv_channels
     hybrid_layer_pattern hybrid_override_pattern is_hybrid_model spec swiglu add_bias_linear add_qkv_bias normalization
     qk_layernorm qk_norm_all_heads attention_output_gate softmax_type untie_embeddings_and_output_weights
     encoder_num_layers decoder_num_layers heterogeneous_layers_config_path
     heterogeneous_layers_config_encoded_json"""),
    (Kind.SHAPES, "a table of learned positions; left out with other positions",
     "max_position_embeddings relative_attention_num_buckets"),
    (Kind.SHAPES, "experts",
     """num_experts moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size
     moe_layer_freq"""),
    (Kind.SHAPES, "multi-token prediction", "mtp_num_layers mtp_use_repeated_layer mtp_hybrid_override_pattern"),
    (Kind.SHAPES, "attention of other kinds and state spaces",
     """multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
     experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim linear_attention_freq
     linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
     mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads"""),
    (Kind.SHAPES, "parameters of dynamic routing",
     """anyexperts_stock_moe anyexperts_importance_hidden anyexperts_learn_alpha anyexperts_virtual_experts"""),
    (Kind.SHAPES, "encoders and what they read; of an encoder with layers",
     """vision_num_layers vision_hidden_size vision_ffn_hidden_size vision_num_heads patch_size spatial_merge
     audio_num_layers audio_hidden_size audio_ffn_hidden_size audio_num_heads n_mels audio_stride"""),
    # ---- meaning without shapes
    (Kind.MEANING, "what a token id means: a hash of the tokenizer's content, not its path", "tokenizer_model"),
    (Kind.MEANING, "positions",
     """position_embedding_type use_rotary_position_embeddings add_position_embedding rotary_base rotary_percent
     rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor rope_type no_rope_freq
     mrope_section rotary_scaling_factor mscale mscale_all_dim yarn_original_max_position_embeddings yarn_beta_fast
     yarn_beta_slow yarn_correction_range_round_to_int relative_attention_max_distance window_size
     window_attn_skip_freq"""),
    (Kind.MEANING, "norms, activations and residuals",
     """layernorm_epsilon layernorm_zero_centered_gamma qk_l2_norm apply_residual_connection_post_layernorm
     glu_linear_offset activation_func_clamp_value openai_gelu squared_relu quick_geglu"""),
    (Kind.MEANING, "scores and gates of the router",
     """moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_enable_expert_bias
     moe_router_num_groups moe_router_group_topk moe_router_force_load_balancing moe_router_force_biased
     moe_apply_probs_on_input"""),
    (Kind.MEANING, "strength of importance fusion (left out where it is learned), and what virtual experts return",
     "anyexperts_alpha anyexperts_virtual_kind"),
    (Kind.MEANING, "order of rows in gated matrices",
     "moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size"),
    (Kind.MEANING, "scales by width", "use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult "
     "mup_base_head_dim mup_attn_scale_power"),
    (Kind.MEANING, "sparse attention's indexer",
     """dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_rope_interleaved
     dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32"""),
    # ---- dials
    (Kind.DIALS, "slots of a token and how they are steered",
     """moe_router_topk anyexperts_k_min anyexperts_k_max anyexperts_rho_max anyexperts_target_slots
     anyexperts_target_real anyexperts_slot_rate anyexperts_slot_gradient anyexperts_importance_gradient
     anyexperts_budget_slack
     anyexperts_virtual_bias_rate anyexperts_expert_bias_update moe_router_bias_update_rate
     moe_router_quantile_balancing_ema moe_router_load_balancing_type"""),
    (Kind.DIALS, "caps on what an expert receives",
     """anyexperts_dispatch_eps moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy"""),
    (Kind.DIALS, "losses beside the language model's",
     """moe_aux_loss_coeff moe_z_loss_coeff anyexperts_budget_loss_coeff anyexperts_spread_loss_coeff
     anyexperts_spread_target mtp_loss_scaling_factor mtp_detach_heads dsa_indexer_loss_coeff
     dsa_indexer_use_sparse_loss"""),
    (Kind.DIALS, "noise", "hidden_dropout attention_dropout moe_input_jitter_eps"),
    (Kind.DIALS, "the optimizer's constants and clipping",
     """clip_grad qk_clip qk_clip_alpha qk_clip_threshold adam_beta1 adam_beta2 adam_eps sgd_momentum lion_beta1
     lion_beta2 apply_wd_to_qk_layernorm no_weight_decay_cond_type muon_momentum muon_split_qkv muon_nesterov
     muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps muon_tp_mode
     muon_extra_scale_factor muon_scalar_optimizer"""),
    (Kind.DIALS, "number formats; weights and states are converted when they are loaded",
     """fp16 bf16 fp8 fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len
     fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_param_gather fp4 fp4_recipe fp4_quantizer_factory
     fp4_param_gather te_precision_config_file first_last_layers_bf16 num_layers_at_start_in_bf16
     num_layers_at_end_in_bf16 use_kitchen_attention kitchen_attention_backend fp32_residual_connection
     apply_query_key_layer_scaling attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul moe_router_dtype
     accumulate_allreduce_grads_in_fp32 grad_reduce_in_bf16 fp16_lm_cross_entropy loss_scale initial_loss_scale
     min_loss_scale loss_scale_window hysteresis mamba_training_ssm_states_dtype use_precision_aware_optimizer
     main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype"""),
    (Kind.DIALS, "rows of the embedding beyond the vocabulary", "make_vocab_size_divisible_by padded_vocab_size"),
    # ---- schedule
    (Kind.SCHEDULE, "length", "train_iters train_samples"),
    (Kind.SCHEDULE, "learning rates",
     """lr min_lr decoupled_lr decoupled_min_lr lr_decay_style lr_wsd_decay_style lr_decay_iters lr_decay_samples
     lr_wsd_decay_iters lr_wsd_decay_samples lr_warmup_fraction lr_warmup_iters lr_warmup_samples lr_warmup_init
     lr_scale_vision_encoder lr_scale_vision_projector lr_scale_audio_encoder lr_scale_audio_projector
     lr_scale_decoder lr_scale_importance"""),
    (Kind.SCHEDULE, "weight decay", "weight_decay start_weight_decay end_weight_decay weight_decay_incr_style"),
    (Kind.SCHEDULE, "global batch",
     "global_batch_size rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed"),
    # ---- state
    (Kind.STATE, "order and form of the samples",
     """seed seq_length micro_batch_size data_streams data_shuffle_buffer data_packing_buffer data_run_length
     data_open_shards data_image_min_patches data_image_max_patches data_image_max_pixels data_video_fps
     data_video_max_frames data_video_max_patches data_video_max_seconds data_audio_max_seconds data_row_patches
     data_row_audio_frames"""),
    (Kind.STATE, "which states the optimizer has",
     """optimizer freeze_vision_encoder freeze_vision_projector freeze_audio_encoder freeze_audio_projector
     freeze_decoder freeze_importance freeze_all_layers"""),
    # ---- execution
    (Kind.EXECUTION, "Triton kernels", "anyexperts_kernels"),
    (Kind.EXECUTION, "copies of hot experts",
     """anyexperts_balance anyexperts_copies_eps anyexperts_copies_per_rank anyexperts_copies_min_slots
     anyexperts_copies_refresh"""),
    (Kind.EXECUTION, "parallel layout",
     """tensor_model_parallel_size tensor_parallel_num_weight_shards pipeline_model_parallel_comm_backend
     pipeline_model_parallel_size sequence_parallel context_parallel_size hierarchical_context_parallel_sizes
     max_seqlen_per_dp_cp_rank hybrid_context_parallel expert_model_parallel_size expert_tensor_parallel_size
     expert_tensor_parallel_num_weight_shards pipeline_model_parallel_layout cp_comm_type
     microbatch_group_size_per_vp_stage mtp_standalone account_for_embedding_in_pipeline_split
     account_for_loss_in_pipeline_split"""),
    (Kind.EXECUTION, "values of new weights, which a checkpoint replaces",
     """perform_initialization use_cpu_initialization init_method_std embedding_init_method_std
     init_method_xavier_uniform init_model_with_meta_device data_parallel_random_init te_rng_tracker
     inference_rng_tracker moe_use_upcycling moe_upcycling_granularity"""),
    (Kind.EXECUTION, "kernels and fusions",
     """deterministic_mode batch_invariant_mode transformer_impl attention_backend flash_attention_version
     use_flash_attn flash_decode cross_entropy_loss_fusion cross_entropy_fusion_impl masked_softmax_fusion
     bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion no_persist_layer_norm
     gradient_accumulation_fusion use_fused_weighted_squared_relu fused_residual_rmsnorm use_te_activation_func
     use_transformer_engine_op_fuser moe_permute_fusion moe_router_fusion moe_grouped_gemm moe_single_grouped_weight
     moe_single_grouped_bias use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp
     moe_router_padding_for_quantization moe_router_padding_for_fp8 dsa_kernel_backend use_mamba_mem_eff_path
     mlp_chunks_for_prefill mlp_chunks_for_training cache_mla_latents mla_down_proj_fusion onnx_safe
     clone_scatter_output_in_embedding defer_embedding_wgrad_compute wgrad_deferral_limit delay_wgrad_compute
     calculate_per_token_loss"""),
    (Kind.EXECUTION, "communication and its overlap",
     """tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
     tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_bootstrap_backend tp_comm_overlap_cfg
     overlap_moe_expert_parallel_comm overlap_dispatch_backward_with_experts_wgrad
     ep_overlap_early_attn_memory_release overlap_p2p_comm use_ring_exchange_p2p overlap_p2p_comm_warmup_flush
     high_priority_a2a_comm_stream symmetric_ar_type nccl_all_reduce_for_prefill moe_shared_expert_overlap
     moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
     moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
     moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
     moe_ncclep_static_shape moe_ncclep_zero_copy moe_expert_rank_capacity_factor"""),
    (Kind.EXECUTION, "memory: recomputation, offloading, graphs",
     """recompute_granularity recompute_method recompute_num_layers recompute_modules recompute_activations
     checkpoint_activations distribute_saved_activations moe_layer_recompute cpu_offloading_num_layers
     cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading offload_modules
     min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
     activation_offload_fraction fine_grained_offloading_max_inflight_offloads moe_paged_stash
     moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
     enable_cuda_graph cuda_graph_modules cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl
     empty_unused_memory_level reuse_grad_buf_for_mxfp8_param_ag optimizer_cpu_offload optimizer_cuda_graph
     optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads
     pin_cpu_params
     megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype
     megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer
     fsdp_db_use_persist_buf_on_alloc_fail"""),
    (Kind.EXECUTION, "inference and replay",
     """moe_enable_routing_replay moe_pad_experts_for_cuda_graph_inference inference_cuda_graph_scope
     inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
     inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type"""),
    (Kind.EXECUTION, "when to stop, checks, collection, logs",
     """exit_interval exit_duration_in_mins exit_signal_handler exit_signal exit_signal_handler_for_dataloader
     exit_signal_handler_for_training check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval
     train_sync_interval manual_gc manual_gc_interval manual_gc_eval iterations_to_skip
     check_for_nan_in_loss_and_grad check_for_large_grads result_rejected_tracker_filename
     test_mode barrier_with_L1_time log_max_attention_logit dump_param_to_param_group_map
     config_logger_dir moe_per_layer_logging enable_experimental yaml_cfg
     override_opt_param_scheduler use_checkpoint_opt_param_scheduler"""),
    (Kind.EXECUTION, "set by this project, renamed since, or without a reader here",
     """dataloader_type disable_jit_fuser batch_size warmup deprecated_use_mcore_models bert_binary_head"""),
    (Kind.EXECUTION, "other ways to name a tokenizer; the feed reads --tokenizer-model alone",
     """vocab_size pad_vocab_size vocab_file merge_file vocab_extra_ids tokenizer_type metadata_path special_tokens
     tiktoken_pattern tiktoken_num_special_tokens tokenizer_sentencepiece_legacy
     tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast tokenizer_hf_no_include_special_tokens
     trust_remote_code null_tokenizer_eod_id null_tokenizer_pad_id chat_template"""),
    (Kind.EXECUTION, "the run's folder and how its checkpoints are kept",
     """run_dir verbose log_sample_keys keep_last_checkpoints keep_every_checkpoint max_failed_saves accept_change
     change_schedule peak_tflops_per_gpu"""),
    (Kind.EXECUTION, "what is traced",
     "anyexperts_trace_every anyexperts_trace_positions anyexperts_trace_megabytes"),
    (Kind.EXECUTION, "file whose content is compared with the data state, as far as it was followed",
     "data_mixture_schedule"),
    (Kind.EXECUTION, "how much failure the feed tolerates",
     """data_error_budget data_error_rate data_storage_retries data_storage_backoff data_watchdog_seconds"""),
)  # fmt: skip

EXECUTION_GROUPS = frozenset(
    (
        "positional arguments", "options", "profiling", "rl", "checkpointing", "distributed init", "validation",
        "data and dataloader", "autoresume", "biencoder", "vision", "logging", "Logits Distillation", "straggler",
        "workload inspector", "inference", "one logger", "In-process restart", "ft_package", "rerun engine", "msc",
        "sft", "fault injector",
    )
)  # fmt: skip
"""Titles of Megatron's groups of flags that are `Kind.EXECUTION` as a whole, flags listed above excepted."""

KINDS: dict[str, Kind] = {name: kind for kind, _, names in TABLE for name in names.split()}
