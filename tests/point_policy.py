"""A small policy for the world of tests/point_world.py, taught a little by hand-made demonstrations."""

from __future__ import annotations

import numpy as np
import torch
from point_world import PointVectorEnv
from toy_reaching import small_vision

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.panda import panda_embodiment
from simtoreal.policies.config import DiffusionConfig
from simtoreal.policies.diffusion import DiffusionPolicy
from simtoreal.policies.normalization import Statistics

EMBODIMENT = panda_embodiment(16)


def point_policy(seed: int = 0, embodiment: Embodiment = EMBODIMENT, **changes) -> DiffusionPolicy:
    """Untrained, on the position only unless ``image_keys`` are given."""
    values = {
        "observation_steps": 1, "horizon": 4, "execute_steps": 4, "image_keys": (), "vision": small_vision(),
        "unet_widths": (32,), "condition_width": 64, "inference_steps": 4,
    }  # fmt: skip
    size = embodiment.proprio.dim
    statistics = {
        "actions": Statistics(low=-np.ones(7, np.float32), high=np.ones(7, np.float32)),
        "proprio": Statistics(low=-np.ones(size, np.float32), high=np.ones(size, np.float32)),
    }
    torch.manual_seed(seed)
    return DiffusionPolicy(DiffusionConfig(**{**values, **changes}), embodiment, statistics)


def demonstrations(position: np.ndarray, error: float = 0.0) -> dict:
    """Window batch of an expert that walks from ``position`` (N, 3) to a point ``error`` away from the origin."""
    goal = error * np.ones(3)
    proprio = np.zeros((len(position), 1, 20), np.float32)
    proprio[:, 0, :3] = position
    actions = np.zeros((len(position), 4, 7), np.float32)
    for step in range(4):
        actions[:, step, :3] = np.clip((goal - position) / 0.2, -1, 1)
        position = position + 0.2 * actions[:, step, :3]
    return {
        "observation": {"proprio": torch.from_numpy(proprio)}, "actions": torch.from_numpy(actions),
        "action_mask": torch.ones(len(position), 4, dtype=torch.bool), "instruction": [""] * len(position),
    }  # fmt: skip


def teach(policy: DiffusionPolicy, steps: int, error: float) -> DiffusionPolicy:
    """Imitate demonstrations that stop ``error`` away from the goal on every axis (success is within 0.1)."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    policy.train()
    for _ in range(steps):
        optimizer.zero_grad()
        policy.loss(demonstrations(rng.uniform(-1, 1, (64, 3)), error))["loss"].backward()
        optimizer.step()
    return policy.eval()


class TrickyPointEnv(PointVectorEnv):
    """Point world that notes its resets, can be started anywhere (option ``init``), and breaks on request.

    ``broken`` maps seeds to what goes wrong in their second step: ``fault``, ``observation`` or ``reward``.
    """

    def __init__(self, num_envs: int, broken: dict[int, str] | None = None) -> None:
        super().__init__(num_envs)
        self.broken = broken or {}
        self.seeds = np.zeros(num_envs, dtype=int)
        self.resets: list[tuple[list, dict]] = []

    def reset(self, *, seed=None, options=None):
        options = dict(options or {})
        self.resets.append((list(seed), options))
        mask = options.get("reset_mask", np.ones(self.num_envs, dtype=bool))
        observation, info = super().reset(seed=seed, options=options)
        for slot in np.flatnonzero(mask):
            self.seeds[slot] = seed[slot]
            if "init" in options:
                self.position[slot] = options["init"][slot]
        return self._observation() if "init" in options else observation, info

    def step(self, actions):
        observation, reward, terminated, truncated, info = super().step(actions)
        for slot in range(self.num_envs):
            kind = self.broken.get(int(self.seeds[slot])) if self.steps[slot] >= 2 else None
            if kind == "fault":
                info["sim_fault"][slot], truncated[slot] = "simulation diverged", True
            elif kind == "observation":
                observation["proprio"][slot, 0] = np.nan
            elif kind == "reward":
                reward[slot] = np.nan
        return observation, reward, terminated, truncated, info
