"""Plan a mixture of corpora for a token budget: a pure function from shares and sizes to epochs, weights and load."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from megatron_anyexperts import described
from megatron_anyexperts.corpus.finish import CRUDE_CONFIG
from megatron_anyexperts.corpus.sample import DOCUMENT_KIND, KINDS
from megatron_anyexperts.corpus.verify import read_manifest
from megatron_anyexperts.media import MODALITIES


class MixtureError(ValueError):
    """A mixture description cannot be used; the message says what to change."""


def _count(value: Any) -> Any:
    # YAML reads 1e12 as text, and 1.0e+12 as a fraction.
    if isinstance(value, str | float):
        number = float(value)
        return int(number) if number.is_integer() else value
    return value


Count = Annotated[int, BeforeValidator(_count), Field(le=10**18)]
"""Larger numbers than any corpus has, and whose products are still floating-point numbers, are refused."""


class Planned(described.Section):
    """A kind of samples of a corpus that is not built yet."""

    samples: Count = Field(gt=0)
    bytes: Count = Field(gt=0)
    tokens: dict[str, Count]
    """Tokens by modality."""
    shards: Count = Field(1, gt=0)


class Stage(described.Section):
    """A stretch of training with its own mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    tokens: Count = Field(gt=0)
    shares: dict[str, float] = Field(min_length=1)
    """Corpus, or corpus/kind, and its share of the stage's tokens; shares are normalised."""


class Training(described.Section):
    """What the loader has to serve."""

    global_batch: Count = Field(gt=0)
    """Sequences per step."""
    sequence_length: Count = Field(gt=0)
    """Tokens per sequence."""
    step_seconds: float = Field(gt=0)
    data_parallel: Count = Field(1, gt=0)
    """Data-parallel ranks; each reads its part."""
    ranks_per_node: Count = Field(8, gt=0)
    fill: float = Field(0.95, gt=0, le=1)
    """Share of a packed sequence that holds samples."""


class Mixture(described.Section):
    """Corpora, stages and training set-up."""

    corpora: dict[str, Path] = {}
    """Name -> folder of a built corpus."""
    planned: dict[str, dict[str, Planned]] = {}
    """Name -> sizes by kind of a corpus that is not built yet."""
    stages: list[Stage] = Field(min_length=1)
    training: Training
    max_epochs: float = Field(4.0, gt=0)
    """Repetitions of the same data over all stages from which a warning is given. Four is where Muennighoff et al.
    (Scaling Data-Constrained Language Models, 2023) begin to see a clear loss against fresh text."""


@dataclass(frozen=True)
class Part:
    """The training split of one kind of samples of one corpus."""

    corpus: str
    kind: str
    samples: int
    bytes: int
    shards: int
    tokens: dict[str, int]
    folder: Path | None
    has_validation: bool

    @property
    def name(self) -> str:
        """Corpus and kind."""
        return f"{self.corpus}/{self.kind}"

    @property
    def total_tokens(self) -> int:
        """Tokens of all modalities."""
        return sum(self.tokens.values())


@dataclass(frozen=True)
class Use:
    """How much a stage takes from a part."""

    part: Part
    tokens: int
    """Tokens read in this stage."""
    epochs: float
    """How often the part is read in this stage."""
    samples: int
    weight: float
    """Probability that a sample of the stage comes from this part; what Energon calls weight."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage reads and what that asks of the loader."""

    name: str
    tokens: int
    uses: list[Use]
    steps: int
    samples: int
    bytes: int
    modality_tokens: dict[str, int]
    samples_per_second: float
    bytes_per_second: float
    tokens_per_second: float


def load_mixture(path: Path) -> Mixture:
    """Read a mixture description.

    Raises:
        MixtureError: it is missing, is not YAML, or has an unknown key or an impossible value.
    """
    try:
        document = described.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MixtureError(f"{path}: cannot read it: {error}") from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise MixtureError(
            f"{path}: it is {type(document).__name__}, not a mapping of {', '.join(Mixture.model_fields)}"
        )
    try:
        mixture = Mixture(**document)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc']))}={problem['input']!r}: {problem['msg']}" for problem in error.errors()
        )
        raise MixtureError(f"{path}: {'; '.join(problems)}") from None
    names = Counter(stage.name for stage in mixture.stages)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise MixtureError(f"{path}: two stages are named {repeated[0]!r}; each has a blend of its own, rename one")
    return mixture


