"""Build WebDataset shards with Energon metadata from raw files.

    anyexperts corpus build CORPUS.yaml --output DIR                     one machine
    mpiexec -n 8 anyexperts corpus build CORPUS.yaml --output DIR --mpi  several machines (also srun)
    slurm/submit build_shards --array=0-15 ... --output DIR              a Slurm array

All give the same bytes. A build that was killed goes on when the same command is given again.
CORPUS.yaml and the layout of DIR are described in docs/building_shards.md.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_anyexperts.corpus.build import build, claim_output, rebuild_shard
from megatron_anyexperts.corpus.corpus import CorpusError, load_corpus
from megatron_anyexperts.corpus.files import write_json
from megatron_anyexperts.corpus.summary import summary
from megatron_anyexperts.corpus.workers import Share


def parse_share(text: str) -> Share:
    """A share of the work written as PART/PARTS, such as 0/4."""
    part, _, parts = text.partition("/")
    try:
        return Share(int(part), int(parts))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not PART/PARTS such as 0/4: {error}") from None


def slurm_share() -> Share:
    """The share of a task of a Slurm array; everything outside of one."""
    environment = os.environ
    if "SLURM_ARRAY_TASK_COUNT" not in environment:
        return Share()
    numbers = [int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP", "COUNT")]
    task, first, step, count = numbers
    return Share((task - first) // step, count)


def parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("corpus", type=Path, metavar="CORPUS.yaml", help="declarative description of the corpus")
    own.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of the finished corpus; continued when it holds an unfinished build of the same description",
    )
    own.add_argument(
        "--root", type=Path, help="folder where relative paths of the description start (default: its own folder)"
    )
    own.add_argument(
        "--workers",
        type=int,
        help="processes to use here; 0 works in this very process "
        "(default: one per core; 0 with --mpi)",
    )
    own.add_argument(
        "--part",
        type=parse_share,
        metavar="PART/PARTS",
        help="begin with this share of the work, then help with the rest; part 0 finishes "
        "(default: 0/1, in a Slurm array the task's share)",
    )
    own.add_argument(
        "--mpi", action="store_true", help="take the share from the MPI rank (needs the extra `mpi`: mpi4py)"
    )
    own.add_argument(
        "--rebuild", metavar="SHARD", help="write only this shard again, such as image/train/shard-000003.tar"
    )
    own.add_argument("--quiet", action="store_true", help="no progress bars")
    return own


def parse_args(cli: list[str] | None) -> argparse.Namespace:
    """The command line, with what depends on the machine filled in."""
    own = parser()
    args = own.parse_args(cli)
    if args.mpi and args.part:
        own.error("--mpi and --part exclude each other: MPI gives every rank its share")
    if args.workers is None:
        args.workers = 0 if args.mpi else len(os.sched_getaffinity(0))
    if args.workers < 0:
        own.error(f"--workers={args.workers} must be 0 or more")
    return args


def run(args: argparse.Namespace, share: Share) -> None:
    """Build, and print the summary where this participant finishes."""
    corpus = load_corpus(args.corpus, args.root)
    claim_output(corpus, args.output)
    root = args.root or args.corpus.parent
    invocation = {"corpus": str(args.corpus.resolve()), "root": str(root.resolve())}
    write_json(args.output / ".build" / "invocation.json", args.output / ".build" / "tmp", invocation)
    if args.rebuild:
        manifest = rebuild_shard(corpus, args.output, args.rebuild)
    else:
        manifest = build(corpus, args.output, share, args.workers, args.quiet or share.part != 0)
    if manifest is not None:
        print(summary(manifest, args.output))


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse_args(cli)
    comm = None
    if args.mpi:
        try:
            from mpi4py import MPI
        except ImportError as error:
            print(
                f"error: --mpi needs mpi4py and an MPI library ({error}): pip install 'megatron-anyexperts[mpi]'",
                file=sys.stderr,
            )
            return 2
        comm = MPI.COMM_WORLD
        share = Share(comm.Get_rank(), comm.Get_size())
    else:
        share = args.part or slurm_share()
    try:
        run(args, share)
    except (CorpusError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, CorpusError) else 1
        if comm is None:
            return code
        # Ranks that wait at the end would wait for ever.
        comm.Abort(code)
    if comm is not None:
        # A plain barrier would keep a core busy on every rank while the first one finishes.
        everybody = comm.Ibarrier()
        while not everybody.Test():
            time.sleep(0.1)
    return 0
