"""Gymnasium ids ``simtoreal/<Task>-v0`` and the constructors used throughout the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym

from simtoreal.envs.task_file import list_tasks

if TYPE_CHECKING:
    from simtoreal.envs.tabletop import TabletopEnv
    from simtoreal.envs.tabletop_vector import TabletopVectorEnv


def gym_id(task: str) -> str:
    """Gymnasium id of a shipped task, e.g. ``simtoreal/PickPlace-v0``."""
    return f"simtoreal/{''.join(word.capitalize() for word in task.split('_'))}-v0"


def register_tasks() -> None:
    """Register every shipped task, once."""
    for task in list_tasks():
        if gym_id(task) not in gym.registry:
            gym.register(
                id=gym_id(task),
                entry_point="simtoreal.envs.tabletop:TabletopEnv",
                vector_entry_point="simtoreal.envs.registration:make_gym_vector",
                kwargs={"task": task},
            )


def make_env(task: Any, **options: Any) -> TabletopEnv:
    """Return one simulation; options as in :class:`TabletopEnv`."""
    from simtoreal.envs.tabletop import TabletopEnv

    return TabletopEnv(task, **options)


def make_vector_env(task: Any, num_envs: int, **options: Any) -> TabletopVectorEnv:
    """Return ``num_envs`` simulations; options as in :class:`TabletopVectorEnv`."""
    from simtoreal.envs.tabletop_vector import TabletopVectorEnv

    return TabletopVectorEnv(task, num_envs, **options)


def make_gym_vector(task: Any, num_envs: int = 1, **options: Any) -> TabletopVectorEnv:
    """Constructor behind ``gym.make_vec``, whose users expect environments that reset themselves."""
    from gymnasium.vector import AutoresetMode

    options.setdefault("autoreset_mode", AutoresetMode.NEXT_STEP)
    options.pop("render_mode", None)
    return make_vector_env(task, num_envs, **options)
