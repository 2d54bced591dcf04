"""Audio encoder: a convolutional front end and a transformer over log-mel frames."""

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import conv1d, gelu

from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.encoder import FourierPositions, PackedTransformer, SideBySide, plain_linear
from megatron_anyexperts.models.specs import build_projector
from megatron_anyexperts.models.to_device import to_device


class ConvFrontEnd(torch.nn.Module):
    """Two convolutions over time, kernel 3, the second with stride 2, as in Whisper (arXiv 2212.04356).

    Clips never touch: each is convolved alone, with zeros beyond its ends.
    """

    def __init__(self, n_mels: int, config: TransformerConfig):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.conv1 = plain_linear(3 * n_mels, config)
        self.conv2 = plain_linear(3 * config.hidden_size, config)

    def forward(self, mels_FC: Tensor, lengths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Halve the frame rate: [F, n_mels] with `lengths` -> [F', H] with ceil(length / 2) each."""
        halved = [-(-length // 2) for length in lengths]
        side = SideBySide.of(lengths, mels_FC.device, multiple=2)
        x_MLH = gelu(self._convolve(side.pad(mels_FC), self.conv1.weight, stride=1)) * side.real().unsqueeze(-1)
        x_MLH = gelu(self._convolve(x_MLH, self.conv2.weight, stride=2))
        return SideBySide.of(halved, mels_FC.device).unpad(x_MLH), halved

    def _convolve(self, x_MLC: Tensor, weight_HK: Tensor, stride: int) -> Tensor:
        kernel = weight_HK.view(self.hidden_size, -1, 3)
        return conv1d(x_MLC.transpose(1, 2), kernel, stride=stride, padding=1).transpose(1, 2)


class AudioEncoder(MegatronModule):
    """Log-mel frames of clips -> decoder features, one row per placeholder token.

    1. Convolutional front end plus position embedding:  [F, n_mels] -> [about F / 2, Ha]
    2. Transformer, attention inside each clip:          [about F / 2, Ha]
    3. Merge of neighbours up to `audio_stride` frames:  [about F / audio_stride, merge Ha]
    4. Projector:                                        [about F / audio_stride, H]

    Args:
        config: the encoder's configuration (Ha, layers, heads).
        output_size: the decoder's hidden size H.
        shape: mel bins and frames per token.
        pg_collection: process groups; the transformer and the projector are split over `tp`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        output_size: int,
        shape: MediaShape,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config)
        self.shape = shape
        self.front_end = ConvFrontEnd(shape.n_mels, config)
        self.positions = FourierPositions(1, config)
        self.transformer = PackedTransformer(config, pg_collection)
        merged = shape.audio_merge * config.hidden_size
        self.projector = build_projector(config, merged, output_size, pg_collection)

    def forward(self, mels_FC: Tensor, lengths: Sequence[int]) -> Tensor:
        """Encode.

        Args:
            mels_FC: float [F, n_mels], the frames of all clips, one clip behind the other.
            lengths: frames of each clip, at least one.

        Returns:
            [tokens, H], `MediaShape.audio_token_count(length)` rows for each clip, in order.

        Raises:
            ValueError: the lengths do not add up to the frames, or a clip is empty.
        """
        if sum(lengths) != mels_FC.size(0) or min(lengths) < 1:
            raise ValueError(
                f"audio_lengths {list(lengths)} (sum {sum(lengths)}) must be positive and add up to the "
                f"{mels_FC.size(0)} frames of audio_features"
            )
        x_PH, halved = self.front_end(mels_FC.to(self.front_end.conv1.weight.dtype), lengths)
        steps_P = torch.cat([torch.arange(length) for length in halved])
        x_PH = self.transformer(x_PH + self.positions(to_device(steps_P, x_PH.device).unsqueeze(1)), halved)
        merge = self.shape.audio_merge
        # A token is real when its first position is; zeros fill up the last token of a clip.
        x_MLH = SideBySide.of(halved, x_PH.device, multiple=merge).pad(x_PH)
        side = SideBySide.of([-(-length // merge) for length in halved], x_PH.device)
        tokens_TH = side.unpad(x_MLH.reshape(len(halved), side.length, -1))
        return self.projector(tokens_TH.unsqueeze(1))[0].squeeze(1)

    def smallest_input(self, device: torch.device) -> tuple[Tensor, list[int]]:
        """A silent clip of one token, as arguments of `forward`."""
        return torch.zeros(1, self.shape.n_mels, device=device), [1]
