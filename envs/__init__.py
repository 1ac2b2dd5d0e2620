"""Environments: the one interface, task specifications, robots and the MuJoCo backend.

Importing this package registers the Gymnasium ids ``simtoreal/<Task>-v0``; MuJoCo itself is loaded when an
environment is made.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.registration import gym_id, make_env, make_vector_env, register_tasks
from simtoreal.envs.rollout import Actor, EpisodeResult, Listener, Step, rollout
from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import list_tasks, load_task

if TYPE_CHECKING:
    from simtoreal.envs.panda import panda_embodiment

__all__ = [
    "Actor", "Embodiment", "EpisodeResult", "Listener", "Step", "TaskSpec", "gym_id", "list_tasks", "load_task",
    "make_env", "make_vector_env", "panda_embodiment", "rollout",
]  # fmt: skip

if sys.platform == "linux":
    # MuJoCo chooses its OpenGL backend when it is imported; EGL works with and without a display or GPU.
    os.environ.setdefault("MUJOCO_GL", "egl")
register_tasks()


def __getattr__(name: str) -> Any:
    # The robot module needs mujoco, which listing tasks or reading a dataset does not.
    if name == "panda_embodiment":
        from simtoreal.envs.panda import panda_embodiment

        return panda_embodiment
    raise AttributeError(f"module 'simtoreal.envs' has no attribute '{name}'")
