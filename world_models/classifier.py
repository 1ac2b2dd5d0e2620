"""Whether a frame shows success: the reward of imagined episodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from simtoreal.policies.encoders import GROUPS, GroupNorm
from simtoreal.world_models.config import ClassifierConfig

# Places in the picture that the classifier looks at, beside the strongest response anywhere.
GLANCES = 4
# Noise on latents (variance 1) and scaled proprio while training: what the dynamics get slightly wrong must not decide.
LATENT_NOISE, PROPRIO_NOISE = 0.2, 0.01


class SuccessClassifier(nn.Module):
    """Latents of all cameras and proprio to one logit.

    Success looks the same wherever it happens, and few episodes show it. So features are pooled over the picture, by
    attention and by their maximum, instead of being read place by place.

    Attributes:
        threshold: probability from which on a frame counts, calibrated on held-out episodes.

    Args:
        config: sizes.
        channels: of one frame, over all cameras.
        views: number of cameras that share the channels.
        proprio_dim: size of proprio.
    """

    def __init__(self, config: ClassifierConfig, channels: int, views: int, proprio_dim: int) -> None:
        super().__init__()
        self.config, self.views = config, views
        width = config.width
        self.images = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1), GroupNorm(GROUPS, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1), GroupNorm(GROUPS, width), nn.SiLU(),
        )  # fmt: skip
        self.attention = nn.Conv2d(width, GLANCES, 1)
        self.vectors = nn.Sequential(nn.Linear(proprio_dim, 64), nn.SiLU())
        self.head = nn.Sequential(
            nn.Dropout(0.1), nn.Linear((GLANCES + 1) * width + 64, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, 1)
        )
        self.register_buffer("threshold", torch.tensor(0.5))

    def forward(self, latents: Tensor, proprio: Tensor) -> Tensor:
        """Return logits ``(N,)`` float32 for latents ``(N, C, h, w)`` and scaled proprio ``(N, P)``."""
        features = self.images(latents.contiguous(memory_format=torch.channels_last))
        attention = self.attention(features).flatten(2).float().softmax(-1)
        features = features.flatten(2).float()
        seen = (attention @ features.transpose(1, 2)).flatten(1)
        return self.head(torch.cat([seen, features.amax(-1), self.vectors(proprio)], -1))[:, 0].float()

    def loss(self, latents: Tensor, proprio: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy for ``labels`` ``(N,)`` bool."""
        latents = _shifted(latents, self.views)
        logits = self(
            latents + LATENT_NOISE * torch.randn_like(latents), proprio + PROPRIO_NOISE * torch.randn_like(proprio)
        )
        loss = functional.binary_cross_entropy_with_logits(logits, labels.float())
        accuracy = ((logits > 0) == labels).float().mean()
        return {"loss": loss, "accuracy": accuracy.detach()}


def _shifted(latents: Tensor, views: int) -> Tensor:
    """Move the picture of every camera by up to an eighth of its side, the same way in the whole batch."""
    height, width = latents.shape[-2:]
    most = min(height, width) // 8
    if not most:
        return latents
    parts = []
    for part, (row, column) in zip(
        latents.chunk(views, 1), torch.randint(0, 2 * most + 1, (views, 2)).tolist(), strict=True
    ):
        padded = functional.pad(part, (most,) * 4, mode="replicate")
        parts.append(padded[:, :, row : row + height, column : column + width])
    return torch.cat(parts, 1)


def shows_success(probability: np.ndarray, threshold: float, consecutive: int) -> np.ndarray:
    """Return ``(T,)`` bool: from which frame on an episode counts as a success.

    Args:
        probability: ``(T,)`` of its frames.
        threshold: see :class:`SuccessClassifier`.
        consecutive: frames in a row that must reach it.
    """
    above = np.concatenate([np.zeros(consecutive - 1, bool), probability >= threshold])
    if len(above) < consecutive:
        return np.zeros(len(probability), bool)
    held = np.lib.stride_tricks.sliding_window_view(above, consecutive).all(-1)
    return np.logical_or.accumulate(held)


def highest_threshold(probability: Sequence[float] | np.ndarray, consecutive: int) -> float:
    """Return the highest threshold at which an episode counts as a success; 0 if it is too short for one.

    Args:
        probability: ``(T,)`` of its frames.
        consecutive: frames in a row that must reach it.
    """
    if len(probability) < consecutive:
        return 0.0
    return float(np.lib.stride_tricks.sliding_window_view(probability, consecutive).min(-1).max())


def calibrate_threshold(episodes: list[np.ndarray], success: np.ndarray, consecutive: int) -> tuple[float, float]:
    """Return the middle of the thresholds that are as good as the best, and its balanced accuracy over episodes.

    As good is within one standard error of the best balanced accuracy (after Breiman et al. 1984, §3.4.3): few episodes
    are held out, and one of them alone could decide for a threshold that reinforcement exploits.

    Args:
        episodes: probability of every frame, per episode.
        success: ``(E,)`` what really happened; must have both outcomes.
        consecutive: see :func:`shows_success`.
    """
    reach = np.array([highest_threshold(one, consecutive) for one in episodes])
    candidates = np.unique(np.concatenate([np.linspace(0.05, 0.95, 19), np.clip(reach, 0.05, 0.95)]))
    right = np.array([[np.sum(reach[success] >= c), np.sum(reach[~success] < c)] for c in candidates])
    counts = np.array([success.sum(), (~success).sum()])
    scores = (right / counts).mean(1)
    # Of a rate with one more of either outcome, so that a handful of episodes without an error is no certainty.
    rates = (right[scores.argmax()] + 1) / (counts + 2)
    error = np.sqrt((rates * (1 - rates) / counts).sum()) / 2
    good = np.flatnonzero(scores >= scores.max() - error)
    middle = (candidates[good[0]] + candidates[good[-1]]) / 2
    chosen = good[np.abs(candidates[good] - middle).argmin()]
    return float(candidates[chosen]), float(scores[chosen])
