"""The fastest layout that fits, and why its neighbours lose."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

from megatron_anyexperts.checks.plan_layout import Layout, refusal
from megatron_anyexperts.checks.plan_memory import Memory, fullest
from megatron_anyexperts.checks.plan_time import Setting, Step, step_time
from megatron_anyexperts.hardware import GIB

RECOMPUTE = (frozenset(), frozenset({"layernorm", "moe_act"}), frozenset({"mlp", "moe"}), frozenset({"full"}))
"""What is tried: nothing, norms and activations of experts, whole MLPs and mixtures, whole layers."""

AXES = {
    "tensor": (1, 2, 4, 8),
    "pipeline": (1, 2, 4, 8, 16),
    "expert": (1, 2, 4, 8, 16, 32, 64),
    "micro_batch": (1, 2, 4, 8),
}
"""What else is tried. Experts are not split among tensor-parallel ranks: their products are small already."""


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs; `reason` is why it cannot be had or does not fit."""

    layout: Layout
    memory: Memory | None = None
    step: Step | None = None
    reason: str | None = None


def examine(setting: Setting, layout: Layout) -> Candidate:
    """Memory and time of one layout."""
    if reason := refusal(setting.sizes, layout):
        return Candidate(layout, reason=reason)
    memory, step = fullest(setting.sizes, layout, setting.precision), step_time(setting, layout)
    room = setting.gpu.memory * setting.reached.fill
    # Rows full of pictures come by chance: a plan that leaves no room for them ends in the night.
    reason = None
    if memory.most > room:
        reason = f"needs {memory.most / GIB:.0f} GiB of {room / GIB:.0f}"
    return Candidate(layout, memory, step, reason)


def search(setting: Setting, like: Layout) -> list[Candidate]:
    """All layouts of the axes for as many GPUs, and `like` itself; the fastest that fit first, then the others."""
    layouts = {like}
    for values in product(*AXES.values(), dict.fromkeys((*RECOMPUTE, like.recompute))):
        *sizes, recompute = values
        changes = dict(zip(AXES, sizes, strict=True))
        if changes["expert"] > 1 and setting.sizes.mixture is None:
            continue
        layouts.add(replace(like, **changes, recompute=recompute, expert_tensor=1))
    found = [examine(setting, layout) for layout in layouts]
    return sorted(found, key=lambda each: (each.reason is not None, each.step.total if each.step else 0.0,
                                           str(each.layout)))  # fmt: skip


def why_not(best: Candidate, other: Candidate) -> str:
    """Why a layout loses against the best one: it cannot be had, does not fit, or where it spends more time."""
    if other.reason:
        return other.reason
    more = Counter({cause: value - best.step.seconds[cause] for cause, value in other.step.seconds.items()})
    more.pop("everything else")
    causes = ", ".join(f"{cause} +{value:.2f} s" for cause, value in more.most_common(2) if value > 0.005)
    return f"{other.step.total / best.step.total - 1:+.0%}: {causes or 'no single cause'}"


def neighbours(found: list[Candidate]) -> list[tuple[Candidate, str]]:
    """The layouts that differ from the best in one choice, and why each loses."""
    best = found[0]
    names = (*AXES, "recompute")
    near = [
        each for each in found[1:]
        if sum(getattr(each.layout, name) != getattr(best.layout, name) for name in names) == 1
        and each.layout.expert_tensor == best.layout.expert_tensor
    ]  # fmt: skip
    order = {name: place for place, name in enumerate(names)}

    def changed(each: Candidate) -> tuple:
        name = next(name for name in names if getattr(each.layout, name) != getattr(best.layout, name))
        value = getattr(each.layout, name)
        return order[name], value if name != "recompute" else len(value), str(each.layout)

    return [(each, why_not(best, each)) for each in sorted(near, key=changed)]
