"""Commands that the launchers and `slurm/status` call: `python -m megatron_anyexperts.survival COMMAND`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import bandwidth, layout, manifest, preflight, restarts, runlog, status
from .checkpoints import newest_sealed
from .heartbeat import clear, last_stack
from .run_directory import Run
from .watchdog import Patience, watch_step


def begin(args: argparse.Namespace) -> int:
    """Log the start of an attempt and forget the heartbeats of the one before."""
    run = Run(args.run)
    try:
        run.create()
        clear(run)
    except OSError as error:
        return _stop(run, f"the run directory cannot be written: {error}")
    sealed = newest_sealed(run.checkpoints)
    history = restarts.attempts(runlog.read_events(run), sealed)
    reason = history[-1].reason if history else "first start"
    runlog.append_event(
        run, "attempt", reason=reason, iteration=sealed, restart=args.restart, job=args.job, nodes=args.nodes
    )
    print(
        f"attempt: SLURM_RESTART_COUNT={args.restart}, reason: {reason}, newest checkpoint: {sealed}, "
        f"nodes: {','.join(args.nodes)}"
    )
    return 0


def end(args: argparse.Namespace) -> int:
    """Judge the attempt that ended, log it, print the action that the batch script takes."""
    run = Run(args.run)
    errors = args.step_errors.read_text(encoding="utf-8", errors="replace") if args.step_errors.exists() else ""
    sealed = newest_sealed(run.checkpoints)
    failure = restarts.first_failure(errors)
    verdict = restarts.decide(
        runlog.read_events(run),
        sealed,
        args.exit_code,
        args.signalled or None,
        args.max_failures,
        failure,
        restarts.last_words(errors),
    )
    detail = {}
    if verdict.reason.startswith(("crash", "last save")) and failure:
        detail = failure | {"stack": last_stack(run, failure["rank"])}
        print(
            f"rank {failure['rank']} on {failure['node']} failed first: {failure['cause']}\n"
            f"{detail['stack'] or '(it left no stack)'}",
            file=sys.stderr,
        )
    logged = runlog.append_event(run, "exit", reason=verdict.reason, iteration=sealed, restart=args.restart, **detail)
    if not logged and verdict.action in (restarts.Action.RETRY, restarts.Action.REQUEUE):
        unlogged = f"{verdict.reason}; {run.events} cannot be written, so restarts cannot be counted; submit again"
        verdict = restarts.Verdict(restarts.Action.STOP, verdict.reason, unlogged)
    if verdict.action is restarts.Action.STOP:
        _stop(run, verdict.summary)
    else:
        print(verdict.summary, file=sys.stderr)
    print(verdict.action.value)
    return 0


def account(args: argparse.Namespace) -> int:
    """Log why a job ends without success, unless this attempt has logged it already."""
    run = Run(args.run)
    for event in reversed(runlog.read_events(run)):
        if event.get("event") == "stop":
            return 0
        if event.get("event") == "attempt":
            break
    _stop(run, args.summary)
    return 0


def task(args: argparse.Namespace) -> int:
    """Log that a task of a job array started, finished or failed."""
    runlog.append_event(Run(args.run), "task", index=args.index, count=args.count, job=args.job, state=args.state)
    return 0


def watch(args: argparse.Namespace) -> int:
    """Guard a training step until it ends."""
    return watch_step(
        Run(args.run), args.ranks, Patience(args.hang_s, args.start_s), args.srun_pid, args.job, args.step_name
    )


def probe(args: argparse.Namespace) -> int:
    """Examine this node and print the report."""
    preflight.emit(preflight.as_record(preflight.probe(args.run, args.gpus)))
    return 0


def judge(args: argparse.Namespace) -> int:
    """Judge what `probe` printed on all nodes; print the fit nodes, or fail with one line."""
    run = Run(args.run)
    reports = [preflight.Report(**record) for record in preflight.collect(args.reports.read_text(encoding="utf-8"))]
    needs = preflight.Needs(args.gpus, args.free_gib, args.clock_tolerance_s)
    bad = preflight.judge(reports, args.nodes, needs, args.asked_at, args.heard_at, args.reference)
    return _choose(run, args.nodes, bad, args.least)


def judge_bandwidth(args: argparse.Namespace) -> int:
    """Judge what `all-reduce` printed on all nodes; print the fit nodes, or fail with one line."""
    run = Run(args.run)
    records = preflight.collect(args.reports.read_text(encoding="utf-8"))
    bad = {
        node: "did not finish the all-reduce"
        for node in args.nodes
        if node not in {record["node"] for record in records}
    }
    if not bad:
        print(
            f"preflight: all-reduce between {len(records)} nodes at {records[0]['all_reduce']:.2f} GB/s of bus "
            "bandwidth",
            file=sys.stderr,
        )
        bad = bandwidth.slow_nodes({record["node"]: record["pair"] for record in records}, args.least_rate)
    return _choose(run, args.nodes, bad, args.least)


def all_reduce(args: argparse.Namespace) -> int:
    """Take part in the all-reduce between nodes and print this node's figures."""
    preflight.emit(bandwidth.measure(args.timeout_s))
    return 0


