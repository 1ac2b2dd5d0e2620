"""Proximal policy optimisation over action chunks (PPO, Schulman et al. 2017; as in RL-Co, 2026).

A chunk is one action of the algorithm and earns the sum of the rewards of its executed steps. Advantages come from
generalised advantage estimation (GAE, Schulman et al. 2016) with a value head on the condition of the denoiser. The
head does not send gradients into the policy: at first it knows nothing, and would spoil what demonstrations taught.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simtoreal.policies.chunk_rollout import ChunkRollouts
from simtoreal.policies.denoising_chain import DenoisingPolicy
from simtoreal.policies.policy_gradient import PolicyGradient, clipped_surrogate
from simtoreal.policies.reinforcement_config import PPOConfig

# Decisions per pass of the value head over all rollouts.
VALUE_BATCH = 4096


def generalized_advantages(
    reward: Tensor, value: Tensor, last_value: Tensor, rollout: Tensor, *, discount: float, gae_lambda: float
) -> Tensor:
    """Return the advantages ``(C,)`` of decisions (Schulman et al. 2016, eq. 16).

    Args:
        reward, value: ``(C,)``; the decisions of a rollout follow one another.
        last_value: ``(R,)`` value after the last decision of every rollout, 0 where the task was over.
        rollout: int64 ``(C,)`` ascending, row in ``last_value``.
        discount, gae_lambda: γ and λ per decision.
    """
    lengths = torch.bincount(rollout, minlength=len(last_value))
    # One row per rollout, padded at the front, so that all of them end in the last column.
    first = lengths.cumsum(0) - lengths
    column = torch.arange(len(rollout)) - first[rollout] + (lengths.max() - lengths)[rollout]
    rewards = torch.zeros(len(last_value), int(lengths.max())).index_put((rollout, column), reward)
    values = torch.zeros_like(rewards).index_put((rollout, column), value)
    advantages, advantage, after = torch.zeros_like(rewards), torch.zeros_like(last_value), last_value
    for step in reversed(range(rewards.shape[1])):
        error = rewards[:, step] + discount * after - values[:, step]
        advantage = error + discount * gae_lambda * advantage
        advantages[:, step], after = advantage, values[:, step]
    return advantages[rollout, column]


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """Return the mean squared error of values ``(N,)``, which gains nothing from changes beyond ``clip``."""
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - target).square(), (near - target).square()).mean()


class PPO(PolicyGradient):
    """See the module.

    Args:
        config: settings.
        condition_dim: size of the denoiser's condition.
    """

    def __init__(self, config: PPOConfig, condition_dim: int) -> None:
        super().__init__()
        self.config, self.learning_rate = config, config.value_learning_rate
        width = config.value_width
        # The condition is made for the denoiser, at any scale.
        self.head = nn.Sequential(
            nn.LayerNorm(condition_dim), nn.Linear(condition_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def value(self, condition: Tensor) -> Tensor:
        """Return values ``(N,)`` for conditions ``(N, C)``."""
        value: Tensor = self.head(condition.detach()).squeeze(-1)
        return value

    def samples(self, rollouts: ChunkRollouts, policy: DenoisingPolicy) -> dict[str, Tensor]:
        """Return all ``decisions`` with ``advantage`` (mean 0, deviation 1), ``target`` and ``old_value`` ``(C,)``.

        A rollout that ran out of time is worth what the value head says of its last observation.
        """
        value = self._values(rollouts.features, policy)
        last = torch.where(rollouts.terminated, 0.0, self._values(rollouts.last_features, policy))
        config = self.config
        advantage = generalized_advantages(
            rollouts.reward, value, last, rollouts.rollout, discount=config.discount, gae_lambda=config.gae_lambda
        )
        return {
            "decisions": torch.arange(len(value)),
            "advantage": (advantage - advantage.mean()) / (advantage.std(unbiased=False) + 1e-8),
            "target": advantage + value,
            "old_value": value,
        }

    def loss(self, batch: dict[str, Tensor], log_prob: Tensor, condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PolicyGradient.loss`; policy and value share no weights, so their losses are simply added."""
        loss, stopped = clipped_surrogate(log_prob - batch["old_log_prob"], batch["advantage"], self.config.clip)
        value_loss = clipped_value_loss(
            self.value(condition), batch["old_value"], batch["target"], self.config.value_clip
        )
        return loss.mean() + value_loss, {"clip_fraction": stopped.float().mean(), "value_loss": value_loss.detach()}

    @torch.no_grad()
    def _values(self, features: Tensor, policy: DenoisingPolicy) -> Tensor:
        parts = [self.value(policy.condition(part.to(policy.device))) for part in features.split(VALUE_BATCH)]
        return torch.cat(parts).cpu()
