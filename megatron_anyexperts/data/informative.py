"""Which patches of a picture carry information, where that is known: lines of JSON beside pictures made by rule."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np


def picture_id(data: bytes) -> str:
    """Name of a picture by the bytes of its file: shards know no paths."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def mask_line(path: str, data: bytes, patch: int, covered: np.ndarray) -> dict[str, Any]:
    """What a file of masks says of one picture.

    Args:
        path: of the picture.
        data: its bytes.
        patch: pixels a side of a patch.
        covered: [height, width] informative pixels of each patch.
    """
    return {"picture": path, "id": picture_id(data), "patch": patch, "covered": covered.tolist()}


def read_masks(path: Path) -> dict[str, np.ndarray]:
    """Read a file of masks: by picture id the informative share of each patch, [height, width] fp64 in 0..1."""
    masks = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        masks[record["id"]] = np.array(record["covered"]) / record["patch"] ** 2
    return masks
