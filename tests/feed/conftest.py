import dataclasses
from pathlib import Path

import pytest

from megatron_anyexperts.data.config import DataConfig
from megatron_anyexperts.data.loader import MicrobatchLoader
from megatron_anyexperts.media import MediaShape
from tests.feed import corpus

SHAPE = MediaShape(patch_size=7)
CONFIG = DataConfig(
    data_shuffle_buffer=12,
    data_packing_buffer=16,
    data_run_length=5,
    data_open_shards=3,
    data_image_max_patches=256,
    data_video_max_patches=256,
    data_video_fps=2.0,
    data_video_max_frames=4,
    data_storage_backoff=0.01,
    data_storage_retries=1,
)
COUNTS = {"text": 48, "image_text": 48, "audio_text": 32, "video_text": 24, "interleaved": 32, "chat": 40}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    return corpus.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def blend(tmp_path_factory) -> Path:
    """A blend of one small dataset per kind."""
    return corpus.build(tmp_path_factory.mktemp("shards") / "all", COUNTS)


@pytest.fixture
def make_loader(tokenizer):
    """Builds loaders and stops their workers after the test."""
    loaders = []

    def make(
        blend: Path,
        dp_rank=0,
        dp_size=1,
        *,
        endless=True,
        micro_batch_size=1,
        quarantine=None,
        rows_per_step=None,
        **settings,
    ) -> MicrobatchLoader:
        config = dataclasses.replace(CONFIG, **settings)
        loader = MicrobatchLoader(
            blend, config, SHAPE, tokenizer, 256, micro_batch_size, dp_rank, dp_size, seed=7, endless=endless,
            quarantine=quarantine, rows_per_step=rows_per_step,
        )
        loaders.append(loader)
        return loader

    yield make
    for loader in loaders:
        loader.close()
