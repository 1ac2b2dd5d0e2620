"""Demonstrations of a point in a plane, made without physics: to a goal, first up or first right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, embodiment_digest
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.panda import panda_embodiment

EMBODIMENT = panda_embodiment(cameras=())


def demonstration(
    goal: np.ndarray, style: str, rng: np.random.Generator, start: tuple[float, float] = (0, 0), step: float = 0.1
) -> Arrays:
    """Steps of ``step`` towards ``goal`` (2,), both axes at most 1 apart; ``object_state`` holds the goal."""
    place, proprio, actions = np.array(start, float), [], []
    order = {"up_right": (1, 0), "right_up": (0, 1)}[style]
    while (left := np.abs(goal - place) > 0.051).any() and len(actions) * step < 6:
        axis = next(axis for axis in order if left[axis])
        action = np.zeros(7, np.float32)
        action[axis] = np.sign(goal[axis] - place[axis])
        action[:2] += rng.normal(0, 0.03, 2)
        proprio.append([*place, *np.zeros(18)])
        actions.append(np.clip(action, -1, 1))
        place = place + step * actions[-1][:2]
    steps = len(actions)
    state = np.zeros((steps, 7), np.float32)
    state[:, :2] = goal
    return {
        "actions": np.array(actions, np.float32), "rewards": np.zeros(steps, np.float32),
        "dones": np.zeros(steps, np.int8), "states": np.zeros((steps, 0)),
        "obs/proprio": np.array(proprio, np.float32), "obs/object_state": state,
    }  # fmt: skip


def plane_dataset(
    path: Path,
    styles: list[str],
    *,
    seed: int = 0,
    start: tuple[float, float] = (0, 0),
    extra: dict[str, Any] | None = None,
    step: float = 0.1,
    task: str = "plane",
) -> Dataset:
    """One episode per entry of ``styles``, with goals up and right of the start."""
    with DatasetWriter(path, EMBODIMENT, {task: {"name": task}}) as writer:
        for number, style in enumerate(styles):
            rng = np.random.default_rng([seed, number])
            goal = np.asarray(start) + rng.uniform(0.6, 1.0, 2)
            info = EpisodeInfo(
                task=task, seed=1000 * seed + number, success=True, operator=style, source="expert",
                embodiment=embodiment_digest(EMBODIMENT), extra=extra or {},
            )  # fmt: skip
            writer.add(demonstration(goal, style, rng, start, step), info)
    return Dataset.open(path)
