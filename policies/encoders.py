"""From observations to one vector: residual image encoder with spatial softmax, and the fusion of all inputs."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from simtoreal.policies.augmentation import colour_transform, random_shift
from simtoreal.policies.config import AugmentationConfig, PolicyConfig, VisionConfig
from simtoreal.policies.normalization import Normalizer

GROUPS = 8


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32: on a CPU its bfloat16 kernel for channels-last images is six times slower."""

    def forward(self, images: Tensor) -> Tensor:
        normalized = functional.group_norm(images.float(), self.num_groups, self.weight, self.bias, self.eps)
        return normalized.to(images.dtype)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a shortcut (He et al. 2016; Wu & He 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = GroupNorm(GROUPS, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = GroupNorm(GROUPS, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(images)))
        hidden = self.second_norm(self.second(hidden))
        return functional.relu(hidden + self.shortcut(images))


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of learned heat maps (Levine et al. 2016), in [-1, 1]."""

    def __init__(self, channels: int, keypoints: int) -> None:
        super().__init__()
        self.heat = nn.Conv2d(channels, keypoints, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(N, 2 * keypoints)`` for features ``(N, C, H, W)``."""
        # bfloat16 has 8 bits of mantissa, too few for sub-pixel coordinates.
        heat = self.heat(features).float()
        height, width = heat.shape[-2:]
        probability = heat.flatten(2).softmax(-1).view_as(heat)
        rows = torch.linspace(-1, 1, height, device=heat.device)
        columns = torch.linspace(-1, 1, width, device=heat.device)
        x = (probability.sum(-2) * columns).sum(-1)
        y = (probability.sum(-1) * rows).sum(-1)
        return torch.cat([x, y], dim=-1)


class ImageEncoder(nn.Module):
    """Images ``(N, 3, H, W)`` to features ``(N, config.features)``.

    The first convolution has no normalisation: at full resolution it would cost as much as the rest of the network.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        widths = config.widths
        reductions = int(math.log2(config.output_stride)) - 1
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, 2, 2), nn.ReLU()]
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            stages.append(ResidualBlock(inputs, outputs, 2 if index < reductions else 1))
            stages.extend(ResidualBlock(outputs, outputs, 1) for _ in range(config.blocks - 1))
        self.stages = nn.Sequential(*stages)
        self.keypoints = SpatialSoftmax(widths[-1], config.keypoints)
        # The mean says what is visible at all, which coordinates cannot.
        self.project = nn.Sequential(
            nn.Linear(2 * config.keypoints + widths[-1], config.features), nn.LayerNorm(config.features), nn.GELU()
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(images)
        mean = features.mean((-2, -1), dtype=torch.float32)
        return self.project(torch.cat([self.keypoints(features), mean], dim=-1))


class ObservationEncoder(nn.Module):
    """All inputs of a policy to one vector ``(B, width)``.

    Args:
        config: which keys and how many steps.
        vision, augmentation: image encoder and training-time changes (applied in training mode only).
        normalizer: scales the vectors.
        width: size of the result.
    """

    def __init__(
        self,
        config: PolicyConfig,
        vision: VisionConfig,
        augmentation: AugmentationConfig,
        normalizer: Normalizer,
        width: int,
    ) -> None:
        super().__init__()
        self.config, self.vision, self.augmentation = config, vision, augmentation
        self.image_steps = min(vision.image_steps, config.observation_steps)
        # Only a reference: the policy owns the normaliser.
        self._normalizer = (normalizer,)
        count = len(config.image_keys)
        encoders = [ImageEncoder(vision) for _ in range(min(count, 1) if vision.shared else count)]
        self.images = nn.ModuleList(encoders)
        inputs = count * self.image_steps * vision.features
        inputs += config.observation_steps * sum(normalizer.dim(key) for key in config.state_keys)
        self.fuse = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        return self.fuse(self.features(observation))

    def features(self, observation: dict[str, Tensor]) -> Tensor:
        """Return what :attr:`fuse` fuses ``(B, inputs)``: features of the images, and the normalised vectors."""
        parts = self._encode_images(observation)
        for key in self.config.state_keys:
            state = self._normalizer[0].normalize(key, observation[key])
            if self.training and self.augmentation.state_noise > 0:
                state = state + self.augmentation.state_noise * torch.randn_like(state)
            parts.append(state.flatten(1))
        return torch.cat([part.float() for part in parts], dim=-1)

    def _encode_images(self, observation: dict[str, Tensor]) -> list[Tensor]:
        keys = self.config.image_keys
        if not keys:
            return []
        batches = [self._prepare(observation[key][:, -self.image_steps :]) for key in keys]
        if self.vision.shared:
            sizes = [len(batch) for batch in batches]
            if len({batch.shape[1:] for batch in batches}) == 1:
                features = list(self.images[0](torch.cat(batches)).split(sizes))
            else:
                features = [self.images[0](batch) for batch in batches]
        else:
            features = [encoder(batch) for encoder, batch in zip(self.images, batches, strict=True)]
        return [feature.view(-1, self.image_steps * self.vision.features) for feature in features]

    def _prepare(self, images: Tensor) -> Tensor:
        """Return ``(B * S, 3, H, W)`` around [-1, 1], channels last in memory, for uint8 ``(B, S, H, W, 3)``."""
        device = images.device
        if self.training:
            images = random_shift(images, self.augmentation.shift_px)
        batch, steps = images.shape[:2]
        scale, bias = colour_transform(batch, self.augmentation if self.training else None, device)
        autocast = torch.is_autocast_enabled(device.type)
        # Integers up to 256 are exact in bfloat16.
        dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
        height, width = images.shape[2:4]
        # Rows of pixels rather than pixels as the innermost axis: vector instructions need more than three values.
        shape = (batch, 1, 1, width * 3)
        scale, bias = (value.to(dtype).repeat(1, width).view(shape) for value in (scale, bias))
        rows = images.reshape(batch, steps, height, width * 3).to(dtype)
        flat = torch.addcmul(bias, rows, scale).view(batch * steps, height, width, 3)
        return flat.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
