"""What a plan found, as plain data and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_anyexperts.checks.plan_config import Question
from megatron_anyexperts.checks.plan_copies import copy_costs
from megatron_anyexperts.checks.plan_parameters import by_part
from megatron_anyexperts.checks.plan_save import save
from megatron_anyexperts.checks.plan_search import Candidate, neighbours, why_not
from megatron_anyexperts.checks.plan_time import Setting
from megatron_anyexperts.checks.plan_work import encoder_work, training_operations
from megatron_anyexperts.hardware import GIB

DAY = 86_400


def speed(setting: Setting, one: Candidate, budget: float | None, price: float | None) -> dict[str, float]:
    """Tokens a second, model FLOP utilisation of the bf16 peak, and days and price of a token budget."""
    layout, feed = one.layout, setting.feed
    tokens = layout.global_batch * layout.sequence / one.step.total
    operations = training_operations(setting.sizes, feed.document)
    if feed.pictures:
        operations += 3 * feed.pictures * encoder_work(
            setting.sizes.vision, setting.sizes.hidden, feed.patches
        ).operations  # fmt: skip
    each = tokens / layout.gpus
    found = {
        "step_seconds": one.step.total,
        "tokens_per_second": tokens,
        "tflops_per_gpu": each * operations / 1e12,
        "mfu": each * operations / setting.gpu.bf16,
    }
    if budget:
        found["days"] = budget / tokens / DAY
        if price:
            found["cost"] = found["days"] * 24 * layout.gpus * price
    return found


def describe(setting: Setting, one: Candidate, own: Any) -> dict[str, Any]:
    """All figures of one layout that can be had."""
    memory, step = one.memory, one.step
    found = {
        "layout": asdict(one.layout) | {"recompute": sorted(one.layout.recompute), "data": one.layout.data},
        "refused": one.reason,
    }
    if memory is None:
        return found
    gib = {name: value / GIB for name, value in asdict(memory).items()}
    stored = save(setting.sizes, one.layout, setting.precision, own.write_gb_per_second * 1e9)
    found |= {
        "gib_per_gpu": gib | {"text_rows": memory.text / GIB, "picture_rows": memory.most / GIB},
        "room_gib": setting.gpu.memory * setting.reached.fill / GIB,
        "save": {
            "stored_gib": stored.stored / GIB,
            "stall_seconds": stored.stall,
            "shard_gib": stored.shard / GIB,
            "host_gib": stored.host / GIB,
            "host_most_gib": stored.host_most / GIB,
        },
        "gib_sent_per_gpu_and_step": {
            cause: {"nvlink": sent.nvlink / GIB, "network": sent.network / GIB} for cause, sent in step.sent.items()
        },
        "seconds": step.seconds,
        "speed": speed(setting, one, own.tokens, own.price_per_gpu_hour),
    }
    if setting.sizes.mixture and one.layout.expert > 1:
        found["copies"] = {link: asdict(cost) for link, cost in copy_costs(setting, one.layout).items()}
    return found


def plan(question: Question, found: Sequence[Candidate], mine: Candidate, own: Any) -> dict[str, Any]:
    """The whole answer as plain data.

    Args:
        question: what was asked.
        found: see `plan_search.search`.
        mine: the configuration's own layout.
        own: flags of the command.
    """
    setting = question.setting
    best = found[0] if found[0].reason is None else None
    reasons = Counter(_kind(each.reason) for each in found if each.reason)
    return {
        "gpu": own.gpu,
        "gpus": question.layout.gpus,
        "assumptions": [*question.notes, _feed(setting)],
        "efficiencies": asdict(setting.reached),
        "parameters": by_part(setting.sizes),
        "configuration": describe(setting, mine, own),
        "best": describe(setting, best, own) if best else None,
        "against_best": why_not(best, mine) if best and mine != best else None,
        "tried": len(found),
        "refused": dict(reasons.most_common()),
        "neighbours": [{"layout": str(each.layout), "why": why} for each, why in neighbours(found)] if best else [],
    }


def _kind(reason: str) -> str:
    return "does not fit" if reason.startswith("needs ") else "cannot be laid out so"


def _feed(setting: Setting) -> str:
    feed, mixture = setting.feed, setting.sizes.mixture
    slots = f", {mixture.real:g} real slots a token, experts evenly loaded" if mixture else ""
    return f"documents of {feed.document:,.0f} tokens, {feed.pictures:.0%} of them of pictures{slots}"


def text(answer: dict[str, Any]) -> str:
    """For people."""
    whole = sum(answer["parameters"].values())
    parts = ", ".join(f"{part} {number / 1e9:.3g}" for part, number in answer["parameters"].items() if number > 1e6)
    lines = [
        f"{answer['gpus']} {answer['gpu'].upper()}, {whole / 1e9:.2f} billion parameters: {parts}",
        *(f"assumed: {note}" for note in answer["assumptions"]),
        "",
        "the configuration's layout",
        *_lines(answer["configuration"]),
    ]
    if answer["best"] is None:
        return "\n".join([*lines, "", f"none of {answer['tried']:,} layouts fits: {answer['refused']}"])
    refused = ", ".join(f"{number:,} {why}" for why, number in answer["refused"].items())
    lines += ["", f"the fastest of {answer['tried']:,} layouts that fits ({refused})"]
    lines += ["  it is the configuration's"] if answer["against_best"] is None else _lines(answer["best"])
    if answer["against_best"]:
        lines += [f"  the configuration's against it: {answer['against_best']}"]
    lines += ["", "its neighbours"]
    lines += [f"  {each['layout']}: {each['why']}" for each in answer["neighbours"]]
    return "\n".join(lines)


def _lines(found: dict[str, Any]) -> list[str]:
    layout = found["layout"]
    shape = f"TP{layout['tensor']} PP{layout['pipeline']} EP{layout['expert']} DP{layout['data']}"
    recompute = ", ".join(layout["recompute"]) or "nothing"
    lines = [f"  {shape}, micro batch {layout['micro_batch']}, recompute {recompute}"]
    if found["refused"]:
        lines.append(f"  refused: {found['refused']}")
    if "speed" not in found:
        return lines
    gib, stored, speed = found["gib_per_gpu"], found["save"], found["speed"]
    seconds = sorted(found["seconds"].items(), key=lambda pair: -pair[1])
    lines += [
        f"  GiB a GPU    text rows {gib['text_rows']:.1f}, rows of pictures {gib['picture_rows']:.1f}, of "
        f"{found['room_gib']:.0f}: static {gib['static']:.1f}, activations {gib['activations']:.1f}, logits "
        f"{gib['logits']:.1f}, exchange {gib['exchange']:.1f} (worst step {gib['exchange_worst']:.1f}), pictures "
        f"{gib['pictures']:.1f}",
        f"  a step       {speed['step_seconds']:.2f} s: "
        + ", ".join(f"{cause} {value:.2f}" for cause, value in seconds if value > 0.005 * speed["step_seconds"]),
        f"  speed        {speed['tokens_per_second']:,.0f} tokens/s, {speed['tflops_per_gpu']:.0f} TFLOP/s a GPU, "
        f"{speed['mfu']:.1%} of the bf16 peak",
    ]
    sent = {cause: each for cause, each in found["gib_sent_per_gpu_and_step"].items() if any(each.values())}
    links = "; ".join(f"{cause} {each['nvlink']:.2f} / {each['network']:.2f}" for cause, each in sent.items())
    lines += [
        f"  GiB sent     a GPU and step, NVLink / network: {links or 'none'}",
        f"  a checkpoint {stored['stored_gib']:.0f} GiB, {stored['stall_seconds']:.0f} s; a rank's shard "
        f"{stored['shard_gib']:.1f} GiB, copied to host memory: {stored['host_gib']:.0f} GiB a node, at most "
        f"{stored['host_most_gib']:.0f}",
    ]
    for link, cost in found.get("copies", {}).items():
        lines.append(
            f"  a copy       over {link} takes {cost['seconds'] * 1e6:.0f} us and pays from {cost['slots']:,} slots, "
            f"the first at a load of {cost['imbalance']:.2f} times the mean"
        )
    if "days" in speed:
        cost = f", cost {speed['cost']:,.0f}" if "cost" in speed else ""
        lines.append(f"  the budget   {speed['days']:.1f} days{cost}")
    return lines