def corpus_parts(mixture: Mixture, root: Path) -> dict[str, list[Part]]:
    """Parts of every corpus; folders are relative to `root`.

    Raises:
        MixtureError: a corpus is not built, or names an unknown kind or modality.
    """
    built = {name: list(_built_parts(name, root / folder)) for name, folder in mixture.corpora.items()}
    planned = {name: list(_planned_parts(name, kinds)) for name, kinds in mixture.planned.items()}
    if both := sorted(built.keys() & planned.keys()):
        raise MixtureError(f"{', '.join(both)}: both in corpora and in planned; keep one of them")
    return built | planned


def _planned_parts(name: str, kinds: dict[str, Planned]) -> Iterator[Part]:
    for kind, planned in kinds.items():
        if kind not in KINDS:
            raise MixtureError(f"planned.{name}: kind {kind!r} is none of {', '.join(KINDS)}")
        if unknown := set(planned.tokens) - set(MODALITIES):
            raise MixtureError(f"planned.{name}.{kind}: tokens of {sorted(unknown)}; use {', '.join(MODALITIES)}")
        if min(planned.tokens.values(), default=0) < 0 or not any(planned.tokens.values()):
            raise MixtureError(f"planned.{name}.{kind}: tokens={planned.tokens} must be positive")
        tokens = {modality: planned.tokens.get(modality, 0) for modality in MODALITIES}
        yield Part(name, kind, planned.samples, planned.bytes, planned.shards, tokens, None, False)


def _built_parts(name: str, folder: Path) -> Iterator[Part]:
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        raise MixtureError(f"corpora.{name}: {error}") from None
    for kind, splits in manifest["kinds"].items():
        if "train" in splits:
            entry = splits["train"]
            sizes = (entry["samples"], entry["bytes"], entry["shards"], entry["tokens"])
            yield Part(name, kind, *sizes, folder, "val" in splits)


