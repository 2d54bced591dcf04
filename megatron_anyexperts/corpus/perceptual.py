"""The perceptual hash of a picture. Called in the decoder process."""

from megatron_anyexperts.data.media_image import load_image, over_white


def perceptual_hash(data: bytes, max_pixels: int) -> int:
    """64 bits that change little when a picture, as it is displayed, changes little.

    Raises:
        MediaError: it cannot be decoded.
    """
    import imagehash

    # Transparent pixels would show whatever colour the file happens to store for them.
    return int(str(imagehash.phash(over_white(load_image(data, max_pixels)).convert("L"))), 16)
