"""Under which heading TensorBoard shows a figure: its tags are grouped by what comes before the slash."""

from __future__ import annotations

import re

GROUPS = {
    "optimizer": ("learning-rate", "grad-norm", "params-norm", "num-zeros", "loss-scale", "batch-size"),
    "speed": ("tokens_per_s", "data_wait_share", "tflops_per_gpu", "mfu", "first_step_s"),
    "data": ("samples_read", "samples_lost"),
}
_RULES = (
    # Megatron's mean of a single step, beside ours of an interval.
    (r"lm loss", r"loss/one_step"),
    (r"loss", r"loss/all"),
    (r"loss_(.+)", r"loss/\1"),
    (r"(mtp_\d+) loss", r"loss/\1"),
    (r"lm loss validation(.*)", r"loss_held_out/all\1"),
    (r"(\S+) loss validation(.*)", r"loss_held_out/\1\2"),
    (r"(\S+)_loss", r"loss_router/\1"),
    *((re.escape(name), f"{group}/{name}") for group, names in GROUPS.items() for name in names),
)


def grouped(tag: str) -> str:
    """The tag with its group in front; one that has a group keeps it.

    Args:
        tag: of Megatron, such as ``lm loss validation vs samples``, or a key of ``metrics.jsonl``.
    """
    if "/" in tag:
        return tag
    if tag.endswith(" vs samples"):
        return f"vs_samples/{tag.removesuffix(' vs samples')}"
    for pattern, name in _RULES:
        if found := re.fullmatch(pattern, tag):
            return found.expand(name)
    return f"megatron/{tag}"
