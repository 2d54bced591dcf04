"""Settings of the data feed; Megatron's argument machinery turns each field into a flag."""

from dataclasses import asdict, dataclass

from megatron_anyexperts.media import MAX_AUDIO_SECONDS, MAX_PIXELS, MAX_VIDEO_SECONDS


@dataclass
class DataConfig:
    """What the loader reads, how it packs and how much failure it tolerates.

    The blend itself is Megatron's ``--data-path`` and the row length its ``--seq-length``.
    """

    data_streams: int = 4
    """Logical data streams (V): fixed for the life of a run, whatever its rank count. The data-parallel size must
    divide it; each rank runs V / dp_size worker processes."""

    data_mixture_schedule: str | None = None
    """YAML file of stages at which the weights of the blend's datasets change; see docs/data.md. A run that is
    resumed may change stages that have not begun."""

    data_shuffle_buffer: int = 1000
    """Samples held per stream for shuffling, still compressed. 0 switches the buffer off."""

    data_packing_buffer: int = 512
    """Samples per stream among which packing chooses. Larger fills rows better and takes longer to start."""

    data_run_length: int = 100
    """Longest run of consecutive samples of one shard before the stream jumps to another place."""

    data_open_shards: int = 16
    """Shards that a stream reads from in turn."""

    data_image_min_patches: int = 16
    """Smaller images are enlarged to about this many patches, aspect kept."""

    data_image_max_patches: int = 1024
    """Larger images are reduced to at most this many patches, aspect kept."""

    data_image_max_pixels: int = MAX_PIXELS
    """Images and video frames with more pixels than this are rejected before they are decoded."""

    data_video_fps: float = 1.0
    """Frames sampled from each second of video, until the frame budget is reached; then uniformly."""

    data_video_max_frames: int = 16
    """Frame budget of one video."""

    data_video_max_patches: int = 2048
    """Patch budget of one video over all its frames."""

    data_video_max_seconds: float = MAX_VIDEO_SECONDS
    """Longer videos are rejected."""

    data_audio_max_seconds: float = MAX_AUDIO_SECONDS
    """Longer audio clips are rejected."""

    data_row_patches: int | None = None
    """Patches that one packed row may carry. Unset: bounded by the row's tokens only."""

    data_row_audio_frames: int | None = None
    """Log-mel frames that one packed row may carry. Unset: bounded by the row's tokens only."""

    data_error_budget: int = 100
    """Samples one rank may lose to errors and rejections since its start; one more stops the run."""

    data_error_rate: float = 0.01
    """Share of samples one rank may lose; checked once 1000 samples were read."""

    data_storage_retries: int = 4
    """Repetitions of a failed read before the sample counts as lost."""

    data_storage_backoff: float = 0.5
    """Seconds before the first repetition; doubled before each further one."""

    data_watchdog_seconds: float = 600.0
    """A stream that yields nothing for this long stops the run."""

    def __post_init__(self) -> None:
        at_least = {
            "data_streams": 1, "data_shuffle_buffer": 0, "data_packing_buffer": 1, "data_run_length": 1,
            "data_open_shards": 1, "data_image_min_patches": 1, "data_video_max_frames": 1,
            "data_error_budget": 0, "data_storage_retries": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("data_video_fps", "data_video_max_seconds", "data_audio_max_seconds", "data_watchdog_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.data_image_max_patches < self.data_image_min_patches:
            raise ValueError(
                f"data_image_max_patches={self.data_image_max_patches} is below "
                f"data_image_min_patches={self.data_image_min_patches}; raise the first or lower the second"
            )
        if not 0 <= self.data_error_rate <= 1:
            raise ValueError(f"data_error_rate={self.data_error_rate} must lie in [0, 1]")

    def order_fields(self) -> dict:
        """The settings that decide which samples come when and how they look; a resumed run must keep them."""
        # The schedule is compared by its content, as far as it has been followed; see `elastic`.
        tolerance = ("data_error_", "data_storage_", "data_watchdog_", "data_mixture_schedule")
        return {name: value for name, value in asdict(self).items() if not name.startswith(tolerance)}
