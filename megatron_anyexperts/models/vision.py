"""Vision encoder: a transformer over the patches of images and video frames in their native resolution."""

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_anyexperts.media import MediaShape
from megatron_anyexperts.models.encoder import FourierPositions, PackedTransformer, plain_linear
from megatron_anyexperts.models.specs import build_projector
from megatron_anyexperts.models.to_device import to_device


def merged_layout(
    grids: Sequence[Sequence[int]], merge: int, first_frames: Sequence[int] = ()
) -> tuple[Tensor, Tensor, list[int]]:
    """Order in which the patches that become one token are neighbours.

    Args:
        grids: the patch grid (t, h, w) of each image or video.
        merge: patches along each side of a token; divides h and w.
        first_frames: the frame of its video that each grid begins with; empty for 0.

    Returns:
        order_P: int64 [P], where to find each patch in row-major (t, h, w) order of the concatenated grids.
        positions_P3: int64 [P, 3], (t, row, column) of the patches in the new order.
        frame_lengths: patches of every frame, in order; attention stays inside a frame.
    """
    orders, positions, frame_lengths, start = [], [], [], 0
    for (t, h, w), first in zip(grids, first_frames or [0] * len(grids), strict=True):
        grid = torch.arange(t * h * w).view(t, h // merge, merge, w // merge, merge)
        order = grid.transpose(2, 3).flatten()
        orders.append(order + start)
        positions.append(torch.stack([first + order // (h * w), order // w % h, order % w], dim=1))
        frame_lengths += [h * w] * t
        start += t * h * w
    return torch.cat(orders), torch.cat(positions), frame_lengths


class VisionEncoder(MegatronModule):
    """Patches of images and videos -> decoder features, one row per placeholder token.

    1. Patch embedding plus position embedding of (time, row, column):  [P, 3 p p] -> [P, Hv]
    2. Transformer, attention inside each image or frame:               [P, Hv]
    3. Merge of m x m neighbours:                                       [P / m^2, m^2 Hv]
    4. Projector:                                                       [P / m^2, H]

    Args:
        config: the encoder's configuration (Hv, layers, heads).
        output_size: the decoder's hidden size H.
        shape: patch size p and merge m.
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
        # A patch of ordinary contrast, standard deviation 1/3, comes out at about 1: at the deviation of other weights
        # where it lies would outweigh what it shows.
        self.embed = plain_linear(shape.patch_values, config, std=3 * shape.patch_values**-0.5)
        self.positions = FourierPositions(3, config)
        self.transformer = PackedTransformer(config, pg_collection)
        merged = shape.spatial_merge**2 * config.hidden_size
        self.projector = build_projector(config, merged, output_size, pg_collection)

    def forward(
        self, patches_PD: Tensor, grids: Sequence[Sequence[int]], first_frames: Sequence[int] = ()
    ) -> Tensor:
        """Encode.

        Args:
            patches_PD: float [P, 3 p p], row-major (t, h, w) patches of all images and videos, one behind the other.
            grids: patch grids (t, h, w), at least one.
            first_frames: see `merged_layout`.

        Returns:
            [tokens, H], in the order of the images, row-major (t, h / m, w / m) within each.

        Raises:
            ValueError: the grids do not cover the patches, or are not a multiple of the merge.
        """
        tokens = sum(self.shape.image_token_count(grid) for grid in grids)
        covered = tokens * self.shape.spatial_merge**2
        if covered != patches_PD.size(0):
            raise ValueError(f"image_grids describe {covered} patches, image_patches holds {patches_PD.size(0)}")
        order_P, positions_P3, frame_lengths = merged_layout(grids, self.shape.spatial_merge, first_frames)
        device = patches_PD.device
        patches_PD = patches_PD.index_select(0, to_device(order_P, device)).to(self.embed.weight.dtype)
        x_PH = self.embed(patches_PD) + self.positions(to_device(positions_P3, device))
        x_PH = self.transformer(x_PH, frame_lengths)
        return self.projector(x_PH.reshape(tokens, 1, -1))[0].squeeze(1)

    def smallest_input(self, device: torch.device) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """A black image of one token, as arguments of `forward`."""
        merge = self.shape.spatial_merge
        patches = torch.zeros(merge * merge, self.shape.patch_values, device=device)
        return patches, [(1, merge, merge)]
