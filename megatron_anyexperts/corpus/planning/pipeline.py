"""Make the plan of a corpus: stage after stage, each cut into steps that participants share."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial

from megatron_anyexperts.corpus.corpus import CorpusError
from megatron_anyexperts.corpus.plan import Plan
from megatron_anyexperts.corpus.planning.layout import SCANS_OF_CENSUS, Layout, Step
from megatron_anyexperts.corpus.planning.repeats import merge_firsts
from megatron_anyexperts.corpus.planning.rounds import compare, decide, undecided
from megatron_anyexperts.corpus.planning.shards import cut_shards, load_plan
from megatron_anyexperts.corpus.planning.similar import ImageSearch, Search, TextSearch, bands
from megatron_anyexperts.corpus.planning.spill import census, groups, spill
from megatron_anyexperts.corpus.planning.survivors import kept, verdict

CENSUS, RESULT = "census", "shards"
"""Stages whose parts are kept: the second is the plan."""

ENDED_BY_ANOTHER = "another participant has ended the build; its message says why"

Run = Callable[[list[Step]], None]
"""Makes sure that the steps of one stage are done."""


def take_census(layout: Layout, run: Run) -> list[dict]:
    """What each thousand scans hold: accepted, items, errors that nobody foresaw, the last of these.

    Raises:
        CorpusError: another participant has removed scans.
    """
    steps = [Step(layout, CENSUS, number, census) for number in range(-(-layout.chunks // SCANS_OF_CENSUS))]
    try:
        run(steps)
    except FileNotFoundError as error:
        raise CorpusError(ENDED_BY_ANOTHER) from error
    return [json.loads((step.path / "census.json").read_bytes()) for step in steps]


def make_plan(layout: Layout, run: Run) -> Plan:
    """The plan of the corpus; what is there already is not made again.

    Args:
        layout: where its parts are; the census is taken and has found a sample.
        run: how steps are run.

    Raises:
        CorpusError: another participant has removed scans.
    """
    result = layout.part(RESULT)
    if not result.is_dir():
        try:
            for steps in _stages(layout):
                run(steps)
        except FileNotFoundError as error:
            # A participant that finishes the corpus removes the parts.
            if not result.is_dir():
                raise CorpusError(ENDED_BY_ANOTHER) from error
    return load_plan(result)


def discard_parts(layout: Layout) -> None:
    """Remove what led to the plan, and plans of scans that were made again."""
    for folder in (layout.work / "plan").iterdir():
        for stage in folder.iterdir() if folder == layout.folder else (folder,):
            if stage.name not in (CENSUS, RESULT):
                shutil.rmtree(stage, ignore_errors=True)


def _stages(layout: Layout) -> Iterator[list[Step]]:
    dedup = layout.corpus.dedup
    yield [Step(layout, "groups", None, groups)]
    yield _by_group(layout, "spill", spill)
    yield _by_bucket(layout, "content", partial(merge_firsts, "content", "spill"))
    if dedup.near_text is not None:
        yield _by_bucket(layout, "text", partial(merge_firsts, "text", "spill"))
        yield from _rounds(layout, TextSearch(dedup.near_text))
    yield _by_group(layout, "kept", kept)
    if dedup.near_image is not None:
        yield _by_bucket(layout, "image", partial(merge_firsts, "image", "kept"))
        yield from _rounds(layout, ImageSearch.for_rows(dedup.near_image, int(layout.row_starts[-1])))
        yield _by_group(layout, "verdict", verdict)
    yield [Step(layout, RESULT, None, cut_shards)]


def _rounds(layout: Layout, search: Search) -> Iterator[list[Step]]:
    yield _by_group(layout, f"{search.name}-bands", partial(bands, search))
    number = 0
    while True:
        stage = f"{search.name}-pairs-{number}"
        buckets = range(search.tables * layout.buckets)
        yield [Step(layout, stage, bucket, partial(compare, search, number)) for bucket in buckets]
        yield [Step(layout, f"{search.name}-round", number, partial(decide, search))]
        if not undecided(layout, search, number):
            return
        number += 1


def _by_group(layout: Layout, stage: str, make: Callable) -> list[Step]:
    return [Step(layout, stage, group, make) for group in range(layout.groups)]


def _by_bucket(layout: Layout, stage: str, make: Callable) -> list[Step]:
    return [Step(layout, stage, bucket, make) for bucket in range(layout.buckets)]
