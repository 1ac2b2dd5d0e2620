"""What dynamics learn from: stretches of real episodes, and first frames that stay as they are."""

from __future__ import annotations

import numpy as np
import torch

from simtoreal.world_models.contexts import actions_at_rest
from simtoreal.world_models.latent_video import LatentVideo, Window
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel


class TrainingWindows:
    """Windows drawn at random from the global generator of numpy.

    Args:
        model: whose scales and ``rest_share`` are used.
        data: real episodes.
        video: the same, encoded.
        frames: ``(n,)`` that windows may begin after.
        episodes: ``(E,)`` bool: whose first frames may be shown at rest.
    """

    def __init__(
        self, model: WorldModel, data: VideoData, video: LatentVideo, frames: np.ndarray, episodes: np.ndarray
    ) -> None:
        self._video, self._frames = video, frames
        # What an action of a foreign environment does is not known, so neither is the one that does nothing.
        known = data.embodiment.action.mode != "env"
        self._rest_share = model.config.dynamics.rest_share if known else 0.0
        if self._rest_share:
            chosen = np.flatnonzero(episodes)
            self._first = data.starts[chosen]
            moves = (torch.from_numpy(part).to(model.device) for part in actions_at_rest(data, chosen))
            self._rest_commands = model.scale_commands(*moves)

    def draw(self, count: int, steps: int) -> Window:
        """Return ``count`` windows of ``steps`` steps, those at rest last."""
        resting = round(self._rest_share * count)
        window = self._video.window(np.random.choice(self._frames, count)[resting:], steps)
        if not resting:
            return window
        rows = np.random.randint(len(self._first), size=resting)
        return window.join(self._video.at_rest(self._first[rows], self._rest_commands[rows], steps))
