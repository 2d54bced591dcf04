"""All quantities of one trace, or of several checkpoints on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_anyexperts.analysis.routing import coactivation, specialisation
from megatron_anyexperts.analysis.routing.balance import measure_balance
from megatron_anyexperts.analysis.routing.classifier import TooFewSamples, measure_classifier
from megatron_anyexperts.analysis.routing.intervals import Measured
from megatron_anyexperts.analysis.routing.signatures import cosines, measure_similarity, signatures
from megatron_anyexperts.analysis.routing.slot_use import CLASSES, measure_slots, position_bins, token_classes
from megatron_anyexperts.analysis.routing.stability import measure_fluctuation, measure_saturation
from megatron_anyexperts.analysis.routing.table import RoutingTable
from megatron_anyexperts.media import MODALITIES


@dataclass
class Findings:
    """What a trace says.

    Attributes:
        figures: by quantity, then by what it is of, such as a layer.
        matrices: what is drawn: by name a matrix, the names of its rows, and of its columns.
        left_out: why a quantity is not there.
    """

    figures: dict[str, dict[str, Measured]] = field(default_factory=dict)
    matrices: dict[str, tuple[np.ndarray, list[str], list[str]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def analyse(table: RoutingTable, decode: Callable[[int], str] | None = None, seed: int = 0) -> Findings:
    """Measure everything that one trace allows.

    Args:
        table: of one checkpoint, or of one step.
        decode: text of a token id; without it there are no classes of tokens.
        seed: of all draws.
    """
    found = Findings()
    _signatures(found, table, seed)
    _experts(found, table, seed)
    _slots(found, table, decode, seed)
    return found


def compare(tables: Sequence[RoutingTable], names: Sequence[str], seed: int = 0) -> Findings:
    """Saturation and fluctuation over checkpoints, the last of which is the end.

    Args:
        tables: of the same tokens in the same order, from `shared_tokens`.
        names: of the checkpoints.
        seed: of all draws.
    """
    found, end = Findings(), tables[-1]
    for number, (table, name) in enumerate(zip(tables[:-1], names[:-1], strict=True)):
        for place, layer in enumerate(end.layers):
            of = f"{name}, layer {layer}"
            sample_N, samples = end.sample_N, len(end.samples)
            found.figures.setdefault("saturation", {})[of] = measure_saturation(
                table.active_LNE[place], end.active_LNE[place], sample_N, samples, seed
            )
            found.figures.setdefault("fluctuation from here on", {})[of] = measure_fluctuation(
                np.stack([each.top_LN[place] for each in tables]), number, sample_N, samples, seed
            )
    return found


def _signatures(found: Findings, table: RoutingTable, seed: int) -> None:
    tasks = np.unique(table.tasks)
    if len(tasks) < 2 or len(table.samples) < 4:
        found.left_out.append(f"signatures and domains: {len(tasks)} task, {len(table.samples)} samples")
        return
    arguments = (table.active_LNE, table.sample_N, table.tasks)
    found.figures["signatures: cosine similarity"] = measure_similarity(*arguments, seed)
    try:
        found.figures["task from signature: accuracy"] = measure_classifier(*arguments, table.layers, seed)
    except TooFewSamples as error:
        found.left_out.append(f"task classifier: {error}")
    except ImportError:
        found.left_out.append("task classifier: pip install megatron-anyexperts[analysis]")
    similar_PP = cosines(signatures(table.active_LNE, table.sample_N, len(table.samples)))
    means = [[similar_PP[np.ix_(table.tasks == one, table.tasks == other)].mean() for other in tasks] for one in tasks]
    found.matrices["similarity of signatures"] = (np.array(means), tasks.tolist(), tasks.tolist())


def _experts(found: Findings, table: RoutingTable, seed: int) -> None:
    sample_N, samples, experts = table.sample_N, len(table.samples), [str(each) for each in range(table.experts)]
    tasks, task_P = np.unique(table.tasks, return_inverse=True)
    kinds = [name for name in MODALITIES if (table.modality_N == name).any()]
    kind_N = np.searchsorted(np.sort(kinds), table.modality_N)
    text = table.take(table.modality_N == "text") if "text" in kinds else None
    for place, number in enumerate(table.layers):
        active_NE, name = table.active_LNE[place], f"layer {number}"

        def put(quantity: str, value: Measured, name: str = name) -> None:
            found.figures.setdefault(quantity, {})[name] = value

        for quantity, value in measure_balance(active_NE, sample_N, samples, seed).items():
            put(f"load: {quantity}", value)
        put("co-activation: strongest partner", coactivation.measure_coactivation(active_NE, sample_N, samples, seed))
        pairs = coactivation.coactivation(coactivation.pair_counts(active_NE))
        found.matrices[f"co-activation, {name}"] = (pairs, experts, experts)
        if len(tasks) > 1:
            value = specialisation.measure_domains(active_NE, sample_N, task_P, seed)
            put("domain specialisation: spread of shares", value)
            counts = specialisation.group_counts(active_NE, task_P[sample_N], len(tasks))
            shares = specialisation.shares(*counts)
            found.matrices[f"domain specialisation, {name}"] = (shares, tasks.tolist(), experts)
        if len(kinds) > 1:
            value = specialisation.measure_kinds(active_NE, sample_N, kind_N, samples, seed)
            put("modality specialisation: spread of shares", value)
            shares = specialisation.shares(*specialisation.group_counts(active_NE, kind_N, len(kinds)))
            found.matrices[f"modality specialisation, {name}"] = (shares, sorted(kinds), experts)
        if text is not None:
            value = specialisation.measure_vocabulary(
                text.active_LNE[place], text.sample_N, text.token_N, len(text.samples), seed
            )
            if np.isfinite(value.value):
                put("vocabulary specialisation", value)


def _slots(found: Findings, table: RoutingTable, decode: Callable[[int], str] | None, seed: int) -> None:
    groupings = [("position", *position_bins(table.place_N), table)]
    kinds = sorted(set(table.modality_N.tolist()))
    groupings.append(("modality", np.searchsorted(kinds, table.modality_N), kinds, table))
    if decode is None:
        found.left_out.append("classes of tokens: no tokenizer; name one with --tokenizer")
    elif "text" in kinds:
        text = table.take(table.modality_N == "text")
        groupings.append(("class of token", token_classes(text.token_N, text.place_N, decode), CLASSES, text))
    for name, group_N, names, part in groupings:
        mean_N = part.real_LN.mean(0)
        found.figures[f"real slots by {name}"] = measure_slots(
            mean_N, group_N, names, part.sample_N, len(part.samples), seed
        )
