"""How much a sample is: tokens by modality, pixels, seconds, frames."""

import math
from functools import lru_cache
from pathlib import Path

from megatron_anyexperts.corpus.corpus import Corpus, Estimate
from megatron_anyexperts.corpus.facts import Facts
from megatron_anyexperts.corpus.sample import Sample
from megatron_anyexperts.data.vocabulary import Vocabulary
from megatron_anyexperts.media import MODALITIES

AUDIO_FRAMES_PER_SECOND = 100


@lru_cache(maxsize=1)
def _vocabulary(directory: Path) -> Vocabulary:
    return Vocabulary(directory)


class TokenCounter:
    """Counts text tokens with the corpus' tokenizer and estimates media tokens from sizes.

    Args:
        corpus: how media are estimated.
        tokenizer: Hugging Face directory.
    """

    def __init__(self, corpus: Corpus, tokenizer: Path):
        self._estimate, self._vocabulary = corpus.estimate, _vocabulary(tokenizer)

    def count(self, sample: Sample, facts: list[Facts]) -> dict[str, int]:
        """Tokens by modality."""
        tokens = dict.fromkeys(MODALITIES, 0)
        tokens["text"] = sum(len(self._vocabulary.encode(text)) for text in sample.texts())
        for fact in facts:
            tokens[fact.type] += media_tokens(fact, self._estimate)
        return tokens


def media_tokens(fact: Facts, estimate: Estimate) -> int:
    """Estimated decoder tokens of one medium."""
    if fact.type == "audio":
        return math.ceil(fact.seconds * AUDIO_FRAMES_PER_SECOND / estimate.audio_stride)
    side = estimate.patch_size * estimate.spatial_merge
    frame = max(1, round(fact.width / side)) * max(1, round(fact.height / side))
    frame = min(frame, estimate.image_max_tokens)
    if fact.type == "image":
        return frame
    frames = max(1, min(fact.frames, estimate.video_max_frames, math.ceil(fact.seconds * estimate.video_fps)))
    return frames * frame


def measures(sample: Sample, facts: list[Facts]) -> dict[str, float]:
    """What can be measured without a model: characters, media, pixels, seconds, frames."""
    found = {"text_chars": sum(map(len, sample.texts()))}
    for fact in facts:
        for name, value in (
            (f"{fact.type}s", 1),
            (f"{fact.type}_pixels", fact.width * fact.height * max(1, fact.frames)),
            (f"{fact.type}_seconds", fact.seconds),
            (f"{fact.type}_frames", fact.frames if fact.type == "video" else 0),
        ):
            if value:
                found[name] = found.get(name, 0) + value
    return found
