"""Deterministic dynamics: what changes in one step, of all cameras and of proprio. Small enough for a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from simtoreal.policies.encoders import GROUPS, GroupNorm
from simtoreal.world_models.config import DynamicsConfig
from simtoreal.world_models.known_proprio import KnownProprio
from simtoreal.world_models.latent_video import Window, changed_cells, weighted_error
from simtoreal.world_models.linear_proprio import LinearProprio
from simtoreal.world_models.state import Imagination, Noise

CONDITION_WIDTH = 128
# Channels drawn from the condition, cell by cell: where the arm is follows from proprio alone.
DRAWN_CHANNELS = 16
# Standard deviation of noise on the known proprio while training, scaled: about a millimetre.
PROPRIO_NOISE = 0.005


class FilmBlock(nn.Module):
    """Residual block whose features are scaled and shifted by the condition (FiLM, Perez et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(GROUPS, width, affine=False)
        self.modulation = nn.Linear(CONDITION_WIDTH, 2 * width)
        self.first = nn.Conv2d(width, width, 3, 1, 1)
        self.second = nn.Conv2d(width, width, 3, 1, 1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        features = functional.silu(torch.addcmul(shift, self.norm(hidden), 1 + scale))
        return hidden + self.second(functional.silu(self.first(features)))


class ResidualDynamics(nn.Module):
    """One step of all cameras at once: latents are stacked along channels, so that each view sees the others.

    Args:
        config: sizes.
        channels: of one frame, over all cameras.
        grid: latent cells ``(h, w)`` per camera.
        views: number of cameras.
        proprio_dim, command_dim: sizes of the vectors.
        known: entries of proprio that need no model.
    """

    def __init__(
        self,
        config: DynamicsConfig,
        channels: int,
        grid: tuple[int, int],
        views: int,
        proprio_dim: int,
        command_dim: int,
        known: KnownProprio,
    ) -> None:
        super().__init__()
        self.config, self.views = config, views
        width = config.width
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, grid[0]), torch.linspace(-1, 1, grid[1]), indexing="ij")
        self.register_buffer("coordinates", torch.stack([rows, columns])[None], persistent=False)
        self.linear = LinearProprio(proprio_dim, command_dim, known)
        self.condition = nn.Sequential(
            nn.Linear(3 * proprio_dim + command_dim, CONDITION_WIDTH), nn.SiLU(),
            nn.Linear(CONDITION_WIDTH, CONDITION_WIDTH), nn.SiLU(),
        )  # fmt: skip
        self.draw = nn.Linear(CONDITION_WIDTH, DRAWN_CHANNELS * grid[0] * grid[1])
        self.inputs = nn.Conv2d((1 + config.memory) * channels + DRAWN_CHANNELS + 2, width, 3, 1, 1)
        self.blocks = nn.ModuleList([FilmBlock(width) for _ in range(config.layers)])
        self.norm = GroupNorm(GROUPS, width)
        self.outputs = nn.Conv2d(width, channels, 1)
        self.proprio = nn.Sequential(
            nn.Linear(width + CONDITION_WIDTH, CONDITION_WIDTH), nn.SiLU(), nn.Linear(CONDITION_WIDTH, proprio_dim)
        )
        # Before training nothing changes but what the linear model expects.
        for layer in (self.outputs, self.proprio[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, reference: Tensor, memory: Tensor, proprio: Tensor, command: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next latents ``(N, C, h, w)`` and proprio ``(N, P)``, both float32.

        Args:
            reference: ``(N, C, h, w)`` first frame of the episode.
            memory: ``(N, memory, C, h, w)`` most recent frames, oldest first.
            proprio: ``(N, 2, P)`` last two, scaled.
            command: ``(N, C')`` scaled.
        """
        before, now = proprio[:, 0], proprio[:, 1]
        expected = self.linear(before, now, command)
        condition = self.condition(torch.cat([before, now, expected, command], -1))
        coordinates = self.coordinates.expand(len(memory), -1, -1, -1).to(memory.dtype)
        drawn = self.draw(condition).view(len(memory), DRAWN_CHANNELS, *memory.shape[-2:]).to(memory.dtype)
        stacked = torch.cat([reference, memory.flatten(1, 2), drawn, coordinates], 1)
        hidden = self.inputs(stacked.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            hidden = block(hidden, condition)
        features = functional.silu(self.norm(hidden))
        pooled = torch.cat([features.mean((2, 3)), condition.to(features.dtype)], -1)
        vector = self.linear.known(expected + self.proprio(pooled).float(), command)
        return memory[:, -1].float() + self.outputs(features).float(), vector

    def imagine(self, state: Imagination, commands: Tensor, noise: Noise = None) -> tuple[Tensor, Tensor]:
        """Imagine one step per command; see :meth:`~simtoreal.world_models.world_model.WorldModel.imagine`."""
        latents, proprio = [], []
        for step in range(commands.shape[1]):
            frame, vector = self(state.reference, state.memory, state.proprio, commands[:, step])
            state = state.append(frame, vector, commands[:, step])
            latents.append(frame)
            proprio.append(vector)
        return torch.stack(latents, 1), torch.stack(proprio, 1)

    def window_steps(self, done: float) -> int:
        """Steps of the windows to learn from when the share ``done`` of the training is done."""
        unroll = self.config.unroll
        return unroll[min(len(unroll) - 1, int(done * len(unroll)))]

    def loss(self, window: Window) -> dict[str, Tensor]:
        """Return the error of living on its own predictions for the steps of ``window``."""
        state, config = window.state, self.config
        strength = 2 * config.context_noise * torch.rand(len(state), 1, 1, 1, 1, device=state.memory.device)
        noisy = Imagination(
            state.reference, state.memory + strength * torch.randn_like(state.memory),
            state.proprio + PROPRIO_NOISE * torch.randn_like(state.proprio), state.commands,
        )  # fmt: skip
        latents, proprio = self.imagine(noisy, window.commands)
        changed = changed_cells(state.memory[:, -1], window.latents, self.views)
        frames = weighted_error(latents, window.latents, window.weight * (1 + config.changed_weight * changed)).mean()
        vectors = (proprio - window.proprio).square().mean()
        loss = frames + config.proprio_weight * vectors
        return {"loss": loss, "latents": frames.detach(), "proprio": vectors.detach()}
