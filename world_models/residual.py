"""Deterministic dynamics: what changes in a few steps, of all cameras and of proprio. Small enough for a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from simtoreal.policies.encoders import GROUPS, GroupNorm
from simtoreal.world_models.config import DynamicsConfig
from simtoreal.world_models.known_proprio import KnownProprio
from simtoreal.world_models.latent_video import Window, weighted_error
from simtoreal.world_models.linear_proprio import LinearProprio
from simtoreal.world_models.state import Imagination, Noise

CONDITION_WIDTH = 128
# Channels drawn from the condition, cell by cell: where the arm is follows from proprio alone.
DRAWN_CHANNELS = 32
# Before training one part in twenty of the first frame of the episode is mixed in.
RECALL_BIAS = -3.0
# Share of the training steps whose passes are shorter than a chunk, as ``step`` of an environment needs them.
SHORT_SHARE = 0.25
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
    """The next frames of all cameras at once: latents are stacked along channels, so that each view sees the others.

    Several steps come from one pass: errors add up from pass to pass, not from step to step, and a pass costs about the
    same for one frame and for eight. Every cell of a new frame mixes the last frame and the first one of the episode
    and adds a difference: what a fixed camera saw when nothing stood before it comes back as it was.

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
        self.config, self.views, self.channels = config, views, channels
        width, chunk = config.width, config.chunk
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, grid[0]), torch.linspace(-1, 1, grid[1]), indexing="ij")
        self.register_buffer("coordinates", torch.stack([rows, columns])[None], persistent=False)
        self.linear = LinearProprio(proprio_dim, command_dim, known)
        # Of every step: expected proprio, command, and whether it is asked for.
        told = 2 * proprio_dim + chunk * (proprio_dim + command_dim + 1)
        self.condition = nn.Sequential(
            nn.Linear(told, 2 * CONDITION_WIDTH), nn.SiLU(), nn.Linear(2 * CONDITION_WIDTH, CONDITION_WIDTH), nn.SiLU()
        )
        self.draw = nn.Linear(CONDITION_WIDTH, DRAWN_CHANNELS * grid[0] * grid[1])
        self.inputs = nn.Conv2d((1 + config.memory) * channels + DRAWN_CHANNELS + 2, width, 3, 1, 1)
        self.blocks = nn.ModuleList([FilmBlock(width) for _ in range(config.layers)])
        self.norm = GroupNorm(GROUPS, width)
        self.outputs = nn.Conv2d(width, chunk * channels, 1)
        self.recall = nn.Conv2d(width, chunk * views, 1)
        self.proprio = nn.Sequential(
            nn.Linear(width + CONDITION_WIDTH, CONDITION_WIDTH), nn.SiLU(),
            nn.Linear(CONDITION_WIDTH, chunk * proprio_dim),
        )  # fmt: skip
        # Before training nothing changes but what the linear model expects.
        for layer in (self.outputs, self.recall, self.proprio[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.recall.bias, RECALL_BIAS)

    def forward(self, state: Imagination, commands: Tensor) -> tuple[Tensor, Tensor]:
        """Return k frames ``(N, k, C, h, w)`` and proprios ``(N, k, P)``, both float32, in one pass.

        Args:
            state: memory of N episodes.
            commands: ``(N, k, C')`` scaled, k from 1 to ``config.chunk``.
        """
        count, steps = commands.shape[:2]
        before, now = state.proprio[:, 0], state.proprio[:, 1]
        expected = self.linear.roll_out(before, now, commands)
        told = torch.cat([expected, commands, torch.ones_like(commands[..., :1])], -1)
        told = functional.pad(told, (0, 0, 0, self.config.chunk - steps)).flatten(1)
        condition = self.condition(torch.cat([before, now, told], -1))
        memory = state.memory
        coordinates = self.coordinates.expand(count, -1, -1, -1).to(memory.dtype)
        drawn = self.draw(condition).view(count, DRAWN_CHANNELS, *memory.shape[-2:]).to(memory.dtype)
        stacked = torch.cat([state.reference, memory.flatten(1, 2), drawn, coordinates], 1)
        hidden = self.inputs(stacked.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            hidden = block(hidden, condition)
        features = functional.silu(self.norm(hidden))
        pooled = torch.cat([features.mean((2, 3)), condition.to(features.dtype)], -1)
        corrections = self.proprio(pooled).float().unflatten(-1, (self.config.chunk, -1))[:, :steps]
        vectors = self.linear.known(expected + corrections, commands)
        difference = self.outputs(features).float().unflatten(1, (self.config.chunk, self.channels))[:, :steps]
        recalled = self.recall(features).float().sigmoid().unflatten(1, (self.config.chunk, self.views))[:, :steps]
        recalled = recalled.repeat_interleave(self.channels // self.views, 2)
        last, first = memory[:, -1:].float(), state.reference[:, None].float()
        return last + recalled * (first - last) + difference, vectors

    def imagine(
        self, state: Imagination, commands: Tensor, noise: Noise = None, *, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Imagine one step per command; see :meth:`~simtoreal.world_models.world_model.WorldModel.imagine`.

        ``chunk`` steps come from one pass, by default as many as possible.
        """
        latents, proprio = [], []
        for part in commands.split(chunk or self.config.chunk, 1):
            frames, vectors = self(state, part)
            state = state.extend(frames, vectors, part)
            latents.append(frames)
            proprio.append(vectors)
        return torch.cat(latents, 1), torch.cat(proprio, 1)

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
        short = float(torch.rand(())) < SHORT_SHARE
        chunk = int(torch.randint(1, config.chunk + 1, ())) if short else config.chunk
        latents, proprio = self.imagine(noisy, window.commands, chunk=chunk)
        frames = window.mean(weighted_error(latents, window.latents, window.importance(config.changed_weight)))
        vectors = window.mean((proprio - window.proprio).square().mean(-1))
        loss = frames + config.proprio_weight * vectors
        return {"loss": loss, "latents": frames.detach(), "proprio": vectors.detach()}
