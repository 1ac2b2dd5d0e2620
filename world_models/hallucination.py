"""How much better the imagined world is than the real one: the same policy, noise and initial conditions in both.

A policy that learns inside a model finds whatever the model believes too easily. The difference between imagined and
real success on the same initial conditions is what it has found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from simtoreal.envs.embodiment import TARGET_NAMES
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.rollout import Actor, Listener, Observation, SingleVectorEnv, Step, rollout
from simtoreal.envs.task import TaskSpec
from simtoreal.evaluation.compare import compare
from simtoreal.evaluation.results import load_evaluation
from simtoreal.world_models.side_by_side import write_side_by_side
from simtoreal.world_models.video_data import VideoData


def first_frames(env: VectorEnv | gym.Env, seeds: Sequence[int], task: TaskSpec) -> VideoData:
    """Return what is seen at the beginning of episodes: one frame per seed, for contexts at step 0.

    The environment is reset to every initial condition; no control step is taken.

    Raises:
        ConfigError: the environment shows no images.
    """
    vector = env if isinstance(env, VectorEnv) else SingleVectorEnv(env)
    embodiment = vector.unwrapped.embodiment  # type: ignore[attr-defined]
    for key in embodiment.image_keys:
        if key not in vector.single_observation_space.spaces:
            raise ConfigError(f"the environment does not show '{key}', so nothing can be imagined from its beginnings")
    images, proprio, instructions = [], [], []
    for first in range(0, len(seeds), vector.num_envs):
        chosen = [int(seed) for seed in seeds[first : first + vector.num_envs]]
        padded = chosen + [chosen[-1]] * (vector.num_envs - len(chosen))
        observation, info = vector.reset(seed=padded)
        images.append(np.stack([observation[key] for key in embodiment.image_keys], 1)[: len(chosen)])
        proprio.append(observation["proprio"][: len(chosen)])
        instructions += [str(text) for text in info["instruction"][: len(chosen)]]
    count = len(seeds)
    return VideoData(
        embodiment=embodiment,
        task=task.to_dict(),
        images=np.concatenate(images),
        proprio=np.concatenate(proprio).astype(np.float32),
        actions=np.zeros((count, embodiment.action.dim), np.float32),
        targets=np.zeros((count, len(TARGET_NAMES) if embodiment.action.mode != "env" else 0), np.float32),
        labels=np.zeros(count, bool),
        starts=np.arange(count),
        ends=np.arange(count) + 1,
        success=np.zeros(count, bool),
        held_out=np.zeros(count, bool),
        names=tuple(f"initial condition {seed}" for seed in seeds),
        instructions=tuple(instructions),
        seeds=tuple(int(seed) for seed in seeds),
    )


def places_by_seed(seeds: Sequence[int]) -> list[tuple[int, int]]:
    """Return contexts in an order in which seed s of consecutive ``seeds`` begins in its own first frame.

    :class:`~simtoreal.world_models.vector_env.WorldModelVectorEnv` takes context s modulo their number. So the noise of
    the policy, which depends on the seed, is the same in both worlds.
    """
    count = len(seeds)
    if list(seeds) != list(range(seeds[0], seeds[0] + count)):
        raise ConfigError("expected consecutive seeds")
    return [((context - seeds[0]) % count, 0) for context in range(count)]


def world_gap(real: Path, other: Path, name: str = "imagined") -> dict[str, Any]:
    """Compare two evaluation folders of one policy on the same initial conditions.

    Args:
        real: in the world that counts.
        other: in the world that it learns in.
        name: of that world.

    Returns:
        ``real`` and the name (success rate, successes, n, interval), ``gap`` (the other's rate - the real one) with its
        95 % ``gap_interval`` and ``gap_p_value`` (paired), and ``agreement``, the share of initial conditions with the
        same outcome.

    Raises:
        EvaluationError: a folder is no finished evaluation, or they cannot be paired.
    """
    arms = [load_evaluation(real, "real"), load_evaluation(other, name)]
    found = compare(arms)
    pair = found["pairs"][0]
    keys = ("success_rate", "successes", "n", "interval")
    return {
        "real": {key: found["arms"][0][key] for key in keys},
        name: {key: found["arms"][1][key] for key in keys},
        "gap": pair["difference"],
        "gap_interval": pair["difference_interval"],
        "gap_p_value": pair["p_value"],
        "agreement": (pair["both"] + pair["neither"]) / found["arms"][0]["n"],
    }


class _Frames(Listener):
    """Keeps what all cameras show in every episode, by seed."""

    def __init__(self, image_keys: Sequence[str]) -> None:
        self.image_keys = tuple(image_keys)
        self.frames: dict[int, list[np.ndarray]] = {}
        self._seeds: dict[int, int] = {}

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """Begin with the first frame."""
        self._seeds[slot] = seed
        self.frames[seed] = [np.stack([observation[key] for key in self.image_keys])]

    def on_step(self, step: Step) -> None:
        """Add the frame after the action."""
        for row, slot in enumerate(step.slots):
            frame = np.stack([step.next_observation[key][row] for key in self.image_keys])
            self.frames[self._seeds[int(slot)]].append(frame)


def film_both_worlds(
    real: VectorEnv | gym.Env, imagined: VectorEnv, actor: Actor, seeds: Sequence[int], path: Path
) -> int:
    """Let a policy act from the same initial conditions in both worlds, and write one video of them side by side.

    Returns:
        The control steps taken in the real world.
    """
    embodiment = imagined.unwrapped.embodiment  # type: ignore[attr-defined]
    films, steps = {}, 0
    for name, env in (("real", real), ("imagined", imagined)):
        film = _Frames(embodiment.image_keys)
        results = rollout(env, actor, seeds, listeners=[film])
        films[name] = film.frames
        steps += sum(result.steps for result in results) if name == "real" else 0
    episodes = [{name: np.stack(frames[seed]) for name, frames in films.items()} for seed in seeds]
    write_side_by_side(path, episodes, embodiment.control_hz)
    return steps
