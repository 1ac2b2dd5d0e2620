"""Steps of a learned world that were imagined before they are taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional


@dataclass
class AnnouncedSteps:
    """What was imagined of announced actions, for N episodes.

    Attributes:
        actions: ``(N, K, A)`` announced.
        latents, proprio: ``(N, K, C, h, w)`` and ``(N, K, P)`` that they lead to.
        length: ``(N,)`` number of announced actions, up to K.
        left: ``(N,)`` how many of them have not been taken yet.
    """

    actions: np.ndarray
    latents: torch.Tensor
    proprio: torch.Tensor
    length: np.ndarray
    left: np.ndarray

    @classmethod
    def empty(cls, count: int, actions: np.ndarray, latents: torch.Tensor, proprio: torch.Tensor) -> AnnouncedSteps:
        """Room for ``count`` episodes of chunks as long as these."""
        return cls(
            np.zeros((count, *actions.shape[1:]), actions.dtype), latents.new_zeros(count, *latents.shape[1:]),
            proprio.new_zeros(count, *proprio.shape[1:]), np.zeros(count, np.int64), np.zeros(count, np.int64),
        )  # fmt: skip

    def make_room(self, steps: int) -> None:
        """Hold chunks of up to ``steps`` steps from now on; what is announced already stays."""
        more = steps - self.actions.shape[1]
        if more > 0:
            self.actions = np.pad(self.actions, ((0, 0), (0, more), (0, 0)))
            self.latents = functional.pad(self.latents, (0, 0, 0, 0, 0, 0, 0, more))
            self.proprio = functional.pad(self.proprio, (0, 0, 0, more))

    def put(self, slots: np.ndarray, actions: np.ndarray, latents: torch.Tensor, proprio: torch.Tensor) -> None:
        """Keep what was imagined for the episodes ``slots``, in place of what they had."""
        steps = actions.shape[1]
        self.actions[slots, :steps] = actions
        self.latents[slots, :steps], self.proprio[slots, :steps] = latents, proprio
        self.length[slots], self.left[slots] = steps, steps

    def matches(self, slots: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Whether the next announced action of each episode is this one."""
        step = np.minimum(self.length - self.left, self.actions.shape[1] - 1)[slots]
        same = (self.actions[slots, step] == actions).all(-1)
        return np.asarray((self.left[slots] > 0) & same)

    def take(self, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Next frame of each episode."""
        step = (self.length - self.left)[slots]
        self.left[slots] -= 1
        return self.latents[slots, step], self.proprio[slots, step]
