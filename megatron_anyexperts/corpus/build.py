"""Build a corpus: list, scan, plan, tokenizer, write, finish. Any stage goes on where an earlier run ended."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from megatron_anyexperts.corpus.chunk_list import ChunkList, list_chunks
from megatron_anyexperts.corpus.corpus import Corpus, CorpusError
from megatron_anyexperts.corpus.failures import forget_all, forget_unforeseen, nothing_accepted
from megatron_anyexperts.corpus.files import write_json
from megatron_anyexperts.corpus.finish import finish
from megatron_anyexperts.corpus.plan import Plan, ShardFile
from megatron_anyexperts.corpus.planning.layout import Layout, Step, scans_key
from megatron_anyexperts.corpus.planning.pipeline import ENDED_BY_ANOTHER, discard_parts, make_plan, take_census
from megatron_anyexperts.corpus.sample import Sample
from megatron_anyexperts.corpus.tasks import ScanTask, WriteTask
from megatron_anyexperts.corpus.tolerance import Unforeseen
from megatron_anyexperts.corpus.unforeseen import guarded
from megatron_anyexperts.corpus.workers import Handled, Share, run_tasks
from megatron_anyexperts.corpus.write import manifest_path
from megatron_anyexperts.data.tokenizer import adopt_tokenizer, train_tokenizer
from megatron_anyexperts.files import sync_folder

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
    chunks = list_chunks(corpus, work)
    scans = [ScanTask(corpus, number, chunks, work) for number in range(len(chunks))]
    run = partial(_run, corpus=corpus, share=share, workers=workers, quiet=quiet)
    try:
        run(scans, stage="scan", unit="chunk")
        layout = plan_layout(corpus, chunks, work)
        accepted = count_scans(layout, run)
    except CorpusError:
        forget_unforeseen(scans)
        raise
    if not accepted:
        message = nothing_accepted(scans)
        forget_all(scans, chunks)
        raise CorpusError(message)
    plan = make_plan(layout, partial(run, stage="plan", unit="part"))
    make_tokenizer(corpus, chunks, plan, output)
    run(write_tasks(corpus, chunks, plan, output), stage="write", unit="shard")
    if share.part != 0:
        return None
    manifest = finish(corpus, corpus_document(corpus), chunks, plan, output, tool_version())
    discard_parts(layout)
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
    chunks = list_chunks(corpus, output / ".build")
    layout = plan_layout(corpus, chunks, output / ".build")
    run = partial(_run, corpus=corpus, share=Share(), workers=0, quiet=True)
    count_scans(layout, run)
    plan = make_plan(layout, partial(run, stage="plan", unit="part"))
    tasks = [task for task in write_tasks(corpus, chunks, plan, output) if task.shard.name == name]
    if not tasks:
        raise CorpusError(f"the corpus has no shard {name!r}; it has {plan.shards[0].name} ... {plan.shards[-1].name}")
    manifest_path(output / name).unlink(missing_ok=True)
    # Without its index the metadata is not taken as complete, and is made again.
    (output / f"{name}.idx").unlink(missing_ok=True)
    tasks[0].run()
    manifest = finish(corpus, corpus_document(corpus), chunks, plan, output, tool_version())
    discard_parts(layout)
    return manifest


def plan_layout(corpus: Corpus, chunks: ChunkList, work: Path) -> Layout:
    """Where the plan of the scans that are on disk is made.

    Raises:
        CorpusError: another participant found that the build fails and has removed them.
    """
    try:
        return Layout(corpus, work, scans_key(work, len(chunks)), len(chunks))
    except FileNotFoundError:
        raise CorpusError(ENDED_BY_ANOTHER) from None


def count_scans(layout: Layout, run: Callable) -> int:
    """How many items all participants and earlier runs accepted.

    Raises:
        CorpusError: too many items of them ended in an unforeseen error.
    """
    unforeseen, accepted = Unforeseen(layout.corpus.tolerance), 0
    for entry in take_census(layout, partial(run, stage="count", unit="part")):
        unforeseen.count(entry["items"], entry["errors"], entry["example"])
        accepted += entry["accepted"]
    return accepted


def _run(tasks: Sequence, corpus: Corpus, share: Share, workers: int, quiet: bool, stage: str, unit: str) -> None:
    items, unforeseen = 0, Unforeseen(corpus.tolerance)
    if len(tasks) == 1 and isinstance(tasks[0], Step):
        workers, quiet = 0, True  # starting a process takes longer than a small plan
    with tqdm(total=len(tasks), desc=stage, unit=f" {unit}", disable=quiet, dynamic_ncols=True) as bar:

        def on_done(handled: Handled) -> None:
            nonlocal items
            items += handled.items
            unforeseen.add(handled.items, handled.rejected)
            rate = items / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{items} items, {rate:.0f} items/s", refresh=False)
            bar.update()

        run_tasks(tasks, share, workers, on_done)


def write_tasks(corpus: Corpus, chunks: ChunkList, plan: Plan, output: Path) -> list[WriteTask]:
    """A task per planned shard."""
    version = tool_version()
    return [WriteTask(corpus, chunks, shard, output, version) for shard in plan.shards]


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


def make_tokenizer(corpus: Corpus, chunks: ChunkList, plan: Plan, output: Path) -> None:
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


def training_texts(corpus: Corpus, chunks: ChunkList, plan: Plan) -> Iterator[str]:
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


def _shard_texts(corpus: Corpus, chunks: ChunkList, shard: ShardFile) -> Iterator[str]:
    plan = shard.load()
    for number in dict.fromkeys(plan.chunks.tolist()):
        chunk = chunks[number]
        source = corpus.sources[chunk["source"]]
        wanted = set(plan.samples["position"][plan.chunks == number].tolist())
        for _, item in guarded(source.read(chunk, wanted, corpus.limits.max_media_bytes), source.label):
            if isinstance(item, Sample):
                yield from item.texts()
