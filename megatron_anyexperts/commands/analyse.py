"""What experts do, from routing traces: each figure beside its baseline and an interval.

    anyexperts analyse RUN                   # its newest trace of answers, else of held-out rows, else of training
    anyexperts analyse TRACE [TRACE ...]     # several checkpoints on the same data, the last one the end

Traces are made by `anyexperts evaluate --trace` and `--anyexperts-trace-every`; see docs/analysis.md. Pictures go to
RUN/pictures, where `anyexperts runs report` finds them, or to --output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_anyexperts import trace_file
from megatron_anyexperts.analysis import charts
from megatron_anyexperts.analysis.routing.balance import load_over_time
from megatron_anyexperts.analysis.routing.findings import Findings, analyse, compare
from megatron_anyexperts.analysis.routing.shown import PICTURES, as_json, heat_maps, text
from megatron_anyexperts.analysis.routing.table import NoTrace, RoutingTable, read_trace, shared_tokens
from megatron_anyexperts.analysis.run_record import RunRecord, is_run
from megatron_anyexperts.console import Parser, own_lines_only, say
from megatron_anyexperts.survival.run_directory import Run

_BEST = ("answers", "held_out", "training")


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    own.add_argument("traces", type=Path, nargs="+", metavar="RUN|TRACE", help="a run, or folders of traces")
    own.add_argument("--step", type=int, metavar="N", help="of a trace with several steps (default: the newest)")
    own.add_argument("--most-tokens", type=int, default=50_000, metavar="N", help="samples are drawn from more (50000)")
    own.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="for classes of tokens (default: the run's)")
    own.add_argument("--seed", type=int, default=0, help="of resampling and baselines (0)")
    own.add_argument("--output", type=Path, metavar="FOLDER", help="where pictures go")
    own.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return own


@own_lines_only
def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    own = parser().parse_args(cli)
    try:
        if own.most_tokens < 1:
            raise ValueError(f"--most-tokens {own.most_tokens} is below 1")
        run = own.traces[0] if len(own.traces) == 1 and is_run(own.traces[0]) else None
        folders = [_best_of(run)] if run else own.traces
        tables = [_one_step(folder, own.step, own.most_tokens, own.seed) for folder in folders]
        if len(tables) > 1:
            tables = shared_tokens(tables)
            print(f"{len(tables[0].token_N)} tokens are in all {len(tables)} traces", file=sys.stderr)
        found = analyse(tables[-1], _decoder(own.tokenizer, run), own.seed)
        if len(tables) > 1:
            found.figures |= compare(tables, [str(folder) for folder in folders], own.seed).figures
        if run and trace_file.is_trace(trained := Run(run).traces / "training"):
            found.matrices |= load_over_time(read_trace(trained, own.most_tokens, own.seed))
        output = own.output or (run / "pictures" if run else None)
        drawn = _draw(found, output) if output else []
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.json:
        say(json.dumps({"traces": [str(folder) for folder in folders]} | as_json(found)))
        return 0
    say("\n".join([text(found), *(f"picture: {path}" for path in drawn)]))
    return 0


def _best_of(run: Path) -> Path:
    for name in _BEST:
        if trace_file.is_trace(folder := Run(run).traces / name):
            return folder
    raise NoTrace(f"{Run(run).traces} holds no trace; make one with anyexperts evaluate --trace {Run(run).traces}")


def _one_step(folder: Path, step: int | None, most_tokens: int, seed: int) -> RoutingTable:
    """The trace of one checkpoint or step, and a line about what it holds."""
    steps = sorted({trace_file.step_of(path) for path in trace_file.files_of(folder, "routing")})
    if step is not None and step not in steps:
        raise NoTrace(f"{folder} has no step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    step = step if step is not None or not steps else steps[-1]
    table = read_trace(folder, most_tokens, seed, step)
    tasks, counts = np.unique(table.tasks, return_counts=True)
    named = ", ".join(f"{task} {count}" for task, count in zip(tasks, counts, strict=True))
    lacking = f", {table.left_out} more lack a layer" if table.left_out else ""
    drawn = f" of {table.of_tokens}" if table.of_tokens > len(table.token_N) + table.left_out else ""
    said = f"{folder}, step {step}: {len(table.token_N)}{drawn} tokens{lacking}; samples by task: {named}"
    print(said, file=sys.stderr)
    return table


def _decoder(tokenizer: Path | None, run: Path | None) -> Callable[[int], str] | None:
    """Text of a token id, by the tokenizer that is named or that the run was trained with."""
    given = tokenizer or (RunRecord.read(run).config.get("tokenizer-model") if run else None)
    if given is None or not (tokenizer or Path(given).is_dir()):
        return None
    from megatron_anyexperts.data.vocabulary import Vocabulary

    vocabulary = Vocabulary(given)
    return lambda token: vocabulary.decode([token])


def _draw(found: Findings, folder: Path) -> list[Path]:
    paths = []
    for name, kind in PICTURES.items():
        if (figure := heat_maps(found, kind)) is not None:
            charts.write_png(figure, folder / name)
            paths.append(folder / name)
    return paths
