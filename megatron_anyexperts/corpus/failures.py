"""After a build that failed because of its sources: say why, and forget what was found in them."""

from collections import Counter
from collections.abc import Iterable

from megatron_anyexperts.corpus.chunk_list import ChunkList
from megatron_anyexperts.corpus.scan import load_outcome
from megatron_anyexperts.corpus.tasks import ScanTask
from megatron_anyexperts.corpus.unforeseen import UNFORESEEN


def forget_unforeseen(tasks: Iterable[ScanTask]) -> None:
    """Remove the scans that hold unforeseen errors, so that the same command reads those items again."""
    for task in tasks:
        if task.done() and any(line["reason"] == UNFORESEEN for line in load_outcome(task.path)[1]):
            task.path.unlink(missing_ok=True)


def forget_all(tasks: Iterable[ScanTask], chunks: ChunkList) -> None:
    """Remove the list of chunks and all scans, so that the same command looks at the sources afresh."""
    chunks.forget()
    for task in tasks:
        task.path.unlink(missing_ok=True)


def nothing_accepted(tasks: Iterable[ScanTask]) -> str:
    """Why no sample is left: every reason with its count and an example."""
    counts: Counter = Counter()
    examples: dict[str, dict] = {}
    for task in tasks:
        for line in load_outcome(task.path)[1]:
            counts[line["reason"]] += 1
            examples.setdefault(line["reason"], line)
    reasons = [
        f"{reason} ({count} x, such as {examples[reason]['origin']}: {examples[reason]['detail'] or 'no detail'})"
        for reason, count in counts.most_common()
    ]
    return f"none of {counts.total()} items can be used: {'; '.join(reasons) or 'there are none'}"
