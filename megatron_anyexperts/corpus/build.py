"""Build a corpus: list, scan, plan, tokenizer, write, finish. Any stage goes on where an earlier run ended."""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from megatron_anyexperts.corpus.corpus import Corpus, CorpusError
from megatron_anyexperts.corpus.failures import forget_all, forget_unforeseen, load_scans, nothing_accepted
from megatron_anyexperts.corpus.files import write_json
from megatron_anyexperts.corpus.finish import finish
from megatron_anyexperts.corpus.plan import Plan, ShardPlan, make_plan
from megatron_anyexperts.corpus.sample import Sample
from megatron_anyexperts.corpus.scan import load_scan, scan_path
from megatron_anyexperts.corpus.sources.base import Chunk
from megatron_anyexperts.corpus.tasks import ScanTask, WriteTask
from megatron_anyexperts.corpus.tolerance import Unforeseen
from megatron_anyexperts.corpus.unforeseen import guarded
from megatron_anyexperts.corpus.workers import Handled, Share, run_tasks
from megatron_anyexperts.corpus.write import manifest_path
from megatron_anyexperts.data.tokenizer import adopt_tokenizer, train_tokenizer
from megatron_anyexperts.files import atomic_file, sync_folder

TOKENIZER_SHARDS = 256
"""Shards from which text is drawn to train the tokenizer."""


def tool_version() -> str:
    """Version of this package, for manifests."""
    try:
        return version("megatron-anyexperts")
    except PackageNotFoundError:
        return "source tree"


def corpus_document(corpus: Corpus) -> dict:
    """A corpus description without machine paths: what identifies a build, and what the manifest shows."""
    content = corpus.model_dump(mode="json", exclude={"tolerance"})
    for source, options in zip(corpus.sources, content["sources"], strict=True):
        options["type"] = source.type
        options["path"] = source.path.name
    if corpus.tokenizer.path is not None:
        content["tokenizer"]["path"] = corpus.tokenizer.path.name
    return content


def build(corpus: Corpus, output: Path, share: Share, workers: int, quiet: bool = False) -> dict | None:
    """Build the corpus, or what is missing of it.

    Args:
        corpus: what to build.
        output: folder of the corpus; the same for all participants.
        share: participant of how many.
        workers: processes of this participant; 0 works in this process.
        quiet: no progress bars.

    Returns:
        The manifest of the corpus; None for participants other than the first, which do not finish it.

    Raises:
        CorpusError: a source is missing or empty, `output` holds another corpus, or too many items ended in an error
            that nobody foresaw.
    """
    work = output / ".build"
    claim_output(corpus, output)
    chunks = list_chunks(corpus, output)
    scans = [ScanTask(corpus, number, chunk, work) for number, chunk in enumerate(chunks)]
    try:
        _run(scans, corpus, share, workers, quiet, "scan", "chunk")
        scanned = load_scans(scans)
        # Counted once more, over all participants and earlier runs.
        unforeseen = Unforeseen(corpus.tolerance)
        for scan in scanned:
            unforeseen.add(scan.items, scan.rejected)
    except CorpusError:
        forget_unforeseen(scans)
        raise
    plan = make_plan(corpus, scanned)
    if not plan.shards:
        forget_all(scans, chunk_list(output))
        raise CorpusError(nothing_accepted(scanned))
    make_tokenizer(corpus, chunks, plan, output)
    _run(write_tasks(corpus, chunks, plan, output), corpus, share, workers, quiet, "write", "shard")
    if share.part != 0:
        return None
    manifest = finish(corpus, corpus_document(corpus), chunks, scanned, plan, output, tool_version())
    for folder in ("tmp", "claims", "trace"):
        shutil.rmtree(work / folder, ignore_errors=True)
    return manifest


def rebuild_shard(corpus: Corpus, output: Path, name: str) -> dict:
    """Write a single shard again, from the scans of the finished build.

    Raises:
        CorpusError: there is no finished build, it is another corpus', or has no such shard.
    """
    if not (output / "manifest.json").is_file():
        raise CorpusError(f"{output} holds no finished build; run without --rebuild")
    claim_output(corpus, output)
    chunks = list_chunks(corpus, output)
    scanned = [load_scan(scan_path(output / ".build", number)) for number in range(len(chunks))]
    plan = make_plan(corpus, scanned)
    tasks = [task for task in write_tasks(corpus, chunks, plan, output) if task.name == name]
    if not tasks:
        raise CorpusError(f"the corpus has no shard {name!r}; it has {plan.shards[0].name} ... {plan.shards[-1].name}")
    manifest_path(output / name).unlink(missing_ok=True)
    # Without its index the metadata is not taken as complete, and is made again.
    (output / f"{name}.idx").unlink(missing_ok=True)
    tasks[0].run()
    return finish(corpus, corpus_document(corpus), chunks, scanned, plan, output, tool_version())


