from pathlib import Path

import pytest

from megatron_anyexperts.data.tokenizer import train_tokenizer
from tests.feed import corpus as small_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Shards of text, pictures and tones, and a tokenizer trained on their words."""
    folder = tmp_path_factory.mktemp("corpus")
    small_corpus.build(folder / "shards", {"text": 120, "image_text": 48, "audio_text": 40})
    train_tokenizer([small_corpus.prose(index, 30) for index in range(200)], 512, folder / "tokenizer")
    return folder
