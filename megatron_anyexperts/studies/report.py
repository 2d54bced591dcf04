"""Tables of a study, from its ledger alone: means over seeds with standard errors, and paired differences."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from megatron_anyexperts.studies import ledger
from megatron_anyexperts.studies.declaration import Figure, Run, Study, StudyError

BEGIN, END = "<!-- begin: anyexperts study report -->", "<!-- end: anyexperts study report -->"


def value(results: Any, path: str) -> float:
    """The number at a dotted path; `*` takes the mean over all keys.

    Returns:
        NaN where there is none: a run need not have every figure.
    """
    name, _, rest = path.partition(".")
    if not path:
        return float(results) if isinstance(results, int | float) else math.nan
    if not isinstance(results, dict):
        return math.nan
    if name == "*":
        return statistics.fmean(value(each, rest) for each in results.values()) if results else math.nan
    return value(results.get(name), rest)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of numbers that are independent; the error of one number is NaN."""
    if not values:
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def paired(ours: dict[int, float], base: dict[int, float]) -> list[float]:
    """Differences seed by seed, of the seeds that both have."""
    return [ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())]


def shown(values: list[float], figure: Figure, signed: bool = False) -> str:
    """Mean and error as text; "-" for what was not measured."""
    mean, error = mean_and_error([each * figure.scale for each in values if math.isfinite(each)])
    if math.isnan(mean):
        return "-"
    text = f"{mean:{'+' if signed else ''}.{figure.digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{figure.digits}f}"


def columns(study: Study, found: dict[Run, dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Numbers by setting, figure and seed; settings without a run are left out."""
    table: dict[str, dict[str, dict[int, float]]] = {}
    for run in study.runs:
        if run in found:
            for name, figure in study.figures.items():
                number = value(found[run]["results"], figure.path)
                table.setdefault(run.setting, {}).setdefault(name, {})[run.seed] = number
    return table


def page(study: Study, path: Path, ledger_path: Path) -> str:
    """The generated part of a study's page, as Markdown.

    Args:
        path: the declaration, as the page names it.
        ledger_path: its ledger.

    Raises:
        StudyError: the ledger holds none of the study's runs.
    """
    records, notes = ledger.read(ledger_path)
    found, others = ledger.of_study(study, records)
    if not found:
        raise StudyError(f"{ledger_path} holds none of the runs that {path} declares")
    table = columns(study, found)
    base = table.get(study.compare_with, {})
    less = {
        setting: {name: paired(figures[name], base.get(name, {})) for name in study.figures}
        for setting, figures in table.items()
        if setting != study.compare_with
    }
    means = {setting: {name: list(each.values()) for name, each in row.items()} for setting, row in table.items()}
    lines = [f"**Asked**: {study.question}", "", f"**A yes would be** (written before the runs): {study.criterion}", ""]
    lines += ["Means over seeds, with standard errors from two seeds on.", "", *_table(study, means, signed=False)]
    if base and less:
        lines += ["", f"Less *{study.compare_with}*, seed by seed.", "", *_table(study, less, signed=True)]
    lines += ["", *_about(study, path, ledger_path, found), *(f"Not counted: {note}." for note in notes)]
    if others:
        lines.append(f"Not counted: {others} lines of runs that are declared differently now.")
    return "\n".join(lines)


def _table(study: Study, columns: dict[str, dict[str, list[float]]], signed: bool) -> list[str]:
    seeds = [max(map(len, figures.values())) for figures in columns.values()]
    lines = [_row("", *columns), _row(*["---"] * (len(columns) + 1)), _row("seeds", *seeds)]
    for name, figure in study.figures.items():
        lines.append(_row(name, *(shown(figures[name], figure, signed) for figures in columns.values())))
    return lines


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _about(study: Study, path: Path, ledger_path: Path, found: dict[Run, dict[str, Any]]) -> list[str]:
    commits = sorted({record["commit"] for record in found.values()})
    hours = sum(record["seconds"] for record in found.values()) / 3600
    settings = [
        f"- *{name}*: " + (", ".join(f"`{key}: {_yaml(each)}`" for key, each in keys.items()) or f"`{study.config}`")
        for name, keys in study.settings.items()
    ]
    declared = f"{len(found)} of {len(study.runs)} declared runs, {hours:.1f} h of processes, at {', '.join(commits)}."
    inputs = " ".join(f"--input {name}=PATH" for name in study.inputs)
    command = f"`anyexperts study run {path} {inputs} --work DIR`"
    return [*settings, "", f"{declared} {command} runs what is missing, into `{ledger_path}`."]


def _yaml(setting: Any) -> str:
    return "none" if setting is None else str(setting)


def with_tables(text: str, generated: str) -> str:
    """A page whose part between the two marks is `generated`.

    Raises:
        StudyError: the marks are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise StudyError(f"the page needs one line {BEGIN} and below it one line {END}; the tables go between them")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{generated}\n" + text[text.index(END) :]
