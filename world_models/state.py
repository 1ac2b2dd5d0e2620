"""What a world model remembers of a running episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# One generator for all episodes, or one per episode so that its noise does not depend on its neighbours.
Noise = torch.Generator | Sequence[torch.Generator] | None

# Steps of proprio that the dynamics see: two give a velocity.
PROPRIO_STEPS = 2


@dataclass(frozen=True)
class Imagination:
    """Memory of N episodes; every array is float32 and on the model's device.

    Attributes:
        reference: ``(N, C, h, w)`` latents of the first frame of the episode, all cameras along channels.
        memory: ``(N, M, C, h, w)`` latents of the most recent frames, oldest first.
        proprio: ``(N, 2, P)`` last two, scaled.
        commands: ``(N, M, C')`` scaled commands that led to each frame of the memory; zeros before the first.
    """

    reference: Tensor
    memory: Tensor
    proprio: Tensor
    commands: Tensor

    def __len__(self) -> int:
        return len(self.reference)

    def append(self, frame: Tensor, proprio: Tensor, command: Tensor) -> Imagination:
        """Memory after one more frame ``(N, C, h, w)``; the oldest is forgotten."""
        return Imagination(
            self.reference,
            torch.cat([self.memory[:, 1:], frame[:, None].to(self.memory.dtype)], 1),
            torch.cat([self.proprio[:, 1:], proprio[:, None]], 1),
            torch.cat([self.commands[:, 1:], command[:, None]], 1),
        )

    def extend(self, frames: Tensor, proprio: Tensor, commands: Tensor) -> Imagination:
        """Memory after k more frames ``(N, k, C, h, w)``, proprios ``(N, k, P)`` and commands ``(N, k, C')``."""
        state = self
        for step in range(frames.shape[1]):
            state = state.append(frames[:, step], proprio[:, step], commands[:, step])
        return state

    def rows(self, index: Tensor) -> Imagination:
        """Episodes by index or mask."""
        return Imagination(self.reference[index], self.memory[index], self.proprio[index], self.commands[index])

    def put(self, index: Tensor, other: Imagination) -> Imagination:
        """Copy in which the episodes ``index`` are those of ``other``."""
        parts = []
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            changed = mine.clone()
            changed[index] = theirs.to(mine.dtype)
            parts.append(changed)
        return Imagination(*parts)

    @staticmethod
    def join(states: Sequence[Imagination]) -> Imagination:
        """All episodes of several memories."""
        parts = zip(*(state._parts() for state in states), strict=True)
        return Imagination(*(torch.cat(part) for part in parts))

    def finite(self) -> Tensor:
        """``(N,)`` bool: the newest frame and proprio of the episode hold neither NaN nor infinity."""
        frames = self.memory[:, -1].flatten(1).isfinite().all(-1)
        return frames & self.proprio[:, -1].isfinite().all(-1)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.reference, self.memory, self.proprio, self.commands
