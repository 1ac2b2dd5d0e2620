"""Whole episodes imagined open loop: from the real first frame, under the real actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simtoreal.world_models.latent_video import LatentVideo, join_float16, weighted_error
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel

# Episodes imagined together.
BATCH = 64


@dataclass(frozen=True)
class ImaginedFrames:
    """M generated frames of several episodes, one after the other; the real first frames are not among them.

    Attributes:
        latents: ``(M, C, h, w)`` float16.
        proprio: ``(M, P)``, scaled.
        frames: ``(M,)`` index of the real frame of the same moment.
        error: ``(M,)`` weighted squared error of the latents.
        starts, ends: range of every episode.
    """

    latents: Tensor
    proprio: Tensor
    frames: np.ndarray
    error: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@torch.no_grad()
def imagine_episodes(
    model: WorldModel, data: VideoData, video: LatentVideo, episodes: np.ndarray, *, seed: int = 0
) -> ImaginedFrames:
    """Imagine ``episodes`` (indices) from their first frame to their last.

    Args:
        model: in evaluation mode.
        data, video: the episodes and their latents.
        episodes: indices.
        seed: of the noise of a ``flow`` model.
    """
    latents: dict[int, Tensor] = {}
    proprio: dict[int, Tensor] = {}
    errors: dict[int, np.ndarray] = {}
    generator = torch.Generator().manual_seed(seed)
    # Of similar length, so that little is imagined beyond an episode's end.
    ordered = episodes[np.argsort((data.ends - data.starts)[episodes], kind="stable")]
    for part in np.array_split(ordered, max(1, -(-len(ordered) // BATCH))):
        starts, ends = data.starts[part], data.ends[part]
        steps = int((ends - starts).max()) - 1
        ahead = np.minimum(starts[:, None] + np.arange(steps), ends[:, None] - 1)
        state = video.state(starts)
        _, frames, vectors = model.imagine(state, video.commands[ahead], generator)
        real = np.minimum(ahead + 1, ends[:, None] - 1)
        error = weighted_error(frames, video.latents[real].float(), video.weight[real].float()).cpu().numpy()
        for row, episode in enumerate(part):
            length = int(ends[row] - starts[row]) - 1
            latents[episode], proprio[episode] = frames[row, :length].half(), vectors[row, :length]
            errors[episode] = error[row, :length]
    lengths = (data.ends - data.starts)[episodes] - 1
    ends = np.cumsum(lengths)
    return ImaginedFrames(
        latents=join_float16([latents[episode] for episode in episodes]),
        proprio=torch.cat([proprio[episode] for episode in episodes]),
        frames=np.concatenate([np.arange(data.starts[e] + 1, data.ends[e]) for e in episodes]),
        error=np.concatenate([errors[episode] for episode in episodes]),
        starts=ends - lengths,
        ends=ends,
    )
