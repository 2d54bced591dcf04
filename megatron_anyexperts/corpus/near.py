"""Near-duplicates: signatures of texts (MinHash) and images (perceptual hash)."""

from functools import cache

import numpy as np

from megatron_anyexperts.corpus.perceptual import perceptual_hash
from megatron_anyexperts.corpus.probe import in_decoder
from megatron_anyexperts.corpus.sample import Sample

PERMUTATIONS = 64
"""Length of a MinHash signature; the similarity is estimated to about +-0.06."""

SCHEME = "affine32"
"""The hash functions of datasketch; stored signatures say nothing about theirs."""


def text_signature(sample: Sample) -> np.ndarray:
    """MinHash of the word 3-grams of a sample's text, uint64 [PERMUTATIONS]."""
    from datasketch import MinHash

    words = " ".join(sample.texts()).lower().split()
    grams = {" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))}
    signature = MinHash(num_perm=PERMUTATIONS, seed=1, scheme=SCHEME)
    signature.update_batch([gram.encode("utf-8", "replace") for gram in grams])
    return signature.hashvalues.astype(np.uint64)


def image_signature(sample: Sample, max_pixels: int) -> int:
    """Perceptual hash of a sample's first medium if that is an image, else 0."""
    if not sample.media or sample.media[0].type != "image":
        return 0
    return in_decoder(perceptual_hash, sample.media[0].data, max_pixels)


@cache
def text_bands(threshold: float) -> tuple[int, int]:
    """Bands of MinHash LSH and values in each, as datasketch chooses them for a threshold."""
    from datasketch import MinHashLSH

    try:
        index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    except ValueError:  # it would choose a single band, and refuses to
        return 2, PERMUTATIONS // 2
    return index.b, index.r
