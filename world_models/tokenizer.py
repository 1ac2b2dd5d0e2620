"""Images to latents and back: a small convolutional autoencoder, one latent vector per 8x8 pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from simtoreal.policies.encoders import GROUPS, GroupNorm
from simtoreal.world_models.config import TokenizerConfig


def to_pixels(images: Tensor) -> Tensor:
    """Return uint8 images ``(N, H, W, 3)`` as float32 ``(N, 3, H, W)`` in [-1, 1], channels last in memory."""
    # A permuted channels-last image needs no copy.
    return images.float().div_(127.5).sub_(1.0).permute(0, 3, 1, 2)


def to_images(pixels: Tensor) -> Tensor:
    """Inverse of :func:`to_pixels`: ``(N, 3, H, W)`` in [-1, 1] to uint8 ``(N, H, W, 3)``."""
    scaled = pixels.permute(0, 2, 3, 1).float().add(1.0).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8)


class ConvBlock(nn.Sequential):
    """Convolution, GroupNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), GroupNorm(GROUPS, outputs), nn.SiLU(inplace=True)
        )


class Upscale(nn.Sequential):
    """Twice the resolution by sub-pixel convolution (Shi et al. 2016); a 1x1 kernel, blocks around it see further."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, 4 * outputs, 1), nn.PixelShuffle(2))


class Tokenizer(nn.Module):
    """Autoencoder with latents of mean 0 and variance 1.

    The mean and scale of each channel are set once, by :meth:`set_scale`, when the autoencoder is trained.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        low, middle, high = config.encoder_widths
        self.encoder = nn.Sequential(
            nn.Conv2d(3, low, 5, 2, 2), nn.SiLU(inplace=True), ConvBlock(low, middle, 2), ConvBlock(middle, high, 2),
            nn.Conv2d(high, config.channels, 1),
        )  # fmt: skip
        coarse, middle, fine = config.decoder_widths
        self.decoder = nn.Sequential(
            nn.Conv2d(config.channels, coarse, 3, 1, 1), nn.SiLU(inplace=True), ConvBlock(coarse, coarse),
            Upscale(coarse, middle), ConvBlock(middle, middle),
            Upscale(middle, fine), nn.SiLU(inplace=True), nn.Conv2d(fine, fine, 3, 1, 1), nn.SiLU(inplace=True),
            Upscale(fine, 3),
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(config.channels, 1, 1))
        self.register_buffer("scale", torch.ones(config.channels, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """Return latents ``(N, channels, H / 8, W / 8)`` float32 for uint8 images ``(N, H, W, 3)``."""
        return (self.encoder(to_pixels(images)).float() - self.mean) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels ``(N, 3, H, W)`` around [-1, 1] for latents ``(N, channels, H / 8, W / 8)``."""
        return self.decoder(latents * self.scale + self.mean)

    def loss(self, images: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return the weighted reconstruction error.

        Args:
            images: ``(N, H, W, 3)`` uint8.
            weight: ``(N, H, W)`` of every pixel.
        """
        pixels = to_pixels(images)
        latents = self.encoder(pixels)
        # Keeps the scale of the latents near 1, which the noise is relative to.
        size = latents.float().square().mean()
        decoded = self.decoder(latents + self.config.noise * torch.randn_like(latents)).float()
        error = (decoded - pixels).square().mean(1)
        reconstruction = (weight * error).mean()
        return {"loss": reconstruction + 1e-3 * size, "error": error.mean().detach()}

    @torch.no_grad()
    def set_scale(self, latents: Tensor) -> None:
        """Make latents like ``latents`` ``(N, channels, h, w)``, encoded before, have mean 0 and variance 1."""
        raw = latents * self.scale + self.mean
        self.mean.copy_(raw.mean((0, 2, 3))[:, None, None])
        self.scale.copy_(raw.std((0, 2, 3)).clamp_min(1e-3)[:, None, None])


def cell_weights(weight: Tensor, stride: int) -> Tensor:
    """Return the mean weight of every latent cell, ``(N, H / stride, W / stride)``, for weights ``(N, H, W)``."""
    return functional.avg_pool2d(weight[:, None], stride)[:, 0]
