"""Random changes of training images, done on the batch where it already is."""

from __future__ import annotations

import torch
from torch import Tensor

from simtoreal.policies.config import AugmentationConfig


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Translate every sample by up to ``pixels`` on both axes, repeating the border (DrQ, Kostrikov et al. 2020).

    All frames of a sample move together, so that apparent motion between them is kept.

    Args:
        images: uint8 ``(B, S, H, W, 3)``.
        pixels: largest translation.
    """
    if pixels == 0:
        return images
    batch, steps, height, width, channels = images.shape
    device = images.device
    offset = torch.randint(-pixels, pixels + 1, (2, batch, 1, 1), device=device)
    left, right = images[..., :1, :], images[..., -1:, :]
    shape = (batch, steps, height, pixels, channels)
    padded = torch.cat([left.expand(shape), images, right.expand(shape)], dim=-2)
    # Every output row is one run of bytes in the padded rows, so the translation is a single gather of rows.
    stride = width + 2 * pixels
    starts = padded.view(-1).as_strided(
        (batch * steps * height * stride - width + 1, width * channels), (channels, 1)
    )  # fmt: skip
    rows = (torch.arange(height, device=device) + offset[0]).clamp_(0, height - 1)
    image = torch.arange(batch * steps, device=device).view(batch, steps, 1)
    return starts[(image * height + rows) * stride + pixels + offset[1]].view(images.shape)


def colour_transform(count: int, config: AugmentationConfig | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and bias ``(count, 3)`` that map pixels 0..255 to [-1, 1], with random colour when configured.

    Brightness, contrast and colour balance are affine per channel, so they cost nothing beyond the scaling to
    [-1, 1] that is needed anyway.
    """
    scale = torch.ones(count, 3, device=device)
    bias = torch.zeros(count, 3, device=device)
    if config is not None:

        def uniform(strength: float, *shape: int) -> Tensor:
            return (torch.rand(*shape, device=device) * 2 - 1) * strength

        scale = (1 + uniform(config.contrast, count, 1)) * (1 + uniform(config.colour, count, 3))
        bias = 2 * uniform(config.brightness, count, 1).expand(count, 3)
    # pixel/127.5 - 1 is the intensity around mid-grey, about which contrast and colour act.
    return scale / 127.5, bias - scale
