"""A policy that acts as in the rollouts of reinforcement learning: with the noise that explores."""

from __future__ import annotations

import torch
from torch import Tensor

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.base import Policy
from simtoreal.policies.denoising_chain import DenoisingPolicy
from simtoreal.policies.reinforcement_config import ExplorationConfig


class ExploringActor(PolicyActor):
    """Samples every chunk from the stochastic denoising chain; otherwise a :class:`PolicyActor`.

    A world model has to know what the actions of reinforcement learning do, noise included.

    Args:
        policy: acts with the denoising steps that it is set to.
        exploration: the noise.
        seed: of the noise.
    """

    def __init__(self, policy: DenoisingPolicy, exploration: ExplorationConfig, seed: int = 0) -> None:
        super().__init__(policy, seed)
        self.exploration = exploration

    def _predict(
        self, observation: dict[str, Tensor], instructions: list[str], generators: list[torch.Generator]
    ) -> Tensor:
        policy: DenoisingPolicy = self.policy  # type: ignore[assignment]
        return policy.sample_with_log_prob(observation, instructions, generators, self.exploration).chunk


def require_denoising(policy: Policy, denoising_steps: int, name: str = "the policy") -> None:
    """Refuse a policy that reinforcement cannot improve; it is left with ``denoising_steps`` per chunk.

    Raises:
        ConfigError: it has no denoising chain, or its sampler no stochastic form with this number of steps.
    """
    if not isinstance(policy, DenoisingPolicy):
        raise ConfigError(
            f"{name} is of type '{policy.config.type}', whose actions have no probability that reinforcement could "
            "change. Train one with 'simtoreal train --policy diffusion'."
        )
    policy.set_inference_steps(denoising_steps)
    policy.process.levels()
