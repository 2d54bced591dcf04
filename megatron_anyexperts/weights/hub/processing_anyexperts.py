"""Texts with pictures, video and sound as the inputs of an exported model."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.audio_utils import mel_filter_bank

try:  # needed where there are pictures
    from PIL import Image
except ImportError:
    Image = None

SAMPLE_RATE, WINDOW, HOP = 16_000, 400, 160
_ORIENTATION = 0x0112
_SWAPS_SIDES = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
"""What makes orientation 2, 3, .. upright."""


class AnyExpertsProcessor(ProcessorMixin):
    """Widens placeholders to the tokens that each medium takes, and makes patches and log-mel frames.

    Args:
        tokenizer: of the model.
        pictures: `patch_size`, `spatial_merge`, `min_patches` and `max_patches`; None for a model that does not see.
        videos: `fps`, `max_frames` and `max_patches`; None for a model that does not see.
        sounds: `n_mels`, `audio_stride` and `max_seconds`; None for a model that does not hear.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        chat_template: str | None = None,
        pictures: dict | None = None,
        videos: dict | None = None,
        sounds: dict | None = None,
        **others: Any,
    ):
        super().__init__(tokenizer, chat_template=chat_template, **others)
        self.pictures, self.videos, self.sounds = pictures, videos, sounds

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] = (),
        videos: Sequence[tuple[Sequence[Any], Sequence[float]]] = (),
        audio: Sequence[Any] = (),
        return_tensors: str = "pt",
        **options: Any,
    ) -> BatchFeature:
        """Tensors for `forward` and `generate`.

        Args:
            text: with one ``<|image|>``, ``<|video|>`` or ``<|audio|>`` for each medium, as chat templates write it.
            images: pictures of PIL, in the order of their placeholders over all texts.
            videos: all frames as pictures of PIL and when each is shown, in seconds; some of them are taken.
            audio: clips, mono float samples at 16 kHz in [-1, 1].
            options: of the tokenizer.

        Raises:
            ValueError: media and placeholders differ in number, or a medium cannot be used.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: the model takes 'pt' only")
        texts = [text] if isinstance(text, str) else list(text)
        media = {"image": [self._image(image) for image in images], "video": [self._video(*each) for each in videos]}
        media["audio"] = [self._audio(samples) for samples in audio]
        for kind, given in media.items():
            if (found := sum(each.count(f"<|{kind}|>") for each in texts)) != len(given):
                raise ValueError(f"the texts hold {found} times <|{kind}|>, and there are {len(given)} such media")
        left = {kind: iter(given) for kind, given in media.items()}
        seen, heard = [], []

        def widened(match: re.Match) -> str:
            tokens, *values = next(left[match[1]])
            (heard if match[1] == "audio" else seen).append(values)
            return tokens

        texts = [re.sub(r"<\|(image|video|audio)\|>", widened, each) for each in texts]
        options = {"add_special_tokens": False, "return_token_type_ids": False, "padding_side": "left"} | options
        found = dict(self.tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, **options))
        if seen:
            found["image_patches"] = torch.cat([patches for patches, _ in seen])
            found["image_grids"] = torch.tensor([grid for _, grid in seen])
        if heard:
            found["audio_features"] = torch.cat([clip for (clip,) in heard])
            found["audio_lengths"] = torch.tensor([len(clip) for (clip,) in heard])
        return BatchFeature(found)

    def _image(self, image) -> tuple[str, Tensor, tuple[int, int, int]]:
        """Placeholders, patches and grid."""
        patches, grid = patches_of(image, **_settings(self.pictures, "pictures"))
        return "<|image|>" * self._tokens(grid), patches, grid

    def _video(self, frames: Sequence[Any], seconds: Sequence[float]) -> tuple[str, Tensor, tuple[int, int, int]]:
        """Each frame's time and placeholders, patches of all, and grid."""
        limits, chosen = _settings(self.videos, "videos"), dict(_settings(self.pictures, "pictures"))
        taken = sample_frames(seconds, limits["fps"], limits["max_frames"])
        for name in ("min_patches", "max_patches"):
            chosen[name] = min(chosen[name], limits["max_patches"] // len(taken))
        cut = [patches_of(frames[index], **chosen) for index in taken]
        _, (_, rows, columns) = cut[0]
        times = (f"{seconds[index]:.1f}s" + "<|video|>" * self._tokens((1, rows, columns)) for index in taken)
        return "".join(times), torch.cat([patches for patches, _ in cut]), (len(cut), rows, columns)

    def _audio(self, samples) -> tuple[str, Tensor]:
        """Placeholders and frames."""
        clip = log_mel(samples, **_settings(self.sounds, "sounds"))
        return "<|audio|>" * -(-len(clip) // self.sounds["audio_stride"]), clip

    def _tokens(self, grid: tuple[int, int, int]) -> int:
        return math.prod(grid) // self.pictures["spatial_merge"] ** 2


def _settings(settings: dict[str, Any] | None, kind: str) -> dict[str, Any]:
    if settings is None:
        raise ValueError(f"the model has no encoder of {kind}")
    return settings


def sample_frames(seconds: Sequence[float], fps: float, max_frames: int) -> list[int]:
    """Which frames to take: `fps` per second while that fits in `max_frames`, else spread evenly."""
    length = len(seconds)
    duration = seconds[-1] + (seconds[-1] / (length - 1) if length > 1 else 0.0)
    count = max(1, min(max_frames, length, round(duration * fps)))
    return [int((index + 0.5) * length / count) for index in range(count)]


def fit_grid(height: int, width: int, patch_size: int, spatial_merge: int, min_patches: int, max_patches: int):
    """(height, width) in pixels closest to the native size: multiples of a token's side, patches within the limits.

    Raises:
        ValueError: not one token fits.
    """
    area, multiple, scale = patch_size**2, patch_size * spatial_merge, 1.0
    if height * width > max_patches * area:
        scale = math.sqrt(max_patches * area / (height * width))
    elif height * width < min_patches * area:
        scale = math.sqrt(min_patches * area / (height * width))
    rows, columns = (max(1, round(side * scale / multiple)) for side in (height, width))
    while rows * columns > max_patches * area // multiple**2:  # rounding up may overshoot
        if rows >= columns and rows > 1:
            rows -= 1
        elif columns > 1:
            columns -= 1
        else:
            raise ValueError(f"max_patches={max_patches} is less than one merged patch; raise it")
    return rows * multiple, columns * multiple


def patches_of(image, patch_size: int, **limits: int) -> tuple[Tensor, tuple[int, int, int]]:
    """A picture as fp32 patches [h * w, 3 p p] in raster order, values in [-1, 1], and its grid (1, h, w).

    Raises:
        ValueError: no picture of 8 bits a channel.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"a picture of mode {image.mode}: convert it to 8 bits a channel first")
    orientation = image.getexif().get(_ORIENTATION, 1)
    swaps = orientation in _SWAPS_SIDES
    width, height = reversed(image.size) if swaps else image.size
    height, width = fit_grid(height, width, patch_size, **limits)
    if hasattr(image, "draft"):  # JPEG files are decoded at a smaller scale where that suffices
        image.draft("RGB", (height, width) if swaps else (width, height))
        image.load()
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    image = image.convert("RGBA" if transparent else "RGB")
    if 2 <= orientation <= 8:
        image = image.transpose(Image.Transpose[_TURNS[orientation - 2]])
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = height // patch_size, width // patch_size
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    values = values.view(rows, patch_size, columns, patch_size, 3).permute(0, 2, 4, 1, 3)
    return values.reshape(rows * columns, -1).float() * (2 / 255) - 1, (1, rows, columns)


def log_mel(samples, n_mels: int, audio_stride: int, max_seconds: float) -> Tensor:
    """Log-mel frames fp32 [n // 160, n_mels] of a mono clip at 16 kHz, as Whisper's front end makes them.

    Raises:
        ValueError: longer than `max_seconds`.
    """
    wave = torch.as_tensor(samples, dtype=torch.float32)
    if len(wave) > max_seconds * SAMPLE_RATE:
        raise ValueError(f"a clip of {len(wave) / SAMPLE_RATE:.1f} s, limit {max_seconds}")
    wave = torch.nn.functional.pad(wave, (0, max(0, WINDOW - len(wave))))
    bank = mel_filter_bank(
        WINDOW // 2 + 1, n_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    spectrum = torch.stft(wave, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    power = spectrum[:, : max(1, len(wave) // HOP)].abs().square()
    decades = (power.T @ torch.from_numpy(bank).float()).clamp(min=1e-10).log10()
    return (torch.maximum(decades, decades.max() - 8.0) + 4.0) / 4.0
