"""How many nodes of an allocation training can use, and with which expert parallelism."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_anyexperts.config_search import BASE, find_config
from megatron_anyexperts.data.config import DataConfig

# Values, as YAML 1.1 reads them, with which the configuration leaves a flag out.
_ABSENT = {"", "~"} | {form for word in ("null", "false", "no", "off") for form in (word, word.title(), word.upper())}
_PLAIN_KEY = re.compile(r"([A-Za-z][A-Za-z0-9_-]*) *:(?: +(.*))?$")
_NUMBER = re.compile("[1-9][0-9]*")
# One line that YAML reads as one value: quoted or in brackets and closed, or plain without a sign that means something.
_VALUE = re.compile(r"""("[^"\\]*"|'[^']*'|\[[^\[\]{}"'#]*\]|[^\s"'\[\]{}&*!|>%@`#,?-][^"'#]*|-[^\s"'#-][^"'#]*)?""")


_SHAPING = {
    *(f"{kind}-model-parallel-size" for kind in ("tensor", "pipeline", "expert")),
    *("context-parallel-size", "global-batch-size", "micro-batch-size", "data-streams"),
}
"""Flags that `Shape` is read from."""


@dataclass(frozen=True)
class Shape:
    """What a run needs to hold whatever the number of ranks is. Sizes are Megatron's flags of the same name."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    global_batch: int | None = None
    """None when the command does not say; then any size passes here and Megatron judges."""
    micro_batch: int = 1
    data_streams: int | None = None
    """Logical streams of the loader; the data-parallel size must divide it. None when it does not matter."""

    @classmethod
    def from_flags(cls, flags: Mapping[str, str]) -> Shape:
        """Read it from flag names without dashes in front; absent ones have the defaults that training gives them."""

        def number(name: str, default: int | None = 1) -> int | None:
            return int(flags[name]) if name in flags else default

        return cls(
            number("tensor-model-parallel-size"),
            number("pipeline-model-parallel-size"),
            number("context-parallel-size"),
            number("expert-model-parallel-size"),
            number("global-batch-size", None),
            number("micro-batch-size"),
            number("data-streams", DataConfig.data_streams),
        )


@dataclass(frozen=True)
class Layout:
    """Nodes to use and the expert-parallel size that fits them."""

    nodes: int
    expert: int


def fit(available: int, ranks_per_node: int, shape: Shape, minimum: int = 1) -> Layout:
    """The largest layout that `available` nodes allow and that leaves batches and data order as they are.

    Tensor, pipeline and context parallelism stay as they are. The global batch must remain a multiple of
    data-parallel size x micro batch, and the data-parallel size must divide the logical data streams. Expert
    parallelism shrinks to the largest divisor of its wanted size that fits.

    Args:
        available: healthy nodes.
        ranks_per_node: ranks that srun starts on each.
        shape: what the run needs.
        minimum: fewest nodes worth starting on.

    Raises:
        ValueError: no number of nodes from `minimum` to `available` fits.
    """
    model = shape.tensor * shape.pipeline * shape.context
    for nodes in range(available, minimum - 1, -1):
        data, rest = divmod(nodes * ranks_per_node, model)
        if rest or not data:
            continue
        if shape.global_batch is not None and shape.global_batch % (data * shape.micro_batch):
            continue
        if shape.data_streams is not None and shape.data_streams % data:
            continue
        # Expert parallelism spans tensor, context and data ranks of one pipeline stage.
        stage = nodes * ranks_per_node // shape.pipeline
        expert = max(size for size in range(1, shape.expert + 1) if shape.expert % size == 0 and stage % size == 0)
        return Layout(nodes, expert)
    raise ValueError(
        f"no layout for {minimum} to {available} nodes of {ranks_per_node} ranks: ranks must be a multiple of "
        f"{model} (tensor x pipeline x context), and the data-parallel size must divide "
        f"global batch {shape.global_batch} / micro batch {shape.micro_batch} and {shape.data_streams} data streams"
    )


def read_flags(words: list[str], config_text: str = "", path: Path | None = None) -> dict[str, str]:
    """Scalar flags of a training command: from its YAML config without what `--unset` drops, then its own words.

    Only the standard library is at hand here, so the configuration is read as lines of `key: value` (and lists of
    lines `- value`) and everything else that YAML allows is refused; the ranks read it with a full parser.

    Args:
        words: command line after the program, such as ["--config", "x.yaml", "--micro-batch-size", "1"].
        config_text: content of the YAML file, which names flags one to one at its top level, or its base.
        path: of that file; its base may be named relative to it.

    Raises:
        ValueError: names the line that is something else, or the flag of the layout whose value is no whole number.
    """
    given, unset = _read_words(words)
    config = _with_base(config_text, (path,) if path else ())
    flags = {name: value for name, value in config.items() if value and name not in unset} | given
    for name in _SHAPING & flags.keys():
        if not _NUMBER.fullmatch(flags[name]):
            raise ValueError(f"{name} {flags[name]!r} is not a whole number from 1, written as `{name}: 8`")
    return flags


def config_path(words: list[str]) -> Path | None:
    """The file that `--config` names in a training command.

    Raises:
        ValueError: there is none of that name.
    """
    name = _read_words(words)[0].get("config")
    return None if name is None else find_config(name)


def _with_base(text: str, readers: tuple[Path, ...]) -> dict[str, str]:
    own = _read_config(text)
    if not (base := own.pop(BASE, "")):
        return own
    path = find_config(base, readers[-1].parent if readers else None, readers)
    return _with_base(path.read_text(encoding="utf-8"), (*readers, path)) | own


def _read_words(words: list[str]) -> tuple[dict[str, str], set[str]]:
    """Flags with the word that follows each, and the names that `--unset` drops."""
    given: dict[str, str] = {}
    unset = set()
    for position, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals:
                value = words[position + 1] if position + 1 < len(words) else ""
            if name == "unset":
                unset.add(value.replace("_", "-"))
            else:
                given[name.replace("_", "-")] = value
    return given, unset


def _read_config(text: str) -> dict[str, str]:
    """Names and values of a configuration, empty for those that it leaves out; a list is only said to be one."""
    found: dict[str, str] = {}
    listing = ""  # the key whose list the next lines may be
    for number, line in enumerate(text.splitlines(), 1):
        content = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not content:
            continue
        if key := _PLAIN_KEY.match(content):
            name, value = key[1].replace("_", "-"), key[2] or ""
        else:
            name, value = listing, content.strip().removeprefix("- ") if content.lstrip().startswith("- ") else "?"
        # Any other line could go on with the one before in ways that only a YAML parser knows.
        if not name or not _VALUE.fullmatch(value) or (key and name in found):
            raise ValueError(
                f"line {number} of the configuration, {line.strip()!r}: write each flag once and on one line, as "
                "`key: value`, for the launcher reads no other YAML"
            )
        listing = name if not key or not value else ""
        absent = key and value in _ABSENT
        found[name] = "" if absent else (value[1:-1] if value[0] in "\"'" else value) if key else "a list"
    return found
