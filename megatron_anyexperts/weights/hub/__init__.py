"""The code of an exported model: transformers loads it from the model's folder, where this project is not installed.

It imports torch, transformers and itself alone. As `slots` and `scores`, which it imports as neighbours, an export
writes those of `moe`: one definition serves training and what comes of it.
"""

from pathlib import Path

DEFINITIONS = Path(__file__).parents[2] / "moe"
__path__.append(str(DEFINITIONS))
