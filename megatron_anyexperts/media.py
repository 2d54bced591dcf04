"""The modalities, and media arithmetic: how many decoder tokens an image, a video or an audio clip becomes.

The data pipeline writes that many placeholder tokens and the encoders return that many feature rows; both ask
this file, so that they cannot disagree. Integers only: no torch, no decoding.
"""

from dataclasses import dataclass, field

MODALITIES = ("text", "image", "audio", "video")
"""All kinds of tokens and of samples; their places here are their codes in a microbatch."""
PAD, TEXT, IMAGE, AUDIO, VIDEO = range(-1, len(MODALITIES))
MODALITY_CODES = {name: code for code, name in enumerate(MODALITIES)}
VISION_CODES = (IMAGE, VIDEO)
"""Modalities whose features the vision encoder makes."""

SAMPLE_RATE = 16_000
WINDOW, HOP = 400, 160
"""Of the sound that becomes features, in Hz and samples: 25 ms windows, one every 10 ms."""

MAX_PIXELS = 64_000_000
"""Of an image or a video frame, checked before decoding."""
MAX_AUDIO_SECONDS = 30.0
MAX_VIDEO_SECONDS = 600.0
"""The default limits of the shard builder and of the loader: what the one accepts the other can read."""


def _flag(name: str):
    return {"argparse_meta": {"arg_names": [name]}}


@dataclass(frozen=True)
class MediaShape:
    """Geometry shared by the data pipeline and the encoders.

    Raises:
        ValueError: a field is not positive, or `audio_stride` is odd.
    """

    patch_size: int = field(default=14, metadata=_flag("--vision-patch-size"))
    """Side of a square image patch in pixels."""

    spatial_merge: int = field(default=2, metadata=_flag("--vision-spatial-merge"))
    """Patches along each side that become one decoder token: 2 turns 2 x 2 patches into one token."""

    n_mels: int = field(default=80, metadata=_flag("--audio-n-mels"))
    """Mel bins of an audio frame."""

    audio_stride: int = field(default=8, metadata=_flag("--audio-stride"))
    """Audio frames per decoder token; even, because the convolutional front end halves the frame rate.
    With a 10 ms hop, 8 gives 12.5 tokens a second."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "spatial_merge", "n_mels", "audio_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.audio_stride % 2:
            raise ValueError(f"audio_stride={self.audio_stride} must be even, such as {self.audio_stride + 1}")

    @classmethod
    def from_args(cls, args) -> "MediaShape":
        """The shape that the command line (or a YAML file) describes."""
        return cls(args.patch_size, args.spatial_merge, args.n_mels, args.audio_stride)

    @property
    def pixel_multiple(self) -> int:
        """Image sides are resized to a multiple of this many pixels, so that merging leaves no remainder."""
        return self.patch_size * self.spatial_merge

    @property
    def patch_values(self) -> int:
        """Values of one flattened RGB patch."""
        return 3 * self.patch_size**2

    @property
    def audio_merge(self) -> int:
        """Encoder positions stacked into one decoder token, after the front end halved the frame rate."""
        return self.audio_stride // 2

    def image_grid(self, height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
        """Grid (t, h, w) in patches of an image, or of `frames` video frames, of `height` x `width` pixels.

        Raises:
            ValueError: a side is not a positive multiple of `pixel_multiple`, or `frames` is not positive.
        """
        multiple = self.pixel_multiple
        if frames < 1 or min(height, width) < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"frames={frames}, height={height}, width={width}: frames must be positive and both sides "
                f"positive multiples of {multiple} (patch_size * spatial_merge); resize first"
            )
        return frames, height // self.patch_size, width // self.patch_size

    def image_token_count(self, grid_thw: tuple[int, int, int]) -> int:
        """Decoder tokens of one image or video with the patch grid (t, h, w).

        Raises:
            ValueError: h or w is not a multiple of `spatial_merge`.
        """
        t, h, w = (int(side) for side in grid_thw)
        merge = self.spatial_merge
        if h % merge or w % merge:
            raise ValueError(f"patch grid {h} x {w} is not a multiple of spatial_merge={merge} on both sides")
        return t * (h // merge) * (w // merge)

    def audio_token_count(self, frames: int) -> int:
        """Decoder tokens of one clip of `frames` log-mel frames (the last token may cover fewer frames)."""
        return -(-int(frames) // self.audio_stride)
