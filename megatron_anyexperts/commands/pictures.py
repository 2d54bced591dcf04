"""Draw what routing learned: losses and slots over training, importance over held-out images and video frames.

    anyexperts pictures --run-dir RUN

Reads RUN/logs and the newest checkpoint; writes PNG files to RUN/pictures.
"""

import sys
from pathlib import Path

from megatron_anyexperts.console import own_lines_only, say
from megatron_anyexperts.evaluation.trained_model import load_model, start
from megatron_anyexperts.training.arguments import UsageError


@own_lines_only
def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        args = start(sys.argv[1:] if cli is None else cli)
        if args.run_dir is None:
            raise UsageError("--run-dir is not set; it names the run to draw")
        from megatron_anyexperts.analysis import charts
        from megatron_anyexperts.analysis.pictures import frame_bars, importance_heatmaps
        from megatron_anyexperts.analysis.run_record import RunRecord, is_run
        from megatron_anyexperts.evaluation.media_importance import media_importance

        root = Path(args.run_dir)
        folder = root / "pictures"
        if is_run(root) and (record := RunRecord.read(root)).metrics:
            charts.write_png(charts.losses(record), folder / "loss_by_modality.png")
            charts.write_png(charts.slots(record), folder / "slots_by_modality.png")
            if (distribution := charts.slot_distribution(record)) is not None:
                charts.write_png(distribution, folder / "slot_distribution.png")
        media = media_importance(args, load_model(args), count=4)
        if media.images:
            charts.write_png(importance_heatmaps(media), folder / "importance.png")
        if media.videos:
            charts.write_png(frame_bars(media), folder / "frames.png")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"pictures: {folder}")
    return 0
