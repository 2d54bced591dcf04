"""What a microbatch holds, and that the held-out set is the same for every layout."""

import torch

from megatron_anyexperts.data.validation import ValidationLoader
from tests.feed.conftest import CONFIG, SHAPE


def test_placeholders_match_media_and_rows_are_full(make_loader, blend):
    loader = make_loader(blend, micro_batch_size=2, data_streams=1, data_packing_buffer=64)
    used = []
    for _ in range(12):
        batch = next(loader)
        assert batch["tokens"].shape == batch["labels"].shape == batch["sample_modality"].shape == (2, 256)
        images = sum(SHAPE.image_token_count(tuple(grid)) for grid in batch["image_grids"].tolist())
        clips = sum(SHAPE.audio_token_count(frames) for frames in batch["audio_lengths"].tolist())
        modality = batch["token_modality"]
        assert ((modality == 1) | (modality == 3)).sum() == images and (modality == 2).sum() == clips
        assert len(batch["image_patches"]) == batch["image_grids"].prod(1).sum()
        assert len(batch["audio_features"]) == batch["audio_lengths"].sum()
        padding = batch["segment_ids"] == 0
        assert torch.equal(padding, modality == -1) and not batch["loss_mask"][padding].any()
        assert [len(keys) for keys in batch.sample_keys] == batch["segment_ids"].amax(1).tolist()
        used.append((~padding).float().mean().item())
    assert sum(used) / len(used) > 0.9


def test_the_held_out_set_repeats_and_is_dealt_alike_to_any_number_of_ranks(blend, tokenizer):
    def rows(dp_size: int) -> list[list[str]]:
        ranks = [
            ValidationLoader(blend, CONFIG, SHAPE, tokenizer, 256, 1, rank, dp_size, 4 // dp_size)
            for rank in range(dp_size)
        ]
        first, second = ([next(rank).sample_keys[0] for _ in range(4 // dp_size) for rank in ranks] for _ in "ab")
        assert first == second
        return first

    assert rows(1) == rows(2) == rows(4)
    kinds = {key.split("/")[0] for row in rows(1) for key in row}
    assert {"text", "image_text", "audio_text"} <= kinds
