from types import SimpleNamespace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from megatron_anyexperts.models.build import part_of, refuse_fp8_rows, refuse_unsupported
from megatron_anyexperts.models.multimodal import within_documents
from megatron_anyexperts.moe.router import AnyExpertsRouter
from tests.unit.models.small import DYNAMIC, STOCK, VOCABULARY, media_batch, small_config, text_batch


def logits_without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def test_losses_and_logits_have_their_shapes(make_model):
    model = make_model()
    losses = model(**media_batch())
    assert losses.shape == (1, 12)
    assert losses.isfinite().all()
    assert model(**logits_without_labels(media_batch())).shape == (1, 12, VOCABULARY)


@pytest.mark.parametrize(("pattern", "routing"), [("*-*-", {}), ("*E*E", STOCK), ("*E*E", DYNAMIC)])
def test_packed_documents_lose_what_they_lose_alone(make_model, pattern, routing):
    model = make_model({"hybrid_layer_pattern": pattern}, **routing)
    batch = text_batch([7, 5], padding=3)
    packed = model(**batch)
    for part in (slice(0, 7), slice(7, 12)):
        alone = model(**{key: value[:, part] for key, value in batch.items()})
        torch.testing.assert_close(packed[:, part], alone)


def test_no_segments_means_one_causal_document(make_model):
    model = make_model()
    batch = text_batch([9])
    whole = model(**batch)
    torch.testing.assert_close(model(**{**batch, "segment_ids": None}), whole)


def test_features_land_on_their_placeholders_in_order(make_model):
    model = make_model()
    batch = media_batch()
    seen = {}
    hook = model.language_model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**batch)
    hook.remove()
    decoder_input = seen["hidden_states"][:, 0]
    images = model.vision(batch["image_patches"], batch["image_grids"].tolist())
    clips = model.audio(batch["audio_features"], batch["audio_lengths"].tolist())
    torch.testing.assert_close(decoder_input[[1, 2, 7, 8]], images)
    torch.testing.assert_close(decoder_input[[5, 6]], clips)
    text = [0, 3, 4, 9, 10, 11]
    embedded = model.language_model.embedding(batch["tokens"], batch["position_ids"])[:, 0]
    assert torch.equal(decoder_input[text], embedded[text])
    assert seen["padding_mask"].tolist() == [[1.0] * 10 + [0.0] * 2]


@pytest.mark.parametrize("routing", [STOCK, DYNAMIC])
def test_gradients_reach_every_parameter(make_model, routing):
    model = make_model({"hybrid_layer_pattern": "*-*E"}, **routing)
    model(**media_batch()).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_encoders_without_input_get_zero_gradients(make_model):
    model = make_model()
    batch = text_batch([6])
    with_encoders = model(**batch)
    with_encoders.mean().backward()
    encoder_gradients = [p.grad for name, p in model.named_parameters() if part_of(name) != "decoder"]
    assert all(gradient is not None and not gradient.any() for gradient in encoder_gradients)
    model.vision = model.audio = None
    assert torch.equal(model(**batch), with_encoders)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_too_few_features_name_both_counts(make_model, kind):
    batch = media_batch()
    batch["token_modality"][0, 3] = 1 if kind == "image" else 2
    expected = {"image": "vision: the tokens hold 5 placeholders.*features for 4", "audio": "3 placeholders.*for 2"}
    with pytest.raises(ValueError, match=expected[kind]):
        make_model()(**batch)


def test_placeholders_without_any_input_are_refused(make_model):
    batch = media_batch()
    batch |= {"image_patches": batch["image_patches"][:0], "image_grids": batch["image_grids"][:0]}
    with pytest.raises(ValueError, match="vision: the tokens hold 4 placeholders.*features for 0"):
        make_model()(**batch)


def test_input_without_encoder_names_the_flag(make_model):
    with pytest.raises(ValueError, match="--audio-num-layers above 0"):
        make_model({"audio_num_layers": 0})(**media_batch())


