"""After a build that failed because of its sources: say why, and forget what was found in them."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megatron_anyexperts.corpus.corpus import CorpusError
from megatron_anyexperts.corpus.scan import Scan, load_scan
from megatron_anyexperts.corpus.tasks import ScanTask
from megatron_anyexperts.corpus.unforeseen import UNFORESEEN


def load_scans(tasks: Iterable[ScanTask]) -> list[Scan]:
    """The scans of all chunks.

    Raises:
        CorpusError: another participant found that the build fails and has removed them.
    """
    try:
        return [load_scan(task.path) for task in tasks]
    except FileNotFoundError:
        raise CorpusError("another participant has ended the build; its message says why") from None


def forget_unforeseen(tasks: Iterable[ScanTask]) -> None:
    """Remove the scans that hold unforeseen errors, so that the same command reads those items again."""
    for task in tasks:
        if task.done() and any(line["reason"] == UNFORESEEN for line in load_scan(task.path).rejected):
            task.path.unlink(missing_ok=True)


def forget_all(tasks: Iterable[ScanTask], listing: Path) -> None:
    """Remove the list of chunks and all scans, so that the same command looks at the sources afresh."""
    listing.unlink(missing_ok=True)
    for task in tasks:
        task.path.unlink(missing_ok=True)


def nothing_accepted(scans: list[Scan]) -> str:
    """Why no sample is left: every reason with its count and an example."""
    lines = [line for scan in scans for line in scan.rejected]
    examples = {line["reason"]: line for line in reversed(lines)}
    reasons = [
        f"{reason} ({count} x, such as {examples[reason]['origin']}: {examples[reason]['detail'] or 'no detail'})"
        for reason, count in Counter(line["reason"] for line in lines).most_common()
    ]
    return f"none of {len(lines)} items can be used: {'; '.join(reasons) or 'there are none'}"
