"""Group relative policy optimisation over action chunks (GRPO, Shao et al. 2024, §4.1; as in WoVR, 2026, §3.3).

Rollouts from the same initial condition form a group. A rollout's advantage is its return minus the mean return of the
group, the same for all of its chunks; no value function is learned. A group in which all rollouts earned the same, for
instance because all succeeded, says nothing and is left out. Every rollout counts alike, however many chunks it took.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simtoreal.policies.chunk_rollout import ChunkRollouts
from simtoreal.policies.denoising_chain import DenoisingPolicy
from simtoreal.policies.policy_gradient import PolicyGradient, clipped_surrogate
from simtoreal.policies.reinforcement_config import GRPOConfig

# Returns closer than this are equal; they are sums of a few rewards in float32.
EQUAL_RETURNS = 1e-6
# Graded rewards of rollouts that all fail alike differ by noise only, which must not be blown up to the size of success
# and failure (one success among sixteen rollouts already deviates by more).
LEAST_DEVIATION = 0.1


def group_advantages(
    returns: Tensor, groups: Tensor, *, normalize: bool, least_deviation: float = EQUAL_RETURNS
) -> tuple[Tensor, Tensor]:
    """Return advantages ``(R,)``, and which rollouts are in groups with different returns ``(R,)`` bool.

    Args:
        returns: float ``(R,)``.
        groups: int64 ``(R,)``.
        normalize: divide by the standard deviation (of the population) of the group.
        least_deviation: what a smaller one counts as. How little is noise depends on what the returns are.
    """
    _, group = torch.unique(groups, return_inverse=True)
    count = torch.bincount(group).to(returns.dtype)

    def group_mean(values: Tensor) -> Tensor:
        return torch.zeros_like(count).index_add(0, group, values) / count

    centred = returns - group_mean(returns)[group]
    deviation = group_mean(centred.square()).sqrt()[group]
    differ = deviation > EQUAL_RETURNS
    advantages = centred / deviation.clamp_min(least_deviation) if normalize else centred
    return torch.where(differ, advantages, 0.0), differ


class GRPO(PolicyGradient):
    """See the module."""

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__()
        self.config = config

    def samples(self, rollouts: ChunkRollouts, policy: DenoisingPolicy) -> dict[str, Tensor]:
        """Return ``decisions``, ``advantage`` and ``weight`` ``(N,)`` of the groups that differ (N may be 0).

        The weights are 1 / (valid length of the rollout), scaled to a mean of 1.
        """
        advantage, differ = group_advantages(
            rollouts.returns(), rollouts.groups, normalize=self.config.normalize, least_deviation=LEAST_DEVIATION
        )
        decisions = torch.nonzero(differ[rollouts.rollout]).flatten()
        rollout = rollouts.rollout[decisions]
        weight = 1.0 / rollouts.lengths()[rollout]
        return {"decisions": decisions, "advantage": advantage[rollout], "weight": weight / weight.mean()}

    def loss(self, batch: dict[str, Tensor], log_prob: Tensor, condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PolicyGradient.loss`."""
        loss, stopped = clipped_surrogate(log_prob - batch["old_log_prob"], batch["advantage"], self.config.clip)
        return (batch["weight"] * loss).mean(), {"clip_fraction": stopped.float().mean()}
