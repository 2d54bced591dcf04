"""Parameters by part, and over which ranks each is spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_anyexperts.checks.plan_sizes import EncoderSizes, ModelSizes


@dataclass(frozen=True)
class Parameters:
    """Parameters of one part of the model.

    Attributes:
        part: what they belong to, for people.
        number: of the whole model's layer, before it is split.
        spread: `tensor`: over tensor-parallel ranks; `expert`: over expert and expert-tensor ranks; `whole`: each rank
            has all of them.
        wide: they stay fp32 in a bf16 model.
    """

    part: str
    number: int
    spread: Literal["tensor", "expert", "whole"] = "whole"
    wide: bool = False

    def local(self, tensor: int, expert: int) -> float:
        """Of one rank."""
        return self.number / {"tensor": tensor, "expert": expert, "whole": 1}[self.spread]


def layer_parameters(sizes: ModelSizes, letter: str) -> Iterator[Parameters]:
    """Of one layer with its norm."""
    yield Parameters("norms", sizes.norm * sizes.hidden)
    if letter == "*":
        yield from _attention(sizes)
    elif letter == "-":
        yield Parameters("dense MLPs", sizes.matrices * sizes.hidden * sizes.ffn, "tensor")
    else:
        yield from _mixture(sizes)


def _attention(sizes: ModelSizes) -> Iterator[Parameters]:
    hidden, latent = sizes.hidden, sizes.latent
    yield Parameters("norms", sizes.norm * sizes.head_norm)
    yield Parameters("attention", hidden * sizes.value_width, "tensor")
    if latent is None:
        yield Parameters("attention", hidden * (sizes.query_width + sizes.kv_width), "tensor")
        return
    rank = latent.query_rank
    yield Parameters("attention", (hidden if rank is None else rank) * sizes.query_width, "tensor")
    yield Parameters("attention", latent.kv_rank * sizes.heads * (latent.plain + latent.value), "tensor")
    yield Parameters("attention", hidden * ((rank or 0) + latent.kv_rank + latent.rotary))


def _mixture(sizes: ModelSizes) -> Iterator[Parameters]:
    hidden, mixture = sizes.hidden, sizes.mixture
    read = mixture.latent or hidden
    yield Parameters("routed experts", mixture.experts * sizes.matrices * read * mixture.ffn, "expert")
    if mixture.shared:
        yield Parameters("shared experts", sizes.matrices * hidden * mixture.shared, "tensor")
    if mixture.latent:
        yield Parameters("latent projections", 2 * hidden * mixture.latent)
    yield Parameters("routers", hidden * (mixture.experts + mixture.virtual + mixture.vectors))
    if width := mixture.importance:
        yield Parameters("importance", width * hidden + 2 * width + 1 + mixture.learns_alpha, wide=True)


def encoder_parameters(encoder: EncoderSizes, name: str, output: int, norm: int) -> Iterator[Parameters]:
    """Of an encoder and its projector to `output` values."""
    hidden = encoder.hidden
    yield Parameters(f"{name} encoder", encoder.front + norm * hidden * (2 * encoder.layers + 1))
    yield Parameters(f"{name} encoder", encoder.layers * (4 * hidden**2 + 2 * hidden * encoder.ffn), "tensor")
    yield Parameters(f"{name} projector", (encoder.merged * hidden + output) * output, "tensor")


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds: letters of its layers, and whether embedding and output are among it."""

    letters: str
    first: bool
    last: bool


def stages(sizes: ModelSizes, pipeline: int) -> list[Stage] | None:
    """The layers of every pipeline rank; None where they cannot be divided.

    Chunks between `|` are dealt out in turn, as an interleaved schedule does; a pattern without `|` is cut evenly.
    """
    chunks = sizes.pattern.partition("/")[0].split("|")
    if len(chunks) == 1:
        letters = chunks[0]
        if len(letters) % pipeline:
            return None
        size = len(letters) // pipeline
        chunks = [letters[start : start + size] for start in range(0, len(letters), size)]
    if len(chunks) % pipeline:
        return None
    return [
        Stage("".join(chunks[rank::pipeline]), first=rank == 0, last=rank == pipeline - 1) for rank in range(pipeline)
    ]


def stage_parameters(sizes: ModelSizes, stage: Stage) -> Iterator[Parameters]:
    """Of all that a pipeline rank holds."""
    for letter in stage.letters:
        yield from layer_parameters(sizes, letter)
    rows = sizes.hidden * sizes.vocabulary
    if stage.first or (stage.last and sizes.prediction):
        yield Parameters("embedding", rows, "tensor")
    if stage.first:
        for name in ("vision", "audio"):
            if encoder := getattr(sizes, name):
                yield from encoder_parameters(encoder, name, sizes.hidden, sizes.norm)
    if not stage.last:
        return
    yield Parameters("norms", sizes.norm * sizes.hidden)
    if not sizes.tied or not (stage.first or sizes.prediction):
        yield Parameters("output layer", rows, "tensor")
    for letters in sizes.prediction:
        for letter in letters:
            yield from layer_parameters(sizes, letter)
        yield Parameters("norms", 3 * sizes.norm * sizes.hidden)
        yield Parameters("multi-token prediction", 2 * sizes.hidden**2, "tensor")


def by_part(sizes: ModelSizes) -> dict[str, int]:
    """Parameters of the whole model by part, largest first."""
    return total(stage_parameters(sizes, Stage(sizes.decoder, True, True)))


def total(parameters: Iterable[Parameters]) -> dict[str, int]:
    """Numbers by part, largest first."""
    found: Counter[str] = Counter()
    for each in parameters:
        found[each.part] += each.number
    return {part: number for part, number in found.most_common() if number}