def plan_stage(stage: Stage, corpora: dict[str, list[Part]], training: Training) -> StagePlan:
    """Turn the shares of a stage into samples, epochs, weights and the load on the loader.

    A share of a corpus is divided among its kinds by their tokens, so that all are repeated equally often.

    Raises:
        MixtureError: a share names no known corpus or kind, or one without tokens, is no number from 0 up, or is too
            small for a token of the stage; all are zero; or a step holds no token.
    """
    parts = {part.name: part for listed in corpora.values() for part in listed}
    by_name: dict[str, float] = {}
    for name, share in stage.shares.items():
        if not 0 <= share < math.inf:
            raise MixtureError(f"stage {stage.name}: share {name}={share} is negative or no number; use 0 or more")
        chosen = corpora.get(name) or ([parts[name]] if name in parts else [])
        if not chosen:
            known = sorted({*corpora, *parts})
            raise MixtureError(
                f"stage {stage.name}: {name!r} is no corpus and no corpus/kind; known: {', '.join(known)}"
            )
        total = sum(part.total_tokens for part in chosen)
        if total == 0:
            raise MixtureError(f"stage {stage.name}: {name} holds no token")
        for part in chosen if share else ():
            if part.total_tokens:
                by_name[part.name] = by_name.get(part.name, 0.0) + share * (part.total_tokens / total)
    whole = sum(by_name.values())
    if not by_name:
        raise MixtureError(f"stage {stage.name}: all shares are zero")
    if whole == 0:
        raise MixtureError(f"stage {stage.name}: the shares add up to zero in floating point; use larger ones")
    if whole == math.inf:
        raise MixtureError(f"stage {stage.name}: the shares add up to {whole:g}; only their proportions count")
    taken = _apportion(stage.tokens, {name: share / whole for name, share in by_name.items()})
    if tiny := [name for name, tokens in taken.items() if tokens <= 0]:
        raise MixtureError(
            f"stage {stage.name}: share of {tiny[0]} is {by_name[tiny[0]] / whole:.3g} of {stage.tokens} tokens, less "
            "than one token; raise it, or leave it out (by naming the other kinds of its corpus)"
        )
    drawn = {name: tokens * parts[name].samples / parts[name].total_tokens for name, tokens in taken.items()}
    all_drawn = sum(drawn.values())
    uses = [
        Use(parts[name], tokens, tokens / parts[name].total_tokens, round(drawn[name]), drawn[name] / all_drawn)
        for name, tokens in taken.items()
    ]
    per_step = training.global_batch * training.sequence_length * training.fill
    if per_step < 1:
        raise MixtureError(
            f"training: global_batch x sequence_length x fill = {per_step:g} tokens a step; it must be at least 1"
        )
    steps = -(-stage.tokens // int(per_step))
    seconds = steps * training.step_seconds
    read = sum(use.epochs * use.part.bytes for use in uses)
    modality = {name: round(sum(use.epochs * use.part.tokens[name] for use in uses)) for name in MODALITIES}
    return StagePlan(
        stage.name,
        stage.tokens,
        uses,
        steps,
        round(all_drawn),
        round(read),
        modality,
        all_drawn / seconds,
        read / seconds,
        stage.tokens / seconds,
    )


def _apportion(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers proportional to shares that add up to the total (largest remainder)."""
    exact = {name: total * share for name, share in shares.items()}
    result = {name: int(value) for name, value in exact.items()}
    left = total - sum(result.values())
    by_remainder = sorted(exact, key=lambda name: (result[name] - exact[name], name))
    # Floating-point rounding of trillions can leave more, or less, than one unit each.
    share, extra = divmod(left, len(result))
    for number, name in enumerate(by_remainder):
        result[name] += share + (number < extra)
    return result


def warnings(mixture: Mixture, plans: list[StagePlan]) -> list[str]:
    """What is unwise: data repeated too often, ranks without a shard."""
    epochs: Counter[str] = Counter()
    parts = {}
    for plan in plans:
        for use in plan.uses:
            epochs[use.part.name] += use.epochs
            parts[use.part.name] = use.part
    found = [
        f"{name} is repeated {count:.1f} times over all stages, max_epochs is {mixture.max_epochs:g}: "
        f"lower its share, or add {(count / mixture.max_epochs - 1) * parts[name].total_tokens:,.0f} tokens"
        for name, count in epochs.items()
        if count > mixture.max_epochs
    ]
    ranks = mixture.training.data_parallel
    found += [
        f"{name} has {part.shards} shards for {ranks} data-parallel ranks: several ranks read the same shard; "
        "build it with smaller `shards`"
        for name, part in parts.items()
        if part.shards < ranks
    ]
    return found


def blend(plans: list[StagePlan], folder: Path) -> dict[str, Any]:
    """Energon blend of a stage, or of several with weights that hold for all of them together.

    Args:
        plans: of the stages.
        folder: where the blend file will lie; paths are relative to it.

    Raises:
        MixtureError: a corpus of a stage is not built yet.
    """
    drawn: Counter[str] = Counter()
    parts = {}
    for plan in plans:
        for use in plan.uses:
            parts[use.part.name] = use.part
            drawn[use.part.name] += use.weight * plan.samples
    splits: dict[str, Any] = {"train": {"blend": []}, "val": {"blend": []}}
    for name, part in parts.items():
        if part.folder is None:
            stages = ", ".join(plan.name for plan in plans)
            raise MixtureError(f"stage {stages}: {name} is not built yet, so there is nothing to blend")
        entry = {
            "path": str((part.folder / part.kind).resolve().relative_to(folder.resolve(), walk_up=True)),
            "dataset_config": CRUDE_CONFIG,
            "weight": drawn[name] / drawn.total(),
            "subflavors": {"kind": _document_kind(part), "corpus": part.corpus},
        }
        splits["train"]["blend"].append(entry)
        if part.has_validation:
            splits["val"]["blend"].append(copy.deepcopy(entry))
    if not splits["val"]["blend"]:
        del splits["val"]
    return {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}


def schedule(plans: list[StagePlan], training: Training) -> dict[str, Any]:
    """Content of a mixture schedule (see `data.mixture_schedule`) that runs the stages one after the other.

    Args:
        plans: of the stages, in order.
        training: of the mixture.
    """
    stages, row = [], 0
    for plan in plans:
        weights = {f"{use.part.corpus}/{_document_kind(use.part)}": use.weight for use in plan.uses}
        stages.append({"at_row": row, "weights": weights})
        row += plan.steps * training.global_batch
    return {"stages": stages}


def _document_kind(part: Part) -> str:
    return DOCUMENT_KIND.get(part.kind, part.kind)