def fit(args: argparse.Namespace) -> int:
    """Print how many of the available nodes training can use and its expert-parallel size."""
    words = args.training
    try:
        config = layout.config_path(words)
        text = config.read_text(encoding="utf-8") if config else ""
        shape = layout.Shape.from_flags(layout.read_flags(words, text, config))
        found = layout.fit(args.available, args.ranks_per_node, shape, args.least)
    except (OSError, ValueError) as error:
        if args.ask:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return _stop(Run(args.run), str(error))
    print(found.nodes, "" if found.expert == shape.expert else f"--expert-model-parallel-size {found.expert}")
    return 0


def show(args: argparse.Namespace) -> int:
    """Print one screen about a run."""
    try:
        print(status.screen(Run(args.run)), end="")
    except FileNotFoundError as error:
        print(f"status: {error}", file=sys.stderr)
        return 1
    return 0


def vouch(args: argparse.Namespace) -> int:
    """Give a checkpoint whose files the caller vouches for a new manifest, signed if there is a key."""
    try:
        print(f"sealed: {manifest.seal(args.folder)}")
    except (OSError, ValueError) as error:
        print(f"seal: {error}", file=sys.stderr)
        return 1
    return 0


def _choose(run: Run, nodes: list[str], bad: dict[str, str], least: int) -> int:
    for node, why in bad.items():
        print(f"preflight: {node} is not fit: {why}", file=sys.stderr)
        runlog.append_event(run, "preflight", node=node, reason=f"{node}: {why}")
    try:
        print(*preflight.choose(nodes, bad, least))
    except ValueError as error:
        return _stop(run, f"preflight: {error}")
    return 0


def _stop(run: Run, summary: str) -> int:
    runlog.append_event(run, "stop", summary=summary)
    print(f"stopped: {summary}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_anyexperts.survival", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, action, with_run: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=action.__doc__, description=action.__doc__)
        added.set_defaults(action=action)
        if with_run:
            added.add_argument("run", type=Path, help="run directory")
        return added

    def words(text: str) -> list[str]:
        return text.split()

    command("status", show)
    sealed = command("seal", vouch, with_run=False)
    sealed.add_argument("folder", type=Path, help="an iter_NNNNNNN or release directory")
    started = command("begin", begin)
    started.add_argument("--job", default="")
    started.add_argument("--nodes", type=words, default=[])
    ended = command("end", end)
    ended.add_argument("--exit-code", type=int, required=True)
    ended.add_argument("--signalled", default="", help="why the batch script asked the ranks to stop, if it did")
    ended.add_argument("--step-errors", type=Path, required=True, help="what srun printed to its standard error")
    ended.add_argument("--max-failures", type=int, required=True)
    command("account", account).add_argument("--summary", required=True, help="why, as far as the launcher knows")
    of_array = command("task", task)
    of_array.add_argument("--index", type=int, required=True)
    of_array.add_argument("--count", type=int, required=True)
    of_array.add_argument("--job", required=True, help="of the array")
    of_array.add_argument("--state", choices=("started", "finished", "failed"), required=True)
    for each in (started, ended):
        each.add_argument("--restart", type=int, default=0, help="SLURM_RESTART_COUNT")
    watched = command("watch", watch)
    watched.add_argument("--ranks", type=int, required=True)
    watched.add_argument("--hang-s", type=float, required=True, help="patience with a rank that trains")
    watched.add_argument("--start-s", type=float, required=True, help="patience while starting, saving, ending")
    watched.add_argument("--srun-pid", type=int, required=True)
    watched.add_argument("--job", required=True)
    watched.add_argument("--step-name", required=True)
    command("probe", probe).add_argument("--gpus", type=int, default=0)
    judged, rated = command("judge", judge), command("judge-bandwidth", judge_bandwidth)
    for each in (judged, rated):
        each.add_argument("--nodes", type=words, required=True)
        each.add_argument("--reports", type=Path, required=True)
        each.add_argument("--least", type=int, required=True, help="fewest nodes to go on with")
    judged.add_argument("--gpus", type=int, default=0)
    judged.add_argument("--free-gib", type=float, required=True)
    judged.add_argument("--clock-tolerance-s", type=float, required=True)
    judged.add_argument("--asked-at", type=float, required=True)
    judged.add_argument("--heard-at", type=float, required=True)
    judged.add_argument("--reference", required=True)
    rated.add_argument("--least-rate", type=float, required=True, help="GB/s; 0 only reports")
    command("all-reduce", all_reduce, with_run=False).add_argument("--timeout-s", type=float, required=True)
    fitted = command("fit", fit)
    fitted.add_argument("--ask", action="store_true", help="log nothing: no attempt has begun")
    fitted.add_argument("--available", type=int, required=True)
    fitted.add_argument("--ranks-per-node", type=int, required=True)
    fitted.add_argument("--least", type=int, required=True)
    return parser


if __name__ == "__main__":
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)  # what follows is the training command, not ours
    arguments = _parser().parse_args(words[:split], argparse.Namespace(training=words[split + 1 :]))
    sys.exit(arguments.action(arguments))
