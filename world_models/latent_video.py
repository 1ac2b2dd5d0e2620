"""A video encoded once: latents, scaled proprio and commands of every frame, and the windows cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simtoreal.envs.errors import DatasetError
from simtoreal.world_models.state import PROPRIO_STEPS, Imagination
from simtoreal.world_models.video_data import VideoData


def join_float16(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis, also under autocast to bfloat16: on CPUs that refuses to do it with float16."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(list(parts))


@dataclass(frozen=True)
class Window:
    """B stretches of K steps with what came before. Beyond the end of an episode its last frame is repeated.

    Attributes:
        state: memory at the first frame of each.
        latents: ``(B, K, C, h, w)`` float32 frames that follow.
        proprio: ``(B, K, P)`` that follow, scaled.
        commands: ``(B, K, C')`` scaled commands that lead to them.
        weight: ``(B, K, V, h, w)`` of every latent cell.
        valid: ``(B, K)`` 1 for frames of the episode, 0 beyond its end.
    """

    state: Imagination
    latents: Tensor
    proprio: Tensor
    commands: Tensor
    weight: Tensor
    valid: Tensor

    def join(self, other: Window) -> Window:
        """These stretches and then those of ``other``, which are as long."""
        mine, theirs = ((one.latents, one.proprio, one.commands, one.weight, one.valid) for one in (self, other))
        parts = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)]
        return Window(Imagination.join([self.state, other.state]), *parts)

    def mean(self, error: Tensor) -> Tensor:
        """Mean of ``(B, K)`` over the frames that exist."""
        return (error * self.valid).sum() / self.valid.sum()

    def importance(self, changed_weight: float) -> Tensor:
        """``(B, K, V, h, w)``: :attr:`weight`, raised where something moves, or is not what the first frame showed.

        Where an object lay at first nothing moves any more once it is gone, but a model that knows the first frame
        would bring it back.

        Args:
            changed_weight: by which cells that changed in full count more than others.
        """
        views = self.weight.shape[2]
        moving = changed_cells(self.state.memory[:, -1], self.latents, views)
        gone = changed_cells(self.state.reference, self.latents, views)
        return self.weight * (1 + changed_weight * torch.maximum(moving, gone))


class LatentVideo:
    """Everything that the dynamics learn from.

    Attributes:
        latents: ``(N, C, h, w)`` float16, all cameras along channels.
        proprio, commands: ``(N, P)`` and ``(N, C')``, scaled.
        weight: ``(N, V, h, w)`` float16 importance of every cell, of mean about 1.
        first, last: ``(N,)`` first and last frame of the episode of every frame.
    """

    def __init__(
        self, data: VideoData, latents: Tensor, proprio: Tensor, commands: Tensor, weight: Tensor, memory: int
    ) -> None:
        self.latents, self.proprio, self.commands, self.weight = latents, proprio, commands, weight
        self.memory = memory
        lengths = data.ends - data.starts
        self.first, self.last = np.repeat(data.starts, lengths), np.repeat(data.ends, lengths) - 1

    def state(self, frames: np.ndarray) -> Imagination:
        """Memory at ``frames`` ``(B,)``; before the episode its first frame is repeated."""
        first = self.first[frames]
        back = np.arange(self.memory - 1, -1, -1)
        remembered = frames[:, None] - back
        started = torch.from_numpy(remembered > first[:, None])
        kept = np.maximum(remembered, first[:, None])
        # The command before a frame led to it; nothing led to the first one.
        commands = self.commands[np.maximum(kept - 1, 0)] * started[..., None].to(self.commands.device)
        velocity = np.maximum(frames[:, None] - np.arange(PROPRIO_STEPS - 1, -1, -1), first[:, None])
        return Imagination(self.latents[first].float(), self.latents[kept].float(), self.proprio[velocity], commands)

    def window(self, frames: np.ndarray, steps: int) -> Window:
        """Windows of ``steps`` steps after ``frames`` ``(B,)``, each with at least one frame that follows."""
        ahead = frames[:, None] + np.arange(1, steps + 1)
        last = self.last[frames][:, None]
        valid = torch.from_numpy((ahead <= last).astype(np.float32)).to(self.proprio.device)
        ahead = np.minimum(ahead, last)
        return Window(
            self.state(frames), self.latents[ahead].float(), self.proprio[ahead], self.commands[ahead - 1],
            self.weight[ahead].float(), valid,
        )  # fmt: skip

    def at_rest(self, frames: np.ndarray, commands: Tensor, steps: int) -> Window:
        """Windows in which the first ``frames`` ``(B,)`` of episodes stay the same under ``commands`` ``(B, C')``."""
        shown = np.repeat(frames[:, None], steps, 1)
        return Window(
            self.state(frames), self.latents[shown].float(), self.proprio[shown],
            commands[:, None].expand(-1, steps, -1), self.weight[shown].float(),
            torch.ones(shown.shape, device=self.proprio.device),
        )  # fmt: skip

    def usable(self, frames: np.ndarray, steps: int) -> np.ndarray:
        """Those of ``frames`` that at least ``steps`` frames of their episode follow.

        Raises:
            DatasetError: there are none.
        """
        found = frames[frames + steps <= self.last[frames]]
        if not len(found):
            raise DatasetError(f"no training episode is longer than {steps} steps; collect longer ones")
        return found


def changed_cells(now: Tensor, future: Tensor, views: int) -> Tensor:
    """Return how much cells differ from ``now``, 0 to 1.

    Args:
        now: ``(B, C, h, w)``.
        future: ``(B, K, C, h, w)``.
        views: number of cameras that share the channels.

    Returns:
        ``(B, K, V, h, w)``.
    """
    # Reconstructions of a still scene differ by less than a tenth of this.
    full_change = 0.3
    difference = (future - now[:, None]).abs().unflatten(2, (views, -1)).mean(3)
    return (difference / full_change).clamp_max(1.0)


def weighted_error(predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted squared error ``(B, K)`` of latents ``(B, K, C, h, w)``, given ``(B, K, V, h, w)``."""
    views = weight.shape[2]
    error = (predicted - wanted).square().unflatten(2, (views, -1)).mean(3)
    return (error * weight).mean((2, 3, 4))
