"""What GRPO and PPO share: the clipped objective, and how the update loop talks to them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from simtoreal.policies.chunk_rollout import ChunkRollouts
from simtoreal.policies.denoising_chain import DenoisingPolicy
from simtoreal.policies.reinforcement_config import ClipConfig

# Ratios beyond exp(±10) are clipped whatever they are; their exponentials would overflow in the gradient.
LARGEST_LOG_RATIO = 10.0


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: ClipConfig) -> tuple[Tensor, Tensor]:
    """Return the loss of every decision ``(N,)``, and where clipping stopped its gradient ``(N,)`` bool.

    With the ratio r of the new to the old probability and the advantage A, the loss is
    ``-min(r A, clamp(r, 1 - low, 1 + high) A)`` (Schulman et al. 2017, eq. 7, with two bounds), and for A < 0 at most
    ``-dual A`` (Ye et al. 2020, eq. 5): an action that became far likelier than when it was tried would otherwise
    dominate the gradient.

    Args:
        log_ratio: ``(N,)`` new minus old log-probability.
        advantage: ``(N,)``.
        clip: bounds.
    """
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    free = ratio * advantage
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high) * advantage
    objective = torch.minimum(free, bounded)
    limited = torch.where(advantage < 0, torch.maximum(objective, clip.dual * advantage), objective)
    stopped = (bounded < free) | (limited > objective)
    return -limited, stopped


class PolicyGradient(nn.Module, ABC):
    """An algorithm: what it learns besides the policy are its parameters.

    Attributes:
        learning_rate: of its own parameters.
    """

    learning_rate: float = 0.0

    @abstractmethod
    def samples(self, rollouts: ChunkRollouts, policy: DenoisingPolicy) -> dict[str, Tensor]:
        """Return ``decisions`` int64 ``(N,)``, the decisions to learn from, and what :meth:`loss` needs of each."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor], log_prob: Tensor, condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a minibatch and metrics.

        Args:
            batch: rows of :meth:`samples`, and ``old_log_prob`` ``(N,)``.
            log_prob: ``(N,)`` under the current policy.
            condition: ``(N, C)`` what the denoiser was given.
        """
