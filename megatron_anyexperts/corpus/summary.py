"""The summary of a finished build, as text."""

from pathlib import Path

from megatron_anyexperts.media import MAX_AUDIO_SECONDS, MAX_PIXELS, MAX_VIDEO_SECONDS

LOADER_LIMITS = (
    ("max_pixels", MAX_PIXELS, "--data-image-max-pixels"),
    ("max_audio_seconds", MAX_AUDIO_SECONDS, "--data-audio-max-seconds"),
    ("max_video_seconds", MAX_VIDEO_SECONDS, "--data-video-max-seconds"),
)
"""Limits of a corpus, what the loader accepts by default, and its flag for more."""


def table(rows: list[list], header: list[str]) -> str:
    """Columns aligned: the first to the left, numbers to the right, thousands separated."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def summary(manifest: dict, output: Path) -> str:
    """Samples, bytes and tokens by kind and split, and what was rejected and why."""
    modalities = [name for name, count in manifest["tokens"].items() if count]
    rows = [
        [f"{kind} {split}", entry["shards"], entry["samples"], entry["bytes"], *_pick(entry["tokens"], modalities)]
        for kind, splits in manifest["kinds"].items()
        for split, entry in splits.items()
    ]
    shards = sum(row[1] for row in rows)
    rows.append(["all", shards, manifest["samples"], manifest["bytes"], *_pick(manifest["tokens"], modalities)])
    header = ["kind, split", "shards", "samples", "bytes", *(f"{name} tokens" for name in modalities)]
    lines = [table(rows, header), ""]
    rejected = manifest["rejected"]
    total = sum(rejected.values())
    lines.append(f"{manifest['items']:,} items = {manifest['samples']:,} samples + {total:,} rejected")
    for reason, count in sorted(rejected.items(), key=lambda item: -item[1]):
        lines.append(f"  {count:10,}  {reason}")
    for limit, shared, flag in LOADER_LIMITS:
        if (ours := manifest["corpus"]["limits"][limit]) > shared:
            lines.append(f"training needs {flag} {ours:g} to read all samples of this corpus")
    lines += [f"warning: {warning}" for warning in manifest.get("warnings", ())]
    lines.append(f"corpus: {output}   blend: {output / 'blend.yaml'}   rejected: {output / 'rejected.jsonl'}")
    return "\n".join(lines)


def _pick(counts: dict[str, int], names: list[str]) -> list[int]:
    return [counts[name] for name in names]
