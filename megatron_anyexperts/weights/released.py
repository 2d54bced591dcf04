"""The folder of a released model beside its weights: config.json, tokenizer, settings of generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_anyexperts.training.arguments import UsageError
from megatron_anyexperts.weights.new_tokens import Extended

FOLDER = "hf"
"""Where a checkpoint that was imported keeps these files."""

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
_GENERATION = "generation_config.json"


def load_config(path: Path) -> dict[str, Any]:
    """Parse a config.json.

    Raises:
        UsageError: it cannot be read, or is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds no JSON object")
    return config


def write_companions(config: Mapping[str, Any], source: Path, target: Path, extended: Extended | None = None) -> None:
    """Write config.json, and copy the tokenizer and the settings of generation where `source` has them.

    Args:
        extended: the tokenizer instead of that of `source`; it is named in the other files.
    """
    target.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(extended.folder if extended else source, target)
    settings = load_config(source / _GENERATION) if (source / _GENERATION).is_file() else None
    for name, values in (("config.json", config), (_GENERATION, settings)):
        if values is not None:
            changed = extended.config(values) if extended else dict(values)
            (target / name).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, as far as `source` has them."""
    for name in TOKENIZER:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


def stored_as(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for weights of another type: names the type, and no quantisation."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype", "dtype")}
    return kept | {"dtype": dtype}