def _run(tasks: list, corpus: Corpus, share: Share, workers: int, quiet: bool, stage: str, unit: str) -> None:
    items, unforeseen = 0, Unforeseen(corpus.tolerance)
    with tqdm(total=len(tasks), desc=stage, unit=f" {unit}", disable=quiet, dynamic_ncols=True) as bar:

        def on_done(handled: Handled) -> None:
            nonlocal items
            items += handled.items
            unforeseen.add(handled.items, handled.rejected)
            rate = items / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{items} items, {rate:.0f} items/s", refresh=False)
            bar.update()

        run_tasks(tasks, share, workers, on_done)


def write_tasks(corpus: Corpus, chunks: list[Chunk], plan: Plan, output: Path) -> list[WriteTask]:
    """A task per planned shard."""
    return [
        WriteTask(
            corpus,
            {number: chunks[number] for number in set(shard.chunks.tolist())},
            shard,
            shard.name,
            output,
            tool_version(),
        )
        for shard in plan.shards
    ]


def claim_output(corpus: Corpus, output: Path) -> None:
    """Note in the output folder which corpus it holds.

    Raises:
        CorpusError: it holds another one.
    """
    path = output / ".build" / "corpus.json"
    ours = corpus_document(corpus)
    if not path.is_file():
        if output.is_dir() and set(os.listdir(output)) - {".build"}:
            raise CorpusError(f"{output} is not empty and was not made by this tool; choose another --output")
        try:
            write_json(path, output / ".build" / "tmp", ours, first_wins=True)
        except OSError as error:
            raise CorpusError(f"cannot write to {output}: {error}") from None
    theirs = json.loads(path.read_bytes())
    if changed := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise CorpusError(
            f"{output} holds a build with another {', '.join(changed)}; restore the description, choose another "
            "--output, or delete the folder"
        )


def chunk_list(output: Path) -> Path:
    """Where the list of chunks is kept."""
    return output / ".build" / "chunks.jsonl"


def list_chunks(corpus: Corpus, output: Path) -> list[Chunk]:
    """All units of work; listed once, so that a continued build sees the same input.

    Raises:
        CorpusError: a source that is not optional is missing or empty.
    """
    path = chunk_list(output)
    if not path.is_file():
        with atomic_file(path, output / ".build" / "tmp", first_wins=True) as file:
            for number, source in enumerate(corpus.sources):
                if source.missing():
                    if source.optional:
                        continue
                    raise CorpusError(
                        f"source {source.label!r}: {source.path} does not exist; point --root at the folder that "
                        "holds it, or mark the source `optional: true`"
                    )
                chunks = iter(source.chunks(corpus.seed, corpus.chunk_items, corpus.chunk_bytes))
                first = next(chunks, None)
                if first is None and not source.optional:
                    raise CorpusError(
                        f"source {source.label!r}: {source.path} holds nothing that a {source.type} can read: "
                        f"{source.forms()}"
                    )
                for chunk in itertools.chain([first] if first else [], chunks):
                    # Names of files need not be Unicode: ASCII JSON carries every byte of them.
                    file.write(json.dumps({"source": number, **chunk}).encode() + b"\n")
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]


def make_tokenizer(corpus: Corpus, chunks: list[Chunk], plan: Plan, output: Path) -> None:
    """Put a tokenizer into the output folder: the given one, or one trained on the training split.

    Raises:
        CorpusError: the given one cannot be used.
    """
    directory = output / "tokenizer"
    if directory.is_dir():
        return
    scratch = output / ".build" / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=scratch))
    try:
        if corpus.tokenizer.path is not None:
            adopt_tokenizer(corpus.tokenizer.path, made)
        else:
            train_tokenizer(training_texts(corpus, chunks, plan), corpus.tokenizer.vocab_size, made)
    except ValueError as error:
        raise CorpusError(f"tokenizer: {error}") from None
    for file in made.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    made.chmod(0o755)
    # Another participant may have been faster; both made the same.
    with contextlib.suppress(OSError):
        made.rename(directory)
    shutil.rmtree(made, ignore_errors=True)
    sync_folder(output)


def training_texts(corpus: Corpus, chunks: list[Chunk], plan: Plan) -> Iterator[str]:
    """Text of the training split for the tokenizer, taken in turn from shards spread over the corpus."""
    shards = [shard for shard in plan.shards if "/train/" in shard.name] or plan.shards
    readers = [_shard_texts(corpus, chunks, shard) for shard in shards[:: -(-len(shards) // TOKENIZER_SHARDS)]]
    left = corpus.tokenizer.train_bytes
    while readers:
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
                continue
            yield text
            left -= len(text.encode("utf-8", "replace"))
            if left <= 0:
                return


def _shard_texts(corpus: Corpus, chunks: list[Chunk], shard: ShardPlan) -> Iterator[str]:
    for number in dict.fromkeys(shard.chunks.tolist()):
        source = corpus.sources[chunks[number]["source"]]
        wanted = set(shard.samples["position"][shard.chunks == number].tolist())
        for _, item in guarded(source.read(chunks[number], wanted, corpus.limits.max_media_bytes), source.label):
            if isinstance(item, Sample):
                yield from item.texts()
