"""How many nodes of an allocation training can use, and with which expert parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_anyexperts.data.config import DataConfig

_ABSENT = ("", "null", "~", "false")  # values with which the configuration leaves a flag out


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


def read_flags(words: list[str], config_text: str = "") -> dict[str, str]:
    """Scalar flags of a training command: from its flat YAML config without what `--unset` drops, then its own words.

    Args:
        words: command line after the program, such as ["--config", "x.yaml", "--micro-batch-size", "1"].
        config_text: content of the YAML file, which names flags one to one at its top level.
    """
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
    flags = {}
    for line in config_text.splitlines():
        name, colon, value = line.partition(":")
        value = value.split(" #")[0].strip()
        if colon and value not in _ABSENT and not name.startswith((" ", "#", "-")):
            flags[name.strip().replace("_", "-")] = value
    return {name: value for name, value in flags.items() if name not in unset} | given
