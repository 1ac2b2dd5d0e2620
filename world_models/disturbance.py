"""Makes any actor clumsy, so that a world model also sees what happens when things go wrong.

A model that only saw an expert has never seen a miss, a drop or a push, and imagines that every grasp succeeds (WoVR,
arXiv 2602.13977, trains on rollouts with failures for this reason). Rollouts of a half-trained policy hold enough of
them; with an expert only, disturb it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtoreal.envs.errors import ConfigError
from simtoreal.envs.rollout import Actor, Observation


@dataclass(frozen=True, kw_only=True)
class DisturbanceConfig:
    """How an actor is disturbed; every episode draws its own mixture.

    Raises:
        ConfigError: a value is out of range.
    """

    clean_share: float = 0.25
    """Episodes that are not disturbed at all."""
    misjudgement_m: float = 0.03
    """Largest standard deviation of where the actor believes the objects to be (metres, horizontal); the error is
    constant for a while and then drawn anew."""
    noise: float = 0.5
    """Largest standard deviation of noise on the action (fraction of its range)."""
    gripper_slips: float = 2.0
    """Mean number of moments per episode at which the gripper does the opposite for a few steps."""
    wandering: float = 1.0
    """Mean number of stretches per episode in which the arm moves at random."""
    redraw_steps: int = 60
    """Steps after which the errors of an episode are drawn anew."""

    def __post_init__(self) -> None:
        if not 0 <= self.clean_share <= 1:
            raise ConfigError(f"clean_share is {self.clean_share}; expected a value in [0, 1]")
        if min(self.misjudgement_m, self.noise, self.gripper_slips, self.wandering) < 0 or self.redraw_steps < 1:
            raise ConfigError("disturbances must not be negative, redraw_steps at least 1")


@dataclass
class _Episode:
    generator: np.random.Generator
    clean: bool
    step: int = 0
    offset: np.ndarray | None = None
    noise: float = 0.0
    slipping: int = 0
    wandering: int = 0
    direction: np.ndarray | None = None


class DisturbedActor:
    """Passes observations and actions of ``actor`` on with errors of its own.

    Args:
        actor: what acts; chunks of one action (``execute_steps`` 1, such as the scripted expert).
        object_positions: columns of ``object_state`` with x of every object (y follows), misjudged by the same offset
            each; empty leaves the observation alone.
        config: how strongly.
        seed: combined with the seed of each episode.

    Raises:
        ConfigError: the actor executes several actions of a chunk.
    """

    def __init__(
        self, actor: Actor, object_positions: Sequence[int] = (), config: DisturbanceConfig | None = None, seed: int = 0
    ) -> None:
        if actor.execute_steps != 1:
            raise ConfigError(f"the actor executes {actor.execute_steps} actions of a chunk; 1 can be disturbed")
        self.actor, self.columns, self.seed = actor, list(object_positions), seed
        self.config = config or DisturbanceConfig()
        self.observation_steps, self.execute_steps, self.ensembling = actor.observation_steps, 1, actor.ensembling
        self._episodes: dict[int, _Episode] = {}

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """Begin new episodes; the seed of an episode decides its disturbances."""
        self.actor.reset(slots, seeds)
        for slot, seed in zip(slots, seeds, strict=True):
            generator = np.random.default_rng([self.seed, seed])
            self._episodes[int(slot)] = _Episode(generator, clean=bool(generator.random() < self.config.clean_share))

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """Return disturbed chunks ``(len(slots), 1, action_dim)`` in [-1, 1]."""
        episodes = [self._episodes[int(slot)] for slot in slots]
        for episode in episodes:
            self._advance(episode)
        if self.columns:
            state = observation["object_state"].copy()
            for row, episode in enumerate(episodes):
                if episode.offset is not None:
                    for column in self.columns:
                        state[row, :, column : column + 2] += episode.offset
            observation = {**observation, "object_state": state}
        actions = self.actor.act(observation, instructions, slots)[:, :1].copy()
        for row, episode in enumerate(episodes):
            if not episode.clean:
                self._disturb(actions[row, 0], episode)
        return np.clip(actions, -1.0, 1.0)

    def _advance(self, episode: _Episode) -> None:
        """Draw what happens at this step of an episode."""
        config, generator = self.config, episode.generator
        if not episode.clean:
            if episode.step % config.redraw_steps == 0:
                # Small errors are the interesting ones: they end close to success.
                scale = config.misjudgement_m * generator.random() ** 2
                episode.offset = generator.normal(0.0, scale, 2)
                episode.noise = config.noise * generator.random() ** 2
            rate = 1.0 / (2 * config.redraw_steps)
            if episode.slipping == 0 and generator.random() < config.gripper_slips * rate:
                episode.slipping = int(generator.integers(3, 12))
            if episode.wandering == 0 and generator.random() < config.wandering * rate:
                episode.wandering = int(generator.integers(5, 20))
                episode.direction = generator.uniform(-0.8, 0.8, 3)
            episode.slipping = max(0, episode.slipping - 1)
            episode.wandering = max(0, episode.wandering - 1)
        episode.step += 1

    def _disturb(self, action: np.ndarray, episode: _Episode) -> None:
        if episode.wandering and episode.direction is not None:
            action[:3] = episode.direction
        action[:-1] += episode.generator.normal(0.0, episode.noise, len(action) - 1)
        if episode.slipping:
            action[-1] = -action[-1]
