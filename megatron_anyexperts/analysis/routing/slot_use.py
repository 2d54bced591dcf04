"""Which tokens get slots: by class of token and by place in the document."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from megatron_anyexperts.analysis.routing.intervals import NULL_DRAWS, Measured, measured

FUNCTION_WORDS = frozenset(
    """a an the and or but nor so yet if then than that this these those of in on at by for from to with without into
    onto over under as is are was were be been being am do does did have has had will would shall should can could may
    might must not no it its he she they them his her their we us our you your i me my who whom which what when where
    how why there here all any each some such only also very""".split()  # noqa: SIM905
)
RARE = 3
"""A token id with at most so many occurrences in the trace is rare."""
CLASSES = ("number", "code and marks", "function word", "first of document", "rare", "other")


def class_of(text: str) -> str:
    """Class of a token by its text alone: number, code and marks, function word, or other."""
    word = text.strip()
    if word and re.fullmatch(r"[\d.,]*\d[\d.,]*", word):
        return "number"
    if not any(letter.isalpha() for letter in word) or re.search(r"[_(){}\[\]<>=;\\/]", word):
        return "code and marks"
    return "function word" if word.lower() in FUNCTION_WORDS else "other"


def token_classes(token_N: np.ndarray, place_N: np.ndarray, decode: Callable[[int], str]) -> np.ndarray:
    """Number in `CLASSES` of each text token.

    A number or a mark is one however rare it is; the first token of a document, and a rare one, else come before the
    classes of words.
    """
    ids, number_N, counts = np.unique(token_N, return_inverse=True, return_counts=True)
    by_text = np.array([CLASSES.index(class_of(decode(int(each)))) for each in ids])[number_N]
    strong = by_text < CLASSES.index("function word")
    found = np.where(counts[number_N] <= RARE, CLASSES.index("rare"), by_text)
    found = np.where(place_N == 0, CLASSES.index("first of document"), found)
    return np.where(strong, by_text, found)


def position_bins(place_N: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Bin of each place by powers of two (0, 1, 2-3, 4-7, ...), and the bins' names."""
    bins_N = np.floor(np.log2(np.maximum(place_N, 1))).astype(int) + (place_N > 0)
    ends = [(1 << (b - 1), (1 << b) - 1) for b in range(1, int(bins_N.max(initial=0)) + 1)]
    return bins_N, ["0", *(str(low) if low == high else f"{low}-{high}" for low, high in ends)]


def measure_slots(
    value_N: np.ndarray, group_N: np.ndarray, names: Iterable[str], sample_N: np.ndarray, samples: int, seed: int = 0
) -> dict[str, Measured]:
    """Mean of a figure, such as real slots, over the tokens of each group; groups without a token are left out.

    The baseline permutes the figure among all tokens: every group then has the mean of all, give or take its size.
    """
    found, generator = {}, np.random.default_rng(seed)
    for number, name in enumerate(names):
        inside_N = group_N == number
        if not inside_N.any():
            continue
        sums = np.bincount(sample_N[inside_N], value_N[inside_N], samples)
        sizes = np.bincount(sample_N[inside_N], minlength=samples)
        drawn = (generator.choice(value_N, int(inside_N.sum()), replace=False) for _ in range(NULL_DRAWS))

        def figure(drawn: np.ndarray, sums: np.ndarray = sums, sizes: np.ndarray = sizes) -> float:
            return float(sums[drawn].sum() / sizes[drawn].sum()) if sizes[drawn].sum() else float("nan")

        nulls = [float(each.mean()) for each in drawn]
        found[name] = measured(figure, samples, nulls, "permuted tokens", seed)
    return found
