"""An encoder of documents and a small model that answers with confidence."""

import pytest

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.encode import DocumentEncoder
from megatron_anyexperts.data.tokenizer import train_tokenizer
from megatron_anyexperts.data.vocabulary import Vocabulary
from tests.feed.corpus import prose
from tests.unit.models.small import DYNAMIC, SHAPE


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> DocumentEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([prose(index, 20) for index in range(40)], 300, folder)
    config = DataConfig(data_image_max_patches=64, data_video_max_patches=64)
    return DocumentEncoder(config, SHAPE, Vocabulary(folder), seq_length=160)


@pytest.fixture
def model(make_model):
    arguments = {"hybrid_layer_pattern": "*-*E*E", "padded_vocab_size": 304, "max_position_embeddings": 160}
    # Large weights make the most likely token a clear one.
    return make_model(arguments, **DYNAMIC, init_method_std=0.5).eval()
