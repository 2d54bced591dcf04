"""Which benchmarks there are, and how a command line names the user's copy of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_anyexperts.evaluation.benchmarks.aro import ARO_ATTRIBUTION, ARO_RELATION
from megatron_anyexperts.evaluation.benchmarks.gqa import GQA
from megatron_anyexperts.evaluation.benchmarks.items import Benchmark, BenchmarkError
from megatron_anyexperts.evaluation.benchmarks.nlvr2 import NLVR2
from megatron_anyexperts.evaluation.benchmarks.science_qa import SCIENCE_QA

BENCHMARKS: dict[str, Benchmark] = {
    "aro_attribution": ARO_ATTRIBUTION,
    "aro_relation": ARO_RELATION,
    "gqa": GQA,
    "nlvr2": NLVR2,
    "scienceqa": SCIENCE_QA,
}


@dataclass(frozen=True)
class Task:
    """A benchmark and the user's copy of it.

    Attributes:
        name: key of `BENCHMARKS`.
        path: file of the questions.
        images: folder of the images, or None.
    """

    name: str
    path: Path
    images: Path | None

    @classmethod
    def parse(cls, word: str) -> Task:
        """Read ``NAME=FILE[:IMAGES]``.

        Raises:
            BenchmarkError: an unknown name, or a file or folder that is missing.
        """
        name, _, rest = word.partition("=")
        path, _, images = rest.partition(":")
        if name not in BENCHMARKS or not path:
            raise BenchmarkError(f"'{word}' is not NAME=FILE[:IMAGES] with one of {', '.join(BENCHMARKS)}")
        if BENCHMARKS[name].needs_images and not images:
            raise BenchmarkError(f"'{word}' names no folder of images: {name}={path}:IMAGES")
        for each, exists in ((path, Path(path).is_file()), (images, not images or Path(images).is_dir())):
            if not exists:
                raise BenchmarkError(f"{each} of --tasks {word} does not exist")
        return cls(name, Path(path), Path(images) if images else None)
