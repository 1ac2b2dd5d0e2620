"""A small real vector environment: a point that moves to the origin. Fast enough to test what surrounds simulators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from simtoreal.data_collection.collect import CollectionPlan
from simtoreal.envs.panda import panda_embodiment

HORIZON = 12


def fails(seed: int) -> bool:
    """Seeds that the expert cannot solve."""
    return seed % 5 == 3


class PointVectorEnv(VectorEnv):
    """Success when the point is within 0.1 of the origin; some seeds start too far away to get there in time."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, num_envs: int, image_size: int = 16) -> None:
        self.num_envs = num_envs
        self.embodiment = panda_embodiment(image_size)
        self.task = SimpleNamespace(name="point", horizon=HORIZON, to_dict=lambda: {"name": "point"})
        image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.single_observation_space = gym.spaces.Dict(
            {
                "front_image": image,
                "wrist_image": image,
                "proprio": gym.spaces.Box(-np.inf, np.inf, (self.embodiment.proprio.dim,), np.float32),
            }
        )
        self.single_action_space = gym.spaces.Box(-1, 1, (7,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.position = np.zeros((num_envs, 3))
        self.steps = np.zeros(num_envs, dtype=int)
        self.closed = False

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        for slot in np.flatnonzero(mask):
            reach = 9.0 if fails(seed[slot]) else 1.0
            rng = np.random.default_rng(seed[slot])
            self.position[slot] = reach * rng.uniform(0.5, 1.0, 3) * rng.choice([-1.0, 1.0], 3)
            self.steps[slot] = 0
        return self._observation(), self._info(np.zeros(self.num_envs, dtype=bool))

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.position = self.position + 0.2 * actions[:, :3]
        self.steps += 1
        success = np.abs(self.position).max(axis=1) < 0.1
        truncated = ~success & (self.steps >= HORIZON)
        return self._observation(), success.astype(np.float64), success, truncated, self._info(success)

    def _observation(self) -> dict[str, np.ndarray]:
        size = self.embodiment.cameras[0].height
        proprio = np.zeros((self.num_envs, self.embodiment.proprio.dim), dtype=np.float32)
        proprio[:, :3] = self.position
        brightness = (np.abs(self.position[:, 0]) * 25).astype(np.uint8)
        front = np.broadcast_to(brightness[:, None, None, None], (self.num_envs, size, size, 3)).copy()
        return {"front_image": front, "wrist_image": 255 - front, "proprio": proprio}

    def _info(self, success: np.ndarray) -> dict[str, Any]:
        target = np.zeros((self.num_envs, 10))
        target[:, :3] = self.position
        return {
            "success": success,
            "milestones": {"near": np.abs(self.position).max(axis=1) < 0.5},
            "instruction": np.array(["go to the origin"] * self.num_envs, dtype=object),
            "target": target,
            "contacts": {"wall": self.position[:, 0] > 1.0},
            "sim_fault": np.array([""] * self.num_envs, dtype=object),
            "sim_state": self.position.copy(),
        }


class PointExpert:
    """Walks straight to the origin."""

    observation_steps = 1
    execute_steps = 1
    ensembling = None

    def reset(self, slots: np.ndarray, seeds: Any) -> None:
        pass

    def act(self, observation: dict[str, np.ndarray], instructions: Any, slots: np.ndarray) -> np.ndarray:
        action = np.zeros((len(slots), 1, 7), dtype=np.float32)
        action[:, 0, :3] = np.clip(-observation["proprio"][:, -1, :3] / 0.2, -1, 1)
        return action


def setup(plan: CollectionPlan) -> tuple[PointVectorEnv, PointExpert]:
    """Environment and expert for :func:`simtoreal.data_collection.collect.collect`."""
    return PointVectorEnv(plan.num_envs, plan.image_size), PointExpert()
