"""What a study asks and runs, written down before it runs: a YAML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError

from megatron_anyexperts import described

PLACES = ("python", "config", "run", "seed")
"""What a step may name in braces beside the study's inputs; all but the interpreter are the run's."""


class StudyError(ValueError):
    """A study cannot be read or run; the message says why."""


class Run(NamedTuple):
    """One run of a study."""

    setting: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.setting) + f"-{self.seed}"


class Figure(described.Section):
    """A number that is compared.

    Attributes:
        path: where it is in a ledger line, names joined by dots; `*` takes the mean over all keys.
        digits: decimals shown.
        scale: by which it is multiplied when it is shown: 100 for a share in per cent.
    """

    path: str
    digits: int = 2
    scale: float = 1


class Step(described.Section):
    """A command of a run.

    Attributes:
        command: its words, as a shell would split them, with names in braces.
        keep: which keys of the JSON that it prints last go into the ledger; empty: all.
    """

    command: str
    keep: list[str] = []


class Study(described.Section):
    """A declared study.

    Attributes:
        question: what is asked.
        criterion: what would count as yes, decided before the runs.
        config: the configuration that every run is an edit of.
        inputs: what the command line has to give as NAME=PATH, and what each is.
        flags: keys of the configuration that all runs share; null takes one of `config` away.
        settings: by name, the keys in which runs differ.
        seeds: one run of each setting for each.
        steps: commands of a run by name, in order; the JSON that one prints last goes into the ledger under its name.
        figures: numbers of the tables, by heading.
        compare_with: setting from which paired differences are taken.
    """

    question: str
    criterion: str
    config: str
    inputs: dict[str, str] = {}
    flags: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    steps: dict[str, Step] = Field(min_length=1)
    figures: dict[str, Figure] = Field(min_length=1)
    compare_with: str

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a declaration.

        Raises:
            StudyError: it is missing, not YAML, or does not hold together.
        """
        try:
            study = cls.model_validate(described.load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
            raise StudyError(f"{path}: {error}") from error
        if study.compare_with not in study.settings:
            raise StudyError(f"{path}: compare_with={study.compare_with!r} is none of {', '.join(study.settings)}")
        folders = [run.folder for run in study.runs]
        twice = sorted({folder for folder in folders if folders.count(folder) > 1})
        if twice:
            raise StudyError(f"{path}: several runs would be in {', '.join(twice)}; rename settings or drop seeds")
        known = {*PLACES, *study.inputs}
        for name, step in study.steps.items():
            try:
                step.command.format(**dict.fromkeys(known, ""))
            except (KeyError, IndexError, ValueError) as error:
                raise StudyError(f"{path}: step {name} names {error}; there are {', '.join(sorted(known))}") from error
        return study

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed: what ends early has compared all settings."""
        return [Run(setting, seed) for seed in self.seeds for setting in self.settings]

    def configuration(self, run: Run) -> dict[str, Any]:
        """Content of a run's configuration file, inputs not yet filled in."""
        return {"base": self.config, **self.flags, **self.settings[run.setting], "seed": run.seed}

    def identity(self, run: Run) -> dict[str, Any]:
        """What a line of the ledger must agree in to count as this run."""
        steps = {name: step.command for name, step in self.steps.items()}
        content = {"configuration": self.configuration(run), "steps": steps}
        return {"setting": run.setting, "seed": run.seed, **json.loads(json.dumps(content))}
