"""Which pixels matter: those of rare colours, and those that change.

In a picture of 64x64 pixels a cube covers 20. A mean squared error is content to paint the table over it, and a world
model that cannot see the object learns nothing about it. No colour is named here: what is rare is counted per camera.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simtoreal.world_models.config import TokenizerConfig
from simtoreal.world_models.video_data import VideoData

# Colours are counted in cells of 16 values per channel.
LEVELS = 16
# Frames per camera that are counted, and frames of an episode that its median is taken of.
COUNTED_FRAMES, MEDIAN_FRAMES = 2000, 15
# Difference to the median (of 255) at which a pixel counts as changed in full.
CHANGED = 40.0


def colour_cells(images: Tensor) -> Tensor:
    """Return the index ``(...)`` int64 of the colour of each pixel for uint8 images ``(..., 3)``."""
    levels = images.long() // (256 // LEVELS)
    return (levels[..., 0] * LEVELS + levels[..., 1]) * LEVELS + levels[..., 2]


class PixelWeights:
    """Loss weights of the pixels of a :class:`VideoData`, of mean about 1.

    Args:
        data: the training episodes are counted.
        config: how much rarity and change count.
    """

    def __init__(self, data: VideoData, config: TokenizerConfig) -> None:
        self.data, self.config = data, config
        self.medians = np.stack(
            [
                np.median(data.images[_spread(start, end, MEDIAN_FRAMES)], axis=0).astype(np.uint8)
                for start, end in zip(data.starts, data.ends, strict=True)
            ]
        )
        self._episode = np.repeat(np.arange(len(data.ends)), data.ends - data.starts)
        frames = data.frames_of(~data.held_out)
        counted = frames[_spread(0, len(frames), COUNTED_FRAMES)]
        self.rarity = torch.stack([self._count(view, counted) for view in range(data.images.shape[1])])
        self.mean = torch.ones(())
        self.mean = torch.stack([self(counted[::8], view).mean() for view in range(len(self.rarity))]).mean()

    def _count(self, view: int, frames: np.ndarray) -> Tensor:
        cells = colour_cells(torch.from_numpy(self.data.images[frames, view]))
        frequency = torch.bincount(cells.flatten(), minlength=LEVELS**3).double() / cells.numel()
        # A colour that was never counted is as rare as one that was seen once.
        weight = frequency.clamp_min(1.0 / cells.numel()) ** -self.config.rarity
        mean = (frequency * weight).sum()
        return (weight / mean).clamp_max(self.config.largest_weight).float()

    def __call__(self, frames: np.ndarray, view: int) -> Tensor:
        """Return ``(len(frames), H, W)`` float32 weights of a camera's pixels."""
        images = self.data.images[frames, view]
        rare = self.rarity[view][colour_cells(torch.from_numpy(images))]
        median = self.medians[self._episode[frames], view]
        difference = np.abs(images.astype(np.int16) - median).max(-1)
        changed = torch.from_numpy(np.minimum(1.0, difference / CHANGED).astype(np.float32))
        return (rare + self.config.change * changed).clamp_max(self.config.largest_weight) / self.mean


def _spread(start: int, end: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(start, end - 1, min(count, end - start)).round().astype(np.int64))
