"""Draw what routing learned: losses and slots over training, importance over held-out images and video frames.

    anyexperts pictures --run-dir RUN

Reads RUN/logs and the newest checkpoint; writes PNG files to RUN/pictures.
"""

import sys
from pathlib import Path

from megatron_anyexperts.evaluation.trained_model import load_model, start
from megatron_anyexperts.survival import runlog
from megatron_anyexperts.survival.run_directory import Run
from megatron_anyexperts.training.arguments import UsageError


def main(cli: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        args = start(sys.argv[1:] if cli is None else cli)
        if args.run_dir is None:
            raise UsageError("--run-dir is not set; it names the run to draw")
        from megatron_anyexperts.analysis.pictures import frame_bars, importance_heatmaps, loss_curves, slot_curves
        from megatron_anyexperts.evaluation.media_importance import media_importance

        run = Run(Path(args.run_dir))
        folder = run.root / "pictures"
        metrics = runlog.read_metrics(run)
        if metrics:
            loss_curves(metrics, folder / "loss_by_modality.png")
            slot_curves(metrics, folder / "slots_by_modality.png")
        images, videos = media_importance(args, load_model(args), count=4)
        if images:
            importance_heatmaps(images, folder / "importance.png")
        if videos:
            frame_bars(videos, folder / "frames.png")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"pictures: {folder}")
    return 0
