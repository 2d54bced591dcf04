"""Turns routing sums into means, histograms and log lines."""

from typing import Any

import torch
from torch import Tensor

SUMS = ("tokens", "slots", "real", "importance", "importance_squared")


def summarise(
    modalities: tuple[str, ...],
    sums_LMF: Tensor,
    experts_LE: Tensor,
    load_L6: Tensor,
    peak_L: Tensor,
    nonfinite_L: Tensor,
    k_max: int,
) -> dict[str, Any]:
    """Return plain numbers per layer and over all layers.

    Args:
        modalities: names of the M rows.
        sums_LMF: per layer and modality: `SUMS`, then token counts by slots 0..k_max and by real slots 0..k_max.
        experts_LE: slots received per expert, counted once per rank of an expert-parallel group.
        load_L6: per layer sums of: observations, received max/mean, demanded max/mean, and slots rerouted, displaced,
            copied.
        peak_L: highest received max/mean.
        nonfinite_L: tokens that were NaN or Inf, which are in none of the other sums.
        k_max: most slots of a token.

    Returns:
        ``{"all": S, "<modality>": S, "load": D, "layers": {number: the same three}, "nonfinite_tokens": N}`` for layers
        and modalities with tokens. N is that of the layer with the most. S has tokens (over layers: token-layer pairs),
        slots, real, virtual (means), importance, importance_std, slots_histogram and real_histogram (counts by number
        of slots). D has rank_max_over_mean, rank_max_over_mean_peak, demanded_max_over_mean, expert_max_over_mean,
        rerouted_share, displaced_share and copied_share (of the slots received). A layer
        has experts_over_mean as well: for each expert, the slots it received over the mean of all.
    """
    present = [layer for layer in range(len(sums_LMF)) if sums_LMF[layer, :, 0].sum() > 0]
    nonfinite = int(nonfinite_L.max()) if len(nonfinite_L) else 0
    if not present:
        return {"layers": {}, "nonfinite_tokens": nonfinite}

    def both(layers: list[int]) -> dict[str, Any]:
        sums_MF = sums_LMF[layers].sum(0)
        result = {"all": _tokens(sums_MF.sum(0), k_max)}
        for name, row in zip(modalities, sums_MF, strict=True):
            if row[0] > 0:
                result[name] = _tokens(row, k_max)
        seen, received, demanded, rerouted, displaced, copied = load_L6[layers].sum(0).tolist()
        slots = max(experts_LE[layers].sum().item(), 1)
        busy_LE = experts_LE[layers]
        result["load"] = {
            "rank_max_over_mean": received / max(seen, 1),
            "rank_max_over_mean_peak": peak_L[layers].max().item(),
            "demanded_max_over_mean": demanded / max(seen, 1),
            "expert_max_over_mean": (busy_LE.amax(1) / busy_LE.mean(1).clamp(min=1e-9)).mean().item(),
            "rerouted_share": rerouted / slots,
            "displaced_share": displaced / slots,
            "copied_share": copied / slots,
        }
        return result

    over_mean_LE = experts_LE / experts_LE.mean(1, keepdim=True).clamp(min=1e-9)
    layers = {layer + 1: {**both([layer]), "experts_over_mean": over_mean_LE[layer].tolist()} for layer in present}
    return {**both(present), "layers": layers, "nonfinite_tokens": nonfinite}


def _tokens(row_F: Tensor, k_max: int) -> dict[str, Any]:
    head, slots_histogram, real_histogram = row_F.split([len(SUMS), k_max + 1, k_max + 1])
    tokens, slots, real, importance, squared = head.tolist()
    mean = importance / tokens
    return {
        "tokens": int(tokens),
        "slots": slots / tokens,
        "real": real / tokens,
        "virtual": (slots - real) / tokens,
        "importance": mean,
        "importance_std": max(squared / tokens - mean**2, 0.0) ** 0.5,
        "slots_histogram": [int(count) for count in slots_histogram],
        "real_histogram": [int(count) for count in real_histogram],
    }


def _groups(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    others = ("load", "layers", "nonfinite_tokens", "experts_over_mean")
    return {name: value for name, value in summary.items() if name not in others}


def scalars(summary: dict[str, Any], per_layer: bool) -> dict[str, float]:
    """Return ``<figure>/<modality>`` and ``load/<figure>``, with ``layer_<number>/...`` on request."""
    result: dict[str, float] = {"load/nonfinite_tokens": summary["nonfinite_tokens"]}
    parts = {"": summary}
    if per_layer:
        parts |= {f"layer_{number}/": layer for number, layer in summary["layers"].items()}
    for prefix, part in parts.items():
        for modality, figures in _groups(part).items():
            for key in ("slots", "real", "virtual", "importance", "importance_std"):
                result[f"{prefix}{key}/{modality}"] = figures[key]
        for key, value in part.get("load", {}).items():
            result[f"{prefix}load/{key}"] = value
    return result


def write_histograms(writer, summary: dict[str, Any], iteration: int) -> None:
    """Write the distributions of total, real and virtual slots per modality to TensorBoard."""
    for modality, figures in _groups(summary).items():
        for key in ("slots", "real"):
            counts = torch.tensor(figures[f"{key}_histogram"], dtype=torch.float64)
            value = torch.arange(len(counts), dtype=torch.float64)
            writer.add_histogram_raw(
                f"{key}_distribution/{modality}",
                min=0,
                max=len(counts) - 1,
                num=int(counts.sum()),
                sum=float((counts * value).sum()),
                sum_squares=float((counts * value**2).sum()),
                bucket_limits=(value + 0.5).tolist(),
                bucket_counts=counts.tolist(),
                global_step=iteration,
            )


def quantiles(histogram: list[int], shares: tuple[float, ...] = (0.1, 0.5, 0.9)) -> list[int]:
    """Return the smallest slot counts that at least each share of the tokens do not exceed."""
    cumulated = torch.tensor(histogram).cumsum(0)
    return [int((cumulated >= share * cumulated[-1]).nonzero()[0]) for share in shares]


def console_line(summary: dict[str, Any]) -> str:
    """Return one line in the style of Megatron's log: means, and the 10, 50 and 90 % quantiles of slots."""
    nonfinite = summary["nonfinite_tokens"]
    line = f" tokens that are NaN or Inf, without experts: {nonfinite} |" if nonfinite else ""
    if not _groups(summary):
        return line
    for modality, figures in _groups(summary).items():
        low, mid, high = quantiles(figures["slots_histogram"])
        line += (
            f" {modality}: slots {figures['slots']:.2f} ({low}/{mid}/{high}) real {figures['real']:.2f} "
            f"virtual {figures['virtual']:.2f} w {figures['importance']:.3f}+-{figures['importance_std']:.3f} |"
        )
    load = summary["load"]
    return line + (
        f" rank load max/mean: {load['rank_max_over_mean']:.3f} (peak {load['rank_max_over_mean_peak']:.3f}) |"
        f" rerouted: {load['rerouted_share']:.2%} | displaced: {load['displaced_share']:.2%} |"
        f" copied: {load['copied_share']:.2%} |"
    )
