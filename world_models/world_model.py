"""The whole model: images to latents, latents and proprio through time, success, and images again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from simtoreal.envs.embodiment import TARGET_NAMES, Embodiment
from simtoreal.envs.errors import ConfigError
from simtoreal.policies.normalization import (
    ACTIONS,
    Normalizer,
    Statistics,
    dimension_names,
    fit_statistics,
    has_known_units,
)
from simtoreal.world_models.classifier import SuccessClassifier
from simtoreal.world_models.config import STRIDE, WorldModelConfig
from simtoreal.world_models.flow import FlowDynamics, require_patches
from simtoreal.world_models.known_proprio import TARGETS, KnownProprio
from simtoreal.world_models.residual import ResidualDynamics
from simtoreal.world_models.state import PROPRIO_STEPS, Imagination, Noise
from simtoreal.world_models.tokenizer import Tokenizer, to_images
from simtoreal.world_models.video_data import POSITIVE_FRAMES, VideoData, require_images

PROPRIO = "proprio"
# Pictures decoded together on a CPU: the features of more do not stay in its caches, which halves the speed.
CPU_PICTURES = 128


def require_possible(config: WorldModelConfig, embodiment: Embodiment, source: Path | str) -> None:
    """Refuse what no world model can be made of, before anything is collected for one.

    Args:
        config: sizes.
        embodiment: whose cameras it is to imagine.
        source: whose embodiment that is, for the message.

    Raises:
        ConfigError: cameras that the tokenizer cannot take, or settings that do not suit them or the data.
    """
    require_images(embodiment, source)
    camera, consecutive = embodiment.cameras[0], config.classifier.consecutive
    if config.dynamics.kind == "flow":
        require_patches(config.dynamics, (camera.height // STRIDE, camera.width // STRIDE))
    if consecutive > POSITIVE_FRAMES:
        raise ConfigError(
            f"classifier.consecutive is {consecutive}, but a recorded success shows its goal in its last "
            f"{POSITIVE_FRAMES} frames only and would never count; choose 1 to {POSITIVE_FRAMES}"
        )


def fit_world_statistics(data: VideoData) -> dict[str, Statistics]:
    """Return the scales of proprio, actions and targets, from the training episodes."""
    frames = data.frames_of(~data.held_out)
    found = {
        key: fit_statistics(values[frames], names, key, known_units=has_known_units(data.embodiment, key))
        for key, values, names in (
            (PROPRIO, data.proprio, dimension_names(data.embodiment, PROPRIO)),
            (ACTIONS, data.actions, data.embodiment.action.names),
        )
    }
    if data.targets.shape[1]:
        found[TARGETS] = fit_statistics(data.targets[frames], TARGET_NAMES, TARGETS)
    return found


class WorldModel(nn.Module):
    """An action-conditioned video model of one embodiment, with a success classifier.

    Args:
        config: sizes.
        embodiment: cameras (all of one size, a multiple of 8 pixels), proprio and actions.
        statistics: scales of ``proprio``, ``actions`` and, unless the action mode is ``env``, ``targets``.

    Raises:
        ConfigError: cameras that the tokenizer cannot take.
    """

    def __init__(self, config: WorldModelConfig, embodiment: Embodiment, statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        sizes = {(camera.height, camera.width) for camera in embodiment.cameras}
        if len(sizes) != 1 or any(side % STRIDE for size in sizes for side in size):
            raise ConfigError(f"a world model needs cameras of one size, a multiple of {STRIDE} pixels; found {sizes}")
        self.config, self.embodiment = config, embodiment
        self.views = len(embodiment.cameras)
        (self.height, self.width), channels = sizes.pop(), self.views * config.tokenizer.channels
        self.grid = (self.height // STRIDE, self.width // STRIDE)
        self.normalizer = Normalizer(statistics)
        target_dim = len(TARGET_NAMES) if TARGETS in statistics else 0
        self.proprio_dim, self.command_dim = embodiment.proprio.dim, embodiment.action.dim + target_dim
        self.memory = config.dynamics.memory
        self.tokenizer = Tokenizer(config.tokenizer)
        kind = {"residual": ResidualDynamics, "flow": FlowDynamics}[config.dynamics.kind]
        known = KnownProprio(embodiment, statistics)
        self.dynamics: ResidualDynamics | FlowDynamics = kind(
            config.dynamics, channels, self.grid, self.views, self.proprio_dim, self.command_dim, known
        )
        self.classifier = SuccessClassifier(config.classifier, channels, self.views, self.proprio_dim)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def encode(self, images: Tensor) -> Tensor:
        """Return latents ``(N, C, h, w)``, all cameras along channels, for uint8 images ``(N, V, H, W, 3)``."""
        return self.tokenizer.encode(images.flatten(0, 1)).unflatten(0, (-1, self.views)).flatten(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images ``(N, V, H, W, 3)`` for latents ``(N, C, h, w)``."""
        pictures = latents.unflatten(1, (self.views, -1)).flatten(0, 1)
        part = CPU_PICTURES if pictures.device.type == "cpu" else len(pictures)
        images = [to_images(self.tokenizer.decode(some)) for some in pictures.split(max(1, part))]
        return torch.cat(images).unflatten(0, (-1, self.views))

    def scale_proprio(self, proprio: Tensor) -> Tensor:
        """Return proprio ``(..., P)`` in units of its spread."""
        return self.normalizer.normalize(PROPRIO, proprio, clip=None)

    def unscale_proprio(self, scaled: Tensor) -> Tensor:
        """Inverse of :meth:`scale_proprio`."""
        return self.normalizer.denormalize(PROPRIO, scaled)

    def scale_commands(self, actions: Tensor, targets: Tensor) -> Tensor:
        """Return commands ``(..., C')``.

        Args:
            actions: ``(..., A)``.
            targets: ``(..., 10)`` end-effector targets after the actions; ``(..., 0)`` in the action mode ``env``.
        """
        parts = [self.normalizer.normalize(ACTIONS, actions, clip=None)]
        if TARGETS in self.normalizer.statistics:
            parts.append(self.normalizer.normalize(TARGETS, targets, clip=None))
        return torch.cat(parts, -1)

    def begin(self, reference: Tensor, images: Tensor, proprio: Tensor, commands: Tensor) -> Imagination:
        """Return the memory of N episodes from real frames.

        Args:
            reference: ``(N, V, H, W, 3)`` uint8 first frame of the episode.
            images: ``(N, M, V, H, W, 3)`` uint8 most recent frames, oldest first; the first frame of the episode is
                repeated before it.
            proprio: ``(N, 2, P)`` last two.
            commands: ``(N, M, C')`` that led to each of ``images``, scaled; zeros before the first.
        """
        memory = self.encode(images.flatten(0, 1)).unflatten(0, (len(images), -1))
        return Imagination(self.encode(reference), memory, self.scale_proprio(proprio), commands)

    def imagine(self, state: Imagination, commands: Tensor, noise: Noise = None) -> tuple[Imagination, Tensor, Tensor]:
        """Imagine what the commands do.

        Args:
            state: memory of N episodes.
            commands: ``(N, k, C')``, see :meth:`scale_commands`.
            noise: source of the noise that a ``flow`` model starts from; None uses torch's global one.

        Returns:
            New memory, latents ``(N, k, C, h, w)`` and scaled proprio ``(N, k, P)`` of the k frames.
        """
        latents, proprio = self.dynamics.imagine(state, commands, noise)
        return state.extend(latents, proprio, commands), latents, proprio

    def success_probability(self, latents: Tensor, proprio: Tensor) -> Tensor:
        """Return ``(N,)`` for latents ``(N, C, h, w)`` and scaled proprio ``(N, P)``."""
        return torch.sigmoid(self.classifier(latents, proprio))

    def first_state(self, images: np.ndarray, proprio: np.ndarray) -> Imagination:
        """Memory at the first frame of N episodes, from images ``(N, V, H, W, 3)`` and proprio ``(N, P)``."""
        reference = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        vectors = torch.from_numpy(proprio).to(self.device)
        commands = torch.zeros(len(images), self.memory, self.command_dim, device=self.device)
        repeated = reference[:, None].expand(-1, self.memory, *reference.shape[1:])
        return self.begin(reference, repeated, vectors[:, None].expand(-1, PROPRIO_STEPS, -1), commands)
