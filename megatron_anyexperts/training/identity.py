"""The settings a checkpoint was saved with, as a file in it, and what follows when a run that loads it has others."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_anyexperts.moe.config import AnyExpertsConfig
from megatron_anyexperts.training.arguments import UsageError, add_arguments, config_to_argv
from megatron_anyexperts.training.flag_classes import KINDS, Kind

FILE = "identity.json"
_OWN = frozenset(AnyExpertsConfig.__annotations__)
_ORDER = list(Kind)


class Unreadable(UsageError):
    """The file with a checkpoint's settings is damaged or written by hand."""


def classify(name: str) -> Kind:
    """The class of a flag, by its argparse destination; `Kind.EXECUTION` for flags outside the table."""
    return KINDS.get(name, Kind.EXECUTION)


@dataclass(frozen=True)
class Difference:
    """A flag whose value is not the one the checkpoint was saved with.

    Attributes:
        name: argparse destination.
        saved: value in the checkpoint.
        now: value of this run.
    """

    name: str
    saved: Any
    now: Any

    @property
    def kind(self) -> Kind:
        return classify(self.name)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Flags that both sides know and that differ, those that are refused first.

    A flag that one side lacks is new, gone, or without effect there; what makes the difference is another flag.
    """
    found = [
        Difference(name, saved[name], now[name])
        for name in saved.keys() & now.keys()
        if saved[name] != now[name] and classify(name) is not Kind.EXECUTION
    ]
    return sorted(found, key=lambda each: (_ORDER.index(each.kind), each.name))


def refused(
    found: Collection[Difference], resumed: bool, accepted: Collection[str] = (), change_schedule: bool = False
) -> list[Difference]:
    """Those differences that a run may not have.

    Args:
        found: from `differences`.
        resumed: the run goes on with optimizer, schedule and data; False when it takes the weights alone.
        accepted: destinations of the flags that ``--accept-change`` names.
        change_schedule: whether the run asks for another schedule.
    """
    forbidden = {Kind.SHAPES, Kind.MEANING}
    if resumed:
        forbidden |= {Kind.STATE} if change_schedule else {Kind.STATE, Kind.SCHEDULE}
    return [
        each for each in found if each.kind in forbidden and not (each.kind is Kind.MEANING and each.name in accepted)
    ]


def settings(args: argparse.Namespace, config: AnyExpertsConfig) -> dict[str, Any]:
    """Values of all flags that a checkpoint records, by destination, as JSON holds them.

    Args:
        args: Megatron's arguments, validated.
        config: the decoder's configuration made from them; what it derives (slot range, virtual experts) counts.
    """
    names = [name for name, kind in KINDS.items() if kind is not Kind.EXECUTION and hasattr(args, name)]
    values = {name: getattr(config if name in _OWN else args, name) for name in names}
    values["tokenizer_model"] = tokenizer_fingerprint(args.tokenizer_model)
    return _plain(values)


def of_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint of which some flags alone are known, by name and value as in a configuration file."""
    actions = {option: action for action in _actions() for option in action.option_strings}
    words = config_to_argv(flags, set(), actions)
    args, _ = _parser().parse_known_args(words)
    names = {actions[f"--{name}"].dest for name in flags}
    return _plain({name: getattr(args, name) for name in names if classify(name) is not Kind.EXECUTION})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON makes of the values, without those that act on nothing."""
    idle = _without_effect(values)
    return json.loads(json.dumps({name: value for name, value in values.items() if name not in idle}, default=str))


def _without_effect(values: Mapping[str, Any]) -> list[str]:
    names = ["anyexperts_alpha"] if values.get("anyexperts_learn_alpha") else []
    if values.get("step_batch_size_schedule"):
        names.append("global_batch_size")  # Megatron then fills it in by the number of ranks
    if values.get("position_embedding_type") != "learned_absolute":
        names.append("max_position_embeddings")
    for encoder, own in (("vision", ("patch_size", "spatial_merge")), ("audio", ("n_mels", "audio_stride"))):
        if not values.get(f"{encoder}_num_layers"):
            names += [*own, *(f"{encoder}_{size}" for size in ("hidden_size", "ffn_hidden_size", "num_heads"))]
    return names


def tokenizer_fingerprint(folder: str | None) -> str | None:
    """Hash of what ``tokenizer.json`` says, wherever it lies and however it is laid out; None without such a file.

    Cutting and padding are left out: the feed does neither.
    """
    file = Path(folder or "") / "tokenizer.json"
    if folder is None or not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def write(folder: Path, values: Mapping[str, Any]) -> None:
    """Put the settings into a checkpoint's folder, which is made when it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"version": 1, "settings": dict(values)}
    (folder / FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """The settings in a checkpoint's folder; None when it was saved without.

    Raises:
        Unreadable: the file is not what `write` writes.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Unreadable(f"{folder / FILE} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise Unreadable(f"{folder / FILE} holds no settings")
    return content["settings"]


def acceptable(flags: Collection[str]) -> set[str]:
    """Destinations of the flags that ``--accept-change`` names.

    Raises:
        UsageError: a name is no flag of `Kind.MEANING`, so there is nothing to accept.
    """
    result = set()
    for flag in flags:
        names = {action.dest for action in _actions() if f"--{flag.lstrip('-')}" in action.option_strings}
        kind = classify(next(iter(names))) if names else None
        if kind is not Kind.MEANING:
            why = f"it is one of {kind.value}" if kind else "there is no such flag"
            raise UsageError(f"--accept-change {flag}: {why}; name flags that change what weights mean, as rotary-base")
        result |= names
    return result


def describe(difference: Difference) -> str:
    """A difference by flag, such as ``--hidden-size 128 in the checkpoint, 96 now``."""
    action = _action(difference)
    if action is not None and action.nargs == 0:
        said = ["given" if value == action.const else "not given" for value in (difference.saved, difference.now)]
    else:
        said = ["not given" if value is None else str(value) for value in (difference.saved, difference.now)]
    content = "of content " if difference.name == "tokenizer_model" else ""
    return f"{flag_of(difference)} {content}{said[0]} in the checkpoint, {said[1]} now"


def flag_of(difference: Difference) -> str:
    """The flag to name for a difference; of a flag and its negation, the one that was or is given."""
    action = _action(difference)
    return action.option_strings[-1] if action else f"--{difference.name.replace('_', '-')}"


def _action(difference: Difference) -> argparse.Action | None:
    actions = [action for action in _actions() if action.dest == difference.name]
    given = [action for action in actions if action.nargs != 0 or action.const in (difference.saved, difference.now)]
    return next(iter(given or actions), None)


def default(name: str) -> Any:
    """The value of a flag that nobody sets, by argparse destination, before Megatron's validation."""
    return _parser().get_default(name)


def _actions() -> list[argparse.Action]:
    return _parser()._actions


@functools.cache
def _parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
