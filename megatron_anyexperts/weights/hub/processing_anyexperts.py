"""Texts with pictures and sound as the inputs of an exported model."""

import math
from collections.abc import Iterable, Sequence
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
        sounds: `n_mels`, `audio_stride` and `max_seconds`; None for a model that does not hear.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        chat_template: str | None = None,
        pictures: dict | None = None,
        sounds: dict | None = None,
        **others: Any,
    ):
        super().__init__(tokenizer, chat_template=chat_template, **others)
        self.pictures, self.sounds = pictures, sounds

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        return_tensors: str = "pt",
        **options: Any,
    ) -> BatchFeature:
        """Tensors for `forward` and `generate`.

        Args:
            text: with one ``<|image|>`` or ``<|audio|>`` for each medium, as the chat template writes them.
            images: pictures of PIL, in the order of their placeholders over all texts.
            audio: clips, mono float samples at 16 kHz in [-1, 1], likewise.
            options: of the tokenizer.

        Raises:
            ValueError: media and placeholders differ in number, or a medium cannot be used.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: the model takes 'pt' only")
        pictures = [patches_of(image, **self._geometry("pictures")) for image in images]
        clips = [log_mel(samples, **self._geometry("sounds")) for samples in audio]
        counts = {"image": [], "audio": []}
        if pictures:
            counts["image"] = [h * w // self.pictures["spatial_merge"] ** 2 for _, (_, h, w) in pictures]
        if clips:
            counts["audio"] = [-(-len(clip) // self.sounds["audio_stride"]) for clip in clips]
        texts = [text] if isinstance(text, str) else list(text)
        for kind, sizes in counts.items():
            texts = _widened(texts, f"<|{kind}|>", sizes)
        options = {"add_special_tokens": False, "return_token_type_ids": False, "padding_side": "left"} | options
        found = dict(self.tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, **options))
        if pictures:
            found["image_patches"] = torch.cat([patches for patches, _ in pictures])
            found["image_grids"] = torch.tensor([grid for _, grid in pictures])
        if clips:
            found["audio_features"], found["audio_lengths"] = torch.cat(clips), torch.tensor([len(x) for x in clips])
        return BatchFeature(found)

    def _geometry(self, kind: str) -> dict[str, Any]:
        if (settings := getattr(self, kind)) is None:
            raise ValueError(f"the model has no encoder of {kind}")
        return settings


def _widened(texts: Iterable[str], token: str, counts: Sequence[int]) -> list[str]:
    found = sum(text.count(token) for text in texts)
    if found != len(counts):
        raise ValueError(f"the texts hold {found} times {token}, and there are {len(counts)} such media")
    left = iter(counts)
    pieces = [text.split(token) for text in texts]
    return ["".join(part + token * next(left) for part in parts[:-1]) + parts[-1] for parts in pieces]


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