def test_bf16_model_trains(make_model):
    model = make_model(bf16=True, params_dtype=torch.bfloat16)
    wrapped = Float16Module(model.config, model)
    losses = wrapped(**media_batch())
    losses.mean().backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert losses.dtype == torch.float32 and losses.isfinite().all()


def test_recomputation_does_not_change_gradients(make_model):
    gradients = []
    for settings in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        model = make_model({"hybrid_layer_pattern": "*-*E"}, **DYNAMIC, **settings)
        model(**media_batch()).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


FROZEN = ["vision_encoder", "vision_projector", "audio_encoder", "audio_projector", "decoder", "importance"]


@pytest.mark.parametrize("part", FROZEN)
def test_freezing_stops_exactly_one_part(make_model, part):
    model = make_model({f"freeze_{part}": True, "hybrid_layer_pattern": "*-*E"}, **DYNAMIC)
    frozen = {part_of(name) for name, p in model.named_parameters() if not p.requires_grad}
    trained = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert frozen == {part}
    assert trained == set(FROZEN) - {part}
    model(**media_batch()).mean().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_frozen_decoder_keeps_its_controllers(make_model):
    settings = DYNAMIC | {"anyexperts_target_slots": 1.5, "anyexperts_target_real": 1.4}
    settings |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    for frozen in (True, False):
        model = make_model({"freeze_decoder": frozen, "hybrid_layer_pattern": "*-*E"}, **settings)
        (router,) = (module for module in model.modules() if isinstance(module, AnyExpertsRouter))
        router.expert_bias.copy_(torch.arange(4.0))
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        ddp(**media_batch()).sum().backward()
        ddp.config.finalize_model_grads_func([ddp])
        state = router.control.slot_offset, router.control.virtual_bias, router.expert_bias - torch.arange(4.0)
        assert [bool(tensor.any()) for tensor in state] == [not frozen] * 3


@pytest.mark.parametrize("recompute", [{}, {"recompute_granularity": "full", "recompute_method": "uniform"}])
def test_router_losses_weigh_targets_in_every_layer(make_model, recompute):
    """Also in the prediction layer, and where layers are recomputed: only the loss mask differs, not the gradient."""
    settings = DYNAMIC | {"moe_z_loss_coeff": 1.0, "calculate_per_token_loss": True}
    settings |= {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.0}
    settings |= recompute and recompute | {"recompute_num_layers": 1}
    gradients = []
    for targets in (10, 1):
        model = make_model({"hybrid_layer_pattern": "*E/*E"}, qk_layernorm=True, **settings)
        loss_mask = torch.zeros(1, 12).index_fill(1, torch.arange(2, 2 + targets) % 10, 1)
        (model(**media_batch(), loss_mask=loss_mask) * 0).sum().backward()
        routers = {name: p.grad for name, p in model.named_parameters() if "router" in name}
        assert {"mtp" in name for name in routers} == {True, False}
        gradients.append({name: gradient / targets for name, gradient in routers.items()})
    assert all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_padding_reaches_the_prediction_layer(make_model):
    settings = DYNAMIC | {"anyexperts_target_slots": 1.5, "mtp_num_layers": 1}
    model = make_model({"hybrid_layer_pattern": "*E/*E"}, qk_layernorm=True, **settings)
    model(**media_batch())
    counts = {"mtp" in name: m.control.counts[0] for name, m in model.named_modules() if hasattr(m, "control")}
    assert counts == {False: 10, True: 9}  # the mask is shifted: a row's last token has no next one to predict from


