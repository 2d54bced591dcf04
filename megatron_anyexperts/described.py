"""Descriptions that people write in YAML, read so that nothing in them is dropped or taken for something else."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, field_validator


def load(text: str) -> Any:
    """Parse a description.

    Raises:
        yaml.YAMLError: it is not YAML, holds a value that YAML cannot convert, or says a key twice.
    """
    try:
        _refuse_repetition(yaml.compose(text, Loader=yaml.SafeLoader), set())
        return yaml.safe_load(text)
    except (ValueError, TypeError, RecursionError) as error:  # such as a date of month 13
        raise yaml.YAMLError(str(error)) from error


def _refuse_repetition(node: yaml.Node | None, seen: set[int]) -> None:
    """YAML's parser keeps the last of several values of one key."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            _refuse_repetition(value, seen)
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    place = f"lines {key.start_mark.line + 1} and before"
                    raise yaml.YAMLError(f"{key.value!r} is there twice ({place}), and only one can count")
                keys.add(key.value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repetition(item, seen)


class Section(BaseModel):
    """A part of a description: unknown keys, infinite numbers, and yes or no for a number are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any) -> Any:
        for each in value.values() if isinstance(value, dict) else (value,):
            if isinstance(each, bool):
                raise ValueError(f"{'yes' if each else 'no'} is no number")
        return value
