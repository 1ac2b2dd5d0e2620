"""Stochastic dynamics: a rectified-flow transformer that generates several frames of all cameras and proprio at once.

After WoVR (arXiv 2602.13977, §3): the first frame of the episode and the most recent ones are given, the latter noised
in training; actions enter through the modulation of every layer (adaLN-zero, Peebles & Xie 2023) and by
cross-attention; a few Euler steps generate a chunk. Attention is causal over frames, so a model that learned chunks of
eight also generates a single frame, as an environment's ``step`` needs it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.base import normal_noise
from simtoreal.world_models.config import DynamicsConfig
from simtoreal.world_models.known_proprio import KnownProprio
from simtoreal.world_models.latent_video import Window, weighted_error
from simtoreal.world_models.linear_proprio import LinearProprio
from simtoreal.world_models.state import Imagination, Noise

HEAD_WIDTH = 64
# What the linear model of proprio leaves over is generated in these units (scaled proprio).
PROPRIO_UNIT = 0.05


def require_patches(config: DynamicsConfig, grid: tuple[int, int]) -> None:
    """Refuse a latent grid that cannot be cut into patches.

    Raises:
        ConfigError: it cannot.
    """
    if grid[0] % config.patch or grid[1] % config.patch:
        raise ConfigError(f"dynamics.patch is {config.patch}, which does not divide the latents of {grid} cells")


def time_embedding(time: Tensor, width: int) -> Tensor:
    """Return sinusoids ``(..., width)`` of times in [0, 1] (Vaswani et al. 2017)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), width // 2, device=time.device))
    angles = time[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


class Attention(nn.Module):
    """Multi-head attention of ``queries`` to ``context``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Return ``(B, Q, width)``; ``mask`` ``(Q, K)`` is True where attention is allowed."""
        query = self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(context).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(attended.transpose(1, 2).flatten(2))


class FlowLayer(nn.Module):
    """Self-attention, cross-attention to the commands and a perceptron, all modulated per frame (adaLN-zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in range(3)])
        self.own, self.commands = Attention(width), Attention(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, condition: Tensor, commands: Tensor, own: Tensor, cross: Tensor) -> Tensor:
        """Return ``(B, F, S, width)`` tokens of F frames.

        Args:
            tokens: ``(B, F, S, width)``.
            condition: ``(B, F, width)`` time and action of every frame.
            commands: ``(B, F, width)``.
            own: ``(F S, F S)`` bool, cross: ``(F S, F)`` bool, where attention is allowed.
        """
        parts = self.modulation(functional.silu(condition))[:, :, None].chunk(9, -1)
        for index, norm in enumerate(self.norms):
            scale, shift, gate = parts[3 * index : 3 * index + 3]
            modulated = torch.addcmul(shift, norm(tokens), 1 + scale)
            if index == 2:
                tokens = tokens + gate * self.perceptron(modulated)
                continue
            flat = modulated.flatten(1, 2)
            attended = self.own(flat, flat, own) if index == 0 else self.commands(flat, commands, cross)
            tokens = tokens + gate * attended.unflatten(1, tokens.shape[1:3])
        return tokens


class FlowDynamics(nn.Module):
    """Generates chunks; arguments as of :class:`~simtoreal.world_models.residual.ResidualDynamics`.

    Raises:
        ConfigError: the latent grid cannot be cut into patches.
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
        require_patches(config, grid)
        self.config, self.views, self.grid, self.channels = config, views, grid, channels
        width, frames = config.width, 1 + config.memory + config.chunk
        self.patches = views * (grid[0] // config.patch) * (grid[1] // config.patch)
        patch_dim = channels // views * config.patch**2
        self.linear = LinearProprio(proprio_dim, command_dim, known)
        self.patch_in, self.proprio_in = nn.Linear(patch_dim, width), nn.Linear(2 * proprio_dim, width)
        self.command_in = nn.Sequential(nn.Linear(command_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, 1, self.patches + 1, width))
        self.frame = nn.Parameter(0.02 * torch.randn(1, frames, 1, width))
        self.layers = nn.ModuleList([FlowLayer(width) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.patch_out, self.proprio_out = nn.Linear(width, patch_dim), nn.Linear(width, proprio_dim)
        for layer in (self.patch_out, self.proprio_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def window_steps(self, done: float) -> int:
        """Steps of the windows to learn from: a chunk."""
        return self.config.chunk

    def loss(self, window: Window) -> dict[str, Tensor]:
        """Return the weighted error of the predicted velocity at a random time of the flow (Liu et al. 2023)."""
        config, state = self.config, window.state
        strength = 2 * config.context_noise * torch.rand(len(state), 1, 1, 1, 1, device=state.memory.device)
        memory = state.memory + strength * torch.randn_like(state.memory)
        noisy = Imagination(state.reference, memory, state.proprio, state.commands)
        expected = self.expected(state, window.commands)
        wanted = (window.proprio - expected) / PROPRIO_UNIT
        # Logit-normal times (Esser et al. 2024): the middle of the flow is the hard part.
        time = torch.sigmoid(torch.randn(len(state), device=memory.device))
        frames, vectors = torch.randn_like(window.latents), torch.randn_like(wanted)
        share = time[:, None, None]
        mixed_frames = torch.lerp(frames, window.latents, share[..., None, None])
        velocity = self(noisy, window.commands, expected, mixed_frames, torch.lerp(vectors, wanted, share), time)
        weight = window.importance(config.changed_weight)
        image_error = window.mean(weighted_error(velocity[0], window.latents - frames, weight))
        vector_error = window.mean((velocity[1] - (wanted - vectors)).square().mean(-1))
        loss = image_error + 0.1 * config.proprio_weight * vector_error
        return {"loss": loss, "latents": image_error.detach(), "proprio": vector_error.detach()}

    def imagine(self, state: Imagination, commands: Tensor, noise: Noise = None) -> tuple[Tensor, Tensor]:
        """Generate one frame per command; see :meth:`~simtoreal.world_models.world_model.WorldModel.imagine`."""
        latents, proprio = [], []
        for part in commands.split(self.config.chunk, 1):
            frames, vectors = self._chunk(state, part, noise)
            state = state.extend(frames, vectors, part)
            latents.append(frames)
            proprio.append(vectors)
        return torch.cat(latents, 1), torch.cat(proprio, 1)

    def _chunk(self, state: Imagination, commands: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        count, steps = commands.shape[:2]
        expected = self.expected(state, commands)
        frame_size, vector_size = self.channels * self.grid[0] * self.grid[1], expected.shape[-1]
        drawn = normal_noise((count, steps * (frame_size + vector_size)), noise, commands.device)
        frames = drawn[:, : steps * frame_size].view(count, steps, self.channels, *self.grid)
        vectors = drawn[:, steps * frame_size :].view(count, steps, vector_size)
        euler = self.config.sampling_steps
        for index in range(euler):
            time = torch.full((count,), index / euler, device=commands.device)
            velocity = self(state, commands, expected, frames, vectors, time)
            frames, vectors = frames + velocity[0] / euler, vectors + velocity[1] / euler
        return frames, self.linear.known(expected + PROPRIO_UNIT * vectors, commands)

    def expected(self, state: Imagination, commands: Tensor) -> Tensor:
        """Proprio ``(N, k, P)`` that the linear model expects."""
        return self.linear.roll_out(state.proprio[:, 0], state.proprio[:, 1], commands)

    def forward(
        self, state: Imagination, commands: Tensor, expected: Tensor, frames: Tensor, vectors: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity of ``frames`` and ``vectors`` on their way from noise to data.

        Args:
            state: memory of N episodes.
            commands: ``(N, k, C')``.
            expected: ``(N, k, P)`` proprio that the linear model expects.
            frames: ``(N, k, C, h, w)`` partly noise.
            vectors: ``(N, k, P)`` what proprio is more than expected, in its unit, partly noise.
            time: ``(N,)`` from 0 (noise) to 1.
        """
        steps, known = commands.shape[1], 1 + self.config.memory
        history = torch.cat([torch.zeros_like(state.commands[:, :1]), state.commands, commands], 1)
        moves = self.command_in(history)
        images = torch.cat([state.reference[:, None], state.memory, frames], 1)
        context = state.proprio[:, -1:].expand(-1, known, -1)
        absolute = torch.cat([context, expected], 1)
        relative = torch.cat([torch.zeros_like(context), vectors], 1)
        vector_tokens = self.proprio_in(torch.cat([relative, absolute], -1))[:, :, None]
        tokens = torch.cat([self.patch_in(self._patches(images)), vector_tokens], 2)
        tokens = tokens + self.place + self.frame[:, : known + steps]
        times = torch.cat([torch.ones(len(time), known, device=time.device), time[:, None].expand(-1, steps)], 1)
        condition = self.time_in(time_embedding(times, self.config.width)) + moves
        own, cross = self._masks(known, steps, tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, condition, moves, own, cross)
        tokens = self.norm(tokens[:, known:])
        return self._images(self.patch_out(tokens[:, :, :-1])).float(), self.proprio_out(tokens[:, :, -1]).float()

    def _masks(self, known: int, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where tokens may look: known frames at each other, a generated one also at itself and what came before."""
        order = torch.cat([torch.zeros(known), torch.arange(1, steps + 1)]).to(device)
        visible = order[:, None] >= order[None, :]
        tokens = visible.repeat_interleave(self.patches + 1, 0)
        return tokens.repeat_interleave(self.patches + 1, 1), tokens

    def _patches(self, images: Tensor) -> Tensor:
        """``(B, F, C, h, w)`` to ``(B, F, patches, patch_dim)``."""
        size = self.config.patch
        flat = functional.pixel_unshuffle(images.flatten(0, 1).unflatten(1, (self.views, -1)).flatten(0, 1), size)
        return flat.flatten(2).transpose(1, 2).reshape(*images.shape[:2], self.patches, -1)

    def _images(self, patches: Tensor) -> Tensor:
        """Inverse of :meth:`_patches`."""
        size, (height, width) = self.config.patch, self.grid
        flat = patches.reshape(-1, self.patches // self.views, patches.shape[-1]).transpose(1, 2)
        images = functional.pixel_shuffle(flat.unflatten(2, (height // size, width // size)), size)
        return images.reshape(*patches.shape[:2], self.channels, height, width)
