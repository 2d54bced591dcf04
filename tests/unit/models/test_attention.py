import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_anyexperts.models.attention import SDPACoreAttention
from megatron_anyexperts.models.attention_inputs import attention_inputs, document_mask, packed_documents
from megatron_anyexperts.models.norm import RMSNorm
from tests.unit.models.small import small_config

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])


def build(core, config, **others):
    return core(config, layer_number=3, attn_mask_type=AttnMaskType.causal, attention_type="self", **others)


def query_key_value(queries=6, keys=6):
    torch.manual_seed(0)
    sizes = ((queries, 4), (keys, 2), (keys, 2))
    return [torch.randn(length, 2, heads, 8, requires_grad=True) for length, heads in sizes]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_output_and_gradients_equal_megatrons_attention(one_rank, scale):
    config = small_config()
    outputs, gradients = [], []
    for core in (SDPACoreAttention, DotProductAttention):
        inputs = query_key_value()
        output = build(core, config, softmax_scale=scale)(*inputs, document_mask(SEGMENTS))
        output.square().sum().backward()
        outputs.append(output)
        gradients.append([tensor.grad for tensor in inputs])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_causal_without_mask_equals_the_causal_mask(one_rank):
    core = build(SDPACoreAttention, small_config())
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    torch.testing.assert_close(core(*query_key_value(), None), core(*query_key_value(), later[None, None]))


@pytest.mark.parametrize("queries", [1, 3])
def test_queries_behind_a_cache_see_all_earlier_keys(one_rank, queries):
    core = build(SDPACoreAttention, small_config())
    query, key, value = query_key_value()
    whole = core(query, key, value, None)
    behind_cache = core(query[-queries:], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(behind_cache, whole[-queries:])


def test_dropout_acts_in_training_only(one_rank):
    core = build(SDPACoreAttention, small_config(), attention_dropout=0.5)
    inputs = query_key_value()
    assert not torch.equal(core(*inputs, None), core(*inputs, None))
    core.eval()
    assert torch.equal(core(*inputs, None), core(*inputs, None))


def test_settings_of_transformer_engine_are_refused():
    with pytest.raises(ValueError, match="window_size=.*needs Transformer Engine"):
        build(SDPACoreAttention, small_config(window_size=(4, 0)))


def test_mask_allows_exactly_earlier_tokens_of_the_same_document():
    allowed = ~document_mask(SEGMENTS)[:, 0]
    for row, segments in enumerate(SEGMENTS.tolist()):
        for query, of_query in enumerate(segments):
            expected = [of_query == of_key and key <= query for key, of_key in enumerate(segments)]
            assert allowed[row, query].tolist() == expected


def test_packed_documents_name_the_borders_padding_included():
    packed = packed_documents(SEGMENTS[:1])
    assert packed.cu_seqlens_q.tolist() == [0, 3, 5, 6]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert (packed.max_seqlen_q, packed.qkv_format) == (3, "thd")


def test_packed_documents_need_one_row():
    with pytest.raises(ValueError, match="micro_batch_size=2: .*--micro-batch-size 1"):
        attention_inputs(SEGMENTS, transformer_engine=True)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_follows_its_formula(zero_centered):
    norm = RMSNorm(small_config(layernorm_zero_centered_gamma=zero_centered), 32, eps=1e-3)
    torch.manual_seed(0)
    norm.weight.data += torch.rand(32)
    x = torch.randn(3, 2, 32)
    gain = norm.weight + 1 if zero_centered else norm.weight
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gain)


def test_rms_norm_computes_in_fp32():
    x = torch.randn(3, 32, dtype=torch.bfloat16) * 100
    norm = RMSNorm(small_config(), 32)
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_rms_norm_refuses_other_norms():
    with pytest.raises(ValueError, match="normalization=LayerNorm"):
        RMSNorm(small_config(normalization="LayerNorm"), 32)
