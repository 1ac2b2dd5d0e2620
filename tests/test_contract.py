"""The interface contract: kept by every backend, and able to fail."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from simtoreal.envs import gym_id, list_tasks, make_env, make_vector_env
from simtoreal.envs.contract import ContractError, check_robot_env
from simtoreal.envs.randomization import RANDOMIZATIONS


@pytest.mark.parametrize("task", list_tasks())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_and_our_contract_on_every_task(task: str) -> None:
    env = gym.make(gym_id(task))
    check_env(env.unwrapped, skip_render_check=True)
    check_robot_env(env.unwrapped, deterministic=True)
    check_robot_env(make_vector_env(task, 3), deterministic=True)


def test_domain_randomisation_keeps_the_contract() -> None:
    # Sensor noise goes on when a state is restored, so that replay is exact only without it.
    quiet = dataclasses.replace(RANDOMIZATIONS["standard"], image_noise=0.0, joint_noise_rad=0.0)
    check_robot_env(make_vector_env("pick_place", 2, randomization=quiet), deterministic=True)


class Broken(gym.Wrapper):
    """A good environment with one fault."""

    def __init__(self, env: gym.Env, fault: str) -> None:
        super().__init__(env)
        self.fault = fault
        self.buffers: dict[str, np.ndarray] = {}
        self.resets = 0
        self.steps = 0

    @property
    def unwrapped(self):
        return self

    @property
    def embodiment(self):
        return self.env.embodiment

    @property
    def task(self):
        return self.env.task

    def set_instruction(self, text):
        if self.fault != "ignores instructions":
            self.env.set_instruction(text)

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        self.steps = 0
        offset = self.resets if self.fault == "forgets seeds" else 0
        return self._spoil(*self.env.reset(seed=seed + offset, options=options))

    def step(self, action):
        if self.fault == "clips NaN":
            action = np.nan_to_num(np.asarray(action))
        if self.fault == "clips range" and np.asarray(action).dtype.kind == "f":
            action = np.clip(action, -1, 1)
        if self.fault == "mirrors y" and np.shape(action) == (7,) and np.asarray(action).dtype.kind == "f":
            action = action * np.array([1, -1, 1, 1, 1, 1, 1], dtype=np.float32)
        if self.fault == "writes into actions" and np.shape(action) == (7,):
            result = self.env.step(action)
            action[:] = 0
        else:
            result = self.env.step(action)
        observation, reward, terminated, truncated, info = result
        self.steps += 1
        observation, info = self._spoil(observation, info)
        if self.fault == "truncates early":
            truncated = truncated or self.steps >= 100
        if self.fault == "never ends":
            truncated = False
        return observation, np.nan if self.fault == "NaN reward" else reward, terminated, truncated, info

    def _spoil(self, observation, info):
        if self.fault == "float64 proprio":
            observation["proprio"] = observation["proprio"].astype(np.float64)
        if self.fault == "extra key":
            observation["secret"] = np.zeros(3, dtype=np.float32)
        if self.fault == "black images":
            observation["front_image"][:] = 0
        if self.fault == "reuses buffers":
            for key, value in observation.items():
                self.buffers.setdefault(key, value.copy())[:] = value
            observation = self.buffers
        if self.fault == "no target":
            del info["target"]
        if self.fault == "numeric milestones":
            info["milestones"] = {name: 1.0 for name in info["milestones"]}
        return observation, info


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("float64 proprio", "'proprio' must be float32"),
        ("extra key", "returned the keys"),
        ("black images", "one flat colour"),
        ("reuses buffers", "return copies"),
        ("no target", "lacks 'target'"),
        ("numeric milestones", "must map names to bools"),
        ("clips NaN", "with NaN must raise ActionError, and was accepted"),
        ("clips range", "a value of 1.5 must raise ActionError, and was accepted"),
        ("mirrors y", "asked to move the TCP"),
        ("writes into actions", "changed the caller's action"),
        ("NaN reward", "rewards must be finite"),
        ("forgets seeds", "equal seeds give different"),
        ("ignores instructions", "set_instruction has no effect"),
        ("truncates early", "before the horizon"),
        ("never ends", "not truncated at the horizon"),
    ],
)
def test_the_contract_notices(fault: str, message: str) -> None:
    env = Broken(make_env("pick_place", image_size=32), fault)
    with pytest.raises(ContractError, match=message):
        check_robot_env(env, deterministic=True)


def test_third_party_environments_learn_everything_at_once() -> None:
    with pytest.raises(ContractError) as caught:
        check_robot_env(gym.make("CartPole-v1"), deterministic=True)
    assert "embodiment must be an Embodiment" in str(caught.value)
