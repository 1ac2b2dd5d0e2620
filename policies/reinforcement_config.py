"""Settings of reinforcement learning. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ExplorationConfig:
    """Noise that makes a policy try something else; see :mod:`simtoreal.policies.denoising_chain`."""

    noise_scale: float = 0.2
    """Standard deviation of the noise of a denoising step, in units of the normalised actions (range [-1, 1]). Too
    small, little is explored and updates take the policy far, as probabilities go; too large, the skill is lost while
    exploring."""

    def __post_init__(self) -> None:
        if not self.noise_scale > 0:
            raise ValueError(f"noise_scale is {self.noise_scale}; a probability needs a positive one, e.g. 0.2")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How far one update may move the policy from the one that acted."""

    low: float = 0.2
    """Probability ratios below 1 - low are not lowered further."""
    high: float = 0.28
    """Probability ratios above 1 + high are not raised further (DAPO, Yu et al. 2025: unlikely good actions may gain
    more than PPO's symmetric clip allows; WoVR)."""
    dual: float = 3.0
    """Largest ratio that counts against a bad action (dual clip, Ye et al. 2020)."""

    def __post_init__(self) -> None:
        if not 0 < self.low < 1 or self.high <= 0 or self.dual <= 1 + self.high:
            raise ValueError(
                f"clip is {self.low}, {self.high}, {self.dual}; expected 0 < low < 1, high > 0 and dual > 1 + high"
            )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group relative policy optimisation (Shao et al. 2024): a rollout is judged against others of the same start."""

    group_size: int = 8
    """Rollouts from the same initial condition."""
    normalize: bool = True
    """Divide the advantages of a group by their standard deviation."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Limits of an update."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; a group needs at least 2 rollouts to compare")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation (Schulman et al. 2017) over action chunks, with a learned value."""

    discount: float = 0.99
    """Discount per chunk."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation (Schulman et al. 2016)."""
    value_learning_rate: float = 3e-3
    """Learning rate of the value head, which starts from nothing."""
    value_width: int = 128
    """Width of the value head's two hidden layers."""
    value_clip: float = 0.2
    """Largest change of a value per iteration that the value loss rewards."""
    clip: ClipConfig = field(default_factory=lambda: ClipConfig(high=0.2))
    """Limits of an update."""

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1 or not 0 <= self.gae_lambda <= 1:
            raise ValueError("discount must be in (0, 1] and gae_lambda in [0, 1]")
        if self.value_learning_rate <= 0 or self.value_width < 1 or self.value_clip <= 0:
            raise ValueError("value_learning_rate, value_width and value_clip must be positive")


@dataclass(frozen=True, kw_only=True)
class ReinforcementConfig:
    """How a denoising policy is improved by reinforcement.

    Raises:
        ValueError: a value is out of range.
    """

    algorithm: Literal["grpo", "ppo"] = "grpo"
    """``grpo`` needs no value but environments with repeatable starts; ``ppo`` learns a value."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """Settings of GRPO."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Settings of PPO."""
    rollouts: int = 256
    """Rollouts per iteration (with GRPO a multiple of the group size). Success or failure of a whole rollout says
    little about each of its chunks, so few of them give a gradient that is mostly noise."""
    max_chunks: int | None = None
    """Chunks after which a rollout is cut off; None leaves the end to the environment."""
    denoising_steps: int = 4
    """Denoising steps per chunk, in rollouts and from then on whenever the policy is used."""
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    """Noise of the rollouts."""
    learning_rate: float = 1e-4
    """Learning rate of the policy (AdamW)."""
    warmup_updates: int = 20
    """Optimiser steps over which the learning rates rise. The first steps of AdamW are of full size whatever the
    gradient, and one of them can take a policy further than all that follow."""
    epochs: int = 2
    """Passes over the decisions of an iteration."""
    minibatch: int = 512
    """Decisions per optimiser step."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    freeze_encoder: bool = True
    """Keep the image encoder as it is: images are encoded once, when the policy acts, and never in updates."""
    anchor_weight: float = 0.05
    """Weight β of the imitation loss on demonstrations, where some are given (RL-Co), in the units of the
    log-probabilities that reinforcement changes; see :meth:`loss_scale`."""
    first_seed: int = 10_000_000
    """First initial condition; those of later iterations follow it. Keep it apart from what evaluates the policy."""
    seed: int = 0
    """Decides the noise of the rollouts and the order of the updates."""

    def loss_scale(self, actions: int, action_dim: int) -> float:
        """What a mean squared error is multiplied by to be the (negative) log-probability of executed actions, in nats.

        The log-density of a chunk is a sum over denoising steps, executed actions and their dimensions, each of which
        divides a squared error by 2 σ². As a mean, imitation was a thousandth of the gradient of reinforcement. The
        absolute error of a policy with ``loss`` l1 is multiplied alike, and β then means something else.

        Args:
            actions: executed per chunk.
            action_dim: of each.
        """
        return self.denoising_steps * actions * action_dim / (2 * self.exploration.noise_scale**2)

    def __post_init__(self) -> None:
        for name in ("rollouts", "denoising_steps", "epochs", "minibatch", "warmup_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_chunks is not None and self.max_chunks < 1:
            raise ValueError(f"max_chunks is {self.max_chunks}; expected at least 1, or none")
        if min(self.learning_rate, self.max_gradient_norm) <= 0:
            raise ValueError("learning_rate and max_gradient_norm must be positive")
        if min(self.anchor_weight, self.seed, self.first_seed) < 0:
            raise ValueError("anchor_weight, seed and first_seed must not be negative")
        if self.algorithm == "grpo" and self.rollouts % self.grpo.group_size:
            raise ValueError(f"rollouts is {self.rollouts}; expected a multiple of group_size ({self.grpo.group_size})")
