"""Parts of a microbatch: every token, label and feature is on one rank, where the whole row has it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_anyexperts.data.context_cut import cut
from megatron_anyexperts.data.microbatch import FIELDS, Microbatch, collate
from megatron_anyexperts.media import AUDIO, IMAGE, PAD, TEXT, VIDEO, MediaShape

# A token per patch and one per two frames of sound, so that rows of the encoders' inputs can carry numbers of tokens.
SHAPE = MediaShape(patch_size=1, spatial_merge=1, n_mels=2, audio_stride=2)

RUNS = st.one_of(
    st.tuples(st.just(TEXT), st.integers(1, 12)),
    st.tuples(st.just(IMAGE), st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3))),
    st.tuples(st.just(VIDEO), st.tuples(st.integers(1, 6), st.integers(1, 2), st.integers(1, 3))),
    st.tuples(st.just(AUDIO), st.integers(1, 11)),
)
ROWS = st.lists(st.lists(RUNS, min_size=1, max_size=5), min_size=1, max_size=4)


def tokens_of(kind: int, size) -> int:
    if kind in (IMAGE, VIDEO):
        return SHAPE.image_token_count(size)
    return SHAPE.audio_token_count(size) if kind == AUDIO else size


def numbered(documents: list[list[tuple]], padding: int) -> Microbatch:
    """A row whose tokens are their places + 1, with patches and frames that carry the token they become."""
    lengths = [sum(tokens_of(*run) for run in document) for document in documents]
    size = sum(lengths) + padding
    row = {name: np.zeros(size, field.numpy) for name, field in FIELDS.items() if not field.ragged}
    row["tokens"][: size - padding] = np.arange(size - padding) + 1
    row["labels"][:] = row["tokens"] * 2
    row["loss_mask"][:] = row["tokens"] % 2
    row["position_ids"][:] = np.concatenate([np.arange(length) for length in [*lengths, padding]])
    row["segment_ids"][:] = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    row["sample_modality"][:] = np.where(row["segment_ids"] > 0, TEXT, PAD)
    row["token_modality"][:] = PAD
    patches, grids, frames, clips, place = [], [], [], [], 0
    for kind, size in (run for document in documents for run in document):
        count = tokens_of(kind, size)
        row["token_modality"][place : place + count] = kind
        carried = row["tokens"][place : place + count]
        if kind in (IMAGE, VIDEO):
            times = np.repeat(np.arange(size[0]), size[1] * size[2])
            patches += [(token, time, 0) for token, time in zip(carried, times, strict=True)]
            grids.append(size)
        if kind == AUDIO:
            frames += [(token, 0) for token in np.repeat(carried, 2)[:size]]
            clips.append(size)
        place += count
    row["image_patches"] = np.array(patches, np.float32).reshape(-1, SHAPE.patch_values)
    row["image_grids"] = np.array(grids, np.int32).reshape(-1, 3)
    row["audio_features"] = np.array(frames, np.float32).reshape(-1, SHAPE.n_mels)
    row["audio_lengths"] = np.array(clips, np.int32)
    return collate([row], [["key"]])


def taken(features: np.ndarray, ranges) -> list[float]:
    return [value for start, stop in ranges for value in features[start:stop].tolist()]


@settings(deadline=None)
@given(ROWS, st.integers(0, 40), st.integers(2, 4), st.sampled_from([1, 4]))
def test_parts_hold_each_token_once_with_all_that_belongs_to_it(documents, padding, ranks, multiple):
    whole = numbered(documents, padding)
    parts = [cut(whole, rank, ranks, SHAPE, multiple) for rank in range(ranks)]
    held = np.concatenate([part["tokens"][0].numpy() for part in parts])
    assert sorted(held[held > 0]) == whole["tokens"][whole["tokens"] > 0].tolist()
    assert len({part["tokens"].shape for part in parts}) == 1 and parts[0]["tokens"].shape[1] % multiple == 0
    assert len({part.sizes.documents for part in parts}) == 1 and sum(parts[0].sizes.documents[0]) == len(held)
    for part in parts:
        tokens = part["tokens"][0].numpy()
        real, places = tokens > 0, tokens[tokens > 0] - 1
        for name, field in FIELDS.items():
            if not field.ragged:
                assert (part[name][0].numpy()[real] == whole[name][0].numpy()[places]).all(), name
        assert not part["segment_ids"][0][~real].any() and not part["loss_mask"][0][~real].any()
        assert (part["token_modality"][0][~real] == PAD).all()
        assert part.sample_keys == [["key"]]


@settings(deadline=None)
@given(ROWS, st.integers(0, 9), st.integers(2, 4))
def test_the_features_of_a_part_are_those_of_its_placeholders(documents, padding, ranks):
    whole = numbered(documents, padding)
    for rank in range(ranks):
        part = cut(whole, rank, ranks, SHAPE)
        tokens, kinds = part["tokens"][0].numpy(), part["token_modality"][0].numpy()
        seen, heard = part.sizes.taken
        patches, frames = part["image_patches"].numpy(), part["audio_features"].numpy()
        starts = np.cumsum([0, *part.sizes.clips])[:-1]
        firsts = [start + i for start, n in zip(starts, part.sizes.clips, strict=True) for i in range(0, n, 2)]
        assert taken(patches[:, 0], seen) == tokens[np.isin(kinds, (IMAGE, VIDEO))].tolist()
        assert taken(frames[firsts, 0], heard) == tokens[kinds == AUDIO].tolist()
        assert part.sizes.placeholders == (np.isin(kinds, (IMAGE, VIDEO)).sum(), (kinds == AUDIO).sum())
        grids = zip(part.sizes.grids, part.sizes.first_frames, strict=True)
        times = [first + t for (frames, h, w), first in grids for t in range(frames) for _ in range(h * w)]
        assert patches[:, 1].tolist() == times


def test_a_rank_encodes_only_the_frames_it_shows():
    whole = numbered([[(VIDEO, (16, 2, 2))]], 0)
    parts = [cut(whole, rank, 2, SHAPE) for rank in range(2)]
    assert [part.sizes.grids for part in parts] == [((4, 2, 2), (4, 2, 2)), ((8, 2, 2),)]
    assert [part.sizes.first_frames for part in parts] == [(0, 12), (4,)]


def test_what_cannot_be_cut_is_refused():
    row = numbered([[(TEXT, 8)]], 0)
    two = collate([{n: t[0].numpy() if not FIELDS[n].ragged else t.numpy() for n, t in row.items()}] * 2, [[], []])
    with pytest.raises(ValueError, match="--micro-batch-size=2"):
        cut(two, 0, 2, SHAPE)
    with pytest.raises(ValueError, match=r"placeholders of vision and audio, the encoders will have"):
        cut(numbered([[(IMAGE, (1, 2, 2))]], 0), 0, 2, MediaShape(1, 2, 2, 2))
