"""Samples of a few frames and a vector to predict from them, in the shape in which policies are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class FrameWindows:
    """What :class:`~simtoreal.policies.training_data.Windows` asks for; the vector takes the place of the action.

    Attributes:
        actions: ``(P, D)`` float32 vector of every sample.
        observations: image key -> ``(N, H, W, 3)`` uint8, the frames that samples refer to.
        frames: ``(P, S)`` int64 frames of every sample, oldest first.
        episode_of_window: ``(P,)`` episode of every sample.
    """

    def __init__(
        self,
        observations: Mapping[str, np.ndarray],
        frames: np.ndarray,
        vectors: np.ndarray,
        episode_of_window: np.ndarray,
    ) -> None:
        self.observations, self.frames = dict(observations), frames
        self.actions = np.ascontiguousarray(vectors, dtype=np.float32)
        self.episode_of_window = episode_of_window

    def __len__(self) -> int:
        return len(self.frames)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Return samples as a window batch (see :meth:`simtoreal.policies.base.Policy.loss`) with one action."""
        frames = self.frames[indices]
        return {
            # Not ``take``: that would first copy all images of a camera that is a view of several.
            "observation": {key: images[frames] for key, images in self.observations.items()},
            "actions": self.actions[indices][:, None],
            "action_mask": np.ones((len(indices), 1), dtype=bool),
            "instruction": [""] * len(indices),
        }