def test_mtp_does_not_predict_across_documents(make_model):
    mask = within_documents(torch.ones(1, 6), torch.tensor([[1, 1, 1, 2, 2, 0]]))
    assert mask.tolist() == [[0, 1, 1, 0, 1, 0]]
    model = make_model({"hybrid_layer_pattern": "*-/*-"}, mtp_num_layers=1, qk_layernorm=True)
    gradients = []
    for label in (0, 1):
        batch = text_batch([4, 4]) | {"loss_mask": torch.tensor([[1.0, 1, 1, 0] * 2])}
        batch["labels"][0, 4] = label  # multi-token prediction at the end of document 1 would be asked for it
        model.zero_grad()
        (model(**batch) * 0).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if ".mtp." in name})
    assert any(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_several_prediction_layers_need_packed_sequences(make_model):
    with pytest.raises(ValueError, match="mtp_num_layers=2: .*use 1"):
        make_model({"hybrid_layer_pattern": "*-/*-/*-"}, mtp_num_layers=2)


def test_partial_rotary_and_query_groups_change_the_model(make_model):
    batch = text_batch([8])
    losses = [make_model({"rotary_percent": percent})(**batch) for percent in (1.0, 0.5)]
    assert not torch.allclose(*losses)


def test_checkpoint_names_are_stable(make_model):
    model = make_model(
        {"hybrid_layer_pattern": "*-*E"},
        qk_layernorm=True,
        moe_shared_expert_intermediate_size=16,
        anyexperts_stock_moe=True,
    )
    keys = {tensor.key for name, tensor in model.sharded_state_dict().items() if "_extra_state" not in name}
    layers = "language_model.decoder.layers."
    assert {
        f"{layers}0.self_attention.linear_qkv.layer_norm_weight",
        f"{layers}0.self_attention.q_layernorm.weight",
        f"{layers}1.mlp.linear_fc1.layer_norm_weight",
        f"{layers}3.pre_mlp_layernorm.weight",
        f"{layers}3.mlp.router.weight",
        f"{layers}3.mlp.shared_experts.linear_fc1.weight",
        "language_model.decoder.final_norm.weight",
        "language_model.embedding.word_embeddings.weight",
        "language_model.output_layer.weight",
        "vision.embed.weight",
        "vision.transformer.stack.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "vision.projector.linear_fc2.weight",
        "audio.front_end.conv2.weight",
        "audio.positions.project.weight",
    } <= keys


def test_a_pattern_is_needed(make_model):
    with pytest.raises(ValueError, match="--hybrid-layer-pattern"):
        make_model({"hybrid_layer_pattern": None})


def test_transformer_engine_is_asked_for_only_where_it_is(make_model):
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(ValueError, match="--transformer-impl local"):
        make_model(transformer_impl="transformer_engine")


def test_a_small_ling_trains(make_model):
    """Everything Ling-mini-2.0 has, at once: dense first layer, groups, sigmoid scores, expert bias, MTP."""
    model = make_model(
        {"hybrid_layer_pattern": "*-*E*E/*E", "rotary_percent": 0.5},
        **DYNAMIC,
        num_moe_experts=8,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=2.5,
        moe_router_enable_expert_bias=True,
        moe_shared_expert_intermediate_size=16,
        qk_layernorm=True,
        mtp_num_layers=1,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = media_batch() | {"loss_mask": (media_batch()["segment_ids"] > 0).float()}
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(**batch) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert all(p.grad is not None for p in model.parameters())


def test_fp8_needs_rows_that_fill_its_blocks():
    config = small_config(fp8="hybrid", transformer_impl="transformer_engine", bf16=True, params_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="seq_length=12 times micro_batch_size=1 is not a multiple of 16"):
        refuse_fp8_rows(12, 1, config)
    refuse_fp8_rows(16, 1, config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "hybrid_layer_pattern='M-'"),
        ({"cp_comm_type": "a2a"}, "cp_comm_type=a2a"),
        ({"hybrid_context_parallel": True}, "hybrid_context_parallel"),
    ],
)
def test_what_context_parallelism_cannot_split_is_refused(changes, reason):
    pattern = "*-*-" if changes else "M-"
    with pytest.raises(ValueError, match=f"context_parallel_size=2 with {reason}.*leave one of them out"):
        refuse_unsupported(pattern, small_config(context_parallel_size=2, **changes))


def test_context_parallelism_wants_a_row_that_was_cut(make_model):
    model = make_model()
    model.language_model.pg_collection.cp = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match="one rank's part of a row"):
        model(**media_batch())
