"""Near-duplicates: signatures of texts (MinHash) and images (perceptual hash), and who repeats an earlier one."""

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


def repeated_texts(signatures: np.ndarray, kinds: np.ndarray, threshold: float) -> np.ndarray:
    """Which texts resemble an earlier one of the same kind.

    Args:
        signatures: uint64 [N, PERMUTATIONS].
        kinds: [N]; texts of different kinds are not compared.
        threshold: estimated Jaccard similarity from which a text is a repetition.

    Returns:
        bool [N].
    """
    from datasketch import MinHash, MinHashLSH

    repeated = np.zeros(len(signatures), dtype=bool)
    index = {int(kind): MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS) for kind in np.unique(kinds)}
    for number, (values, kind) in enumerate(zip(signatures, kinds, strict=True)):
        minhash = MinHash(num_perm=PERMUTATIONS, seed=1, hashvalues=values, scheme=SCHEME)
        candidates = index[int(kind)].query(minhash)
        # The index answers with false candidates as well, so the similarity itself decides.
        repeated[number] = any(np.mean(signatures[other] == values) >= threshold for other in candidates)
        if not repeated[number]:
            index[int(kind)].insert(number, minhash)
    return repeated


def repeated_images(signatures: np.ndarray, groups: np.ndarray, max_bits: int) -> np.ndarray:
    """Which images resemble an earlier, different one.

    Args:
        signatures: uint64 [N]; 0 means no image.
        groups: [N]; samples of one group have the very same image and do not repeat each other.
        max_bits: differing bits up to which an image is a repetition.

    Returns:
        bool [N].
    """
    repeated = np.zeros(len(signatures), dtype=bool)
    # Cut into max_bits + 1 bands, two hashes with at most max_bits differing bits agree in one band at least.
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    tables: list[dict[int, list[int]]] = [{} for _ in edges[1:]]
    kept: dict[int, bool] = {}
    for number, (signature, group) in enumerate(zip(signatures.tolist(), groups.tolist(), strict=True)):
        if signature == 0:
            continue
        if group not in kept:
            bands = [
                (signature >> int(low)) & ((1 << int(high - low)) - 1)
                for low, high in zip(edges, edges[1:], strict=False)
            ]
            near = (table.get(band, ()) for table, band in zip(tables, bands, strict=True))
            kept[group] = not any((other ^ signature).bit_count() <= max_bits for others in near for other in others)
            if kept[group]:
                for table, band in zip(tables, bands, strict=True):
                    table.setdefault(band, []).append(signature)
        repeated[number] = not kept[group]
    return repeated
