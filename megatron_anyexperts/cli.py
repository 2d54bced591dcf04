"""The command `anyexperts VERB ...`: which module answers which verb; each parses its own words when it runs."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pkgutil import resolve_name


@dataclass(frozen=True)
class Verb:
    """One verb: where its `main(cli) -> exit code` is, and what it does."""

    main: str
    summary: str
    trains: bool = False


_COMMANDS = "megatron_anyexperts.commands"
VERBS = {
    "pretrain": Verb("megatron_anyexperts.training.pretrain:main", "pretrain, or go on with a run", trains=True),
    "tune": Verb("megatron_anyexperts.training.instruct:main", "tune a pretrained model on conversations", trains=True),
    "generate": Verb(f"{_COMMANDS}.generate:main", "ask a model something, or score its held-out answers"),
    "evaluate": Verb(f"{_COMMANDS}.evaluate:main", "held-out losses with standard errors, and answers"),
    "budgets": Verb(f"{_COMMANDS}.budgets:main", "held-out losses under other slot budgets, without training"),
    "pictures": Verb(f"{_COMMANDS}.pictures:main", "draw what routing learned"),
    "analyse": Verb(f"{_COMMANDS}.analyse:main", "what experts do, from routing traces"),
    "runs list": Verb(f"{_COMMANDS}.runs_list:main", "the runs below a folder, a line each"),
    "runs show": Verb(f"{_COMMANDS}.runs_show:main", "one run, and what lies where in it"),
    "runs compare": Verb(f"{_COMMANDS}.runs_compare:main", "runs side by side: figures, flags, a picture"),
    "runs report": Verb(f"{_COMMANDS}.runs_report:main", "one HTML file about a run"),
    "study run": Verb(f"{_COMMANDS}.study_run:main", "run what a declared study lacks"),
    "study status": Verb(f"{_COMMANDS}.study_status:main", "which runs of a study are done"),
    "study report": Verb(f"{_COMMANDS}.study_report:main", "a study's tables, with errors over seeds"),
    "convert": Verb(f"{_COMMANDS}.convert:main", "weights from and to Hugging Face"),
    "upcycle": Verb(f"{_COMMANDS}.upcycle:main", "start a new mixture from a trained checkpoint"),
    "corpus build": Verb(f"{_COMMANDS}.corpus_build:main", "shards and tokenizer from raw files"),
    "corpus verify": Verb(f"{_COMMANDS}.corpus_verify:main", "read every shard and name what is damaged"),
    "corpus stats": Verb(f"{_COMMANDS}.corpus_stats:main", "what a corpus is made of"),
    "corpus plan": Verb(f"{_COMMANDS}.corpus_plan:main", "epochs, load and blends of a mixture"),
    "plan": Verb(f"{_COMMANDS}.plan:main", "memory, time and cost before submitting, and the best layout"),
    "doctor": Verb("megatron_anyexperts.checks.doctor:main", "what is installed, and what a configuration needs"),
    "gpu-check": Verb("megatron_anyexperts.checks.gpu_check:main", "compare precisions and implementations"),
    "completion": Verb("megatron_anyexperts.completion:main", "print the completion script of a shell"),
}


def version() -> str:
    """The version of this project and of what it stands on."""
    names = ("megatron-anyexperts", "megatron-core", "torch")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def overview() -> str:
    """Help of the command itself."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    usage = "usage: anyexperts VERB [flags]; anyexperts VERB --help; anyexperts --version"
    return "\n".join([usage, "", *lines])


def main(cli: list[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    words = sys.argv[1:] if cli is None else cli
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(version())
        return 0
    length = 2 if " ".join(words[:2]) in VERBS else 1
    name = " ".join(words[:length])
    verb = VERBS.get(name)
    if verb is None:
        groups = {name.partition(" ")[0] for name in VERBS if " " in name}
        given = " ".join(words[:2]) if words[0] in groups else words[0]
        near = difflib.get_close_matches(given, VERBS, n=3)
        way_out = f"did you mean {' or '.join(near)}?" if near else "see anyexperts --help"
        print(f"error: no command {given!r}; {way_out}", file=sys.stderr)
        return 2
    # Programs name themselves, in help and errors, by this.
    sys.argv = [f"anyexperts {name}", *words[length:]]
    # Megatron asserts it where it validates tensor parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if verb.trains:
        from megatron_anyexperts.survival.signals import end_on_interrupt

        end_on_interrupt()
    return int(resolve_name(verb.main)(words[length:]) or 0)
