"""Gymnasium ids ``simtoreal/<Task>-v0``, those of other packages, and the constructors used throughout the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym

from simtoreal.envs.errors import ConfigError
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
    """Constructor behind ``gym.make_vec``, whose users expect environments that reset themselves.

    Raises:
        ConfigError: a ``render_mode`` is asked for, which only single environments have.
    """
    from gymnasium.vector import AutoresetMode

    options.setdefault("autoreset_mode", AutoresetMode.NEXT_STEP)
    if (mode := options.pop("render_mode", None)) is not None:
        raise ConfigError(
            f"render_mode '{mode}' is for single environments (gymnasium.make); the pictures of a batch are its "
            "observations"
        )
    return make_vector_env(task, num_envs, **options)


def find_spec(env_id: str) -> Any:
    """Return the registration of a Gymnasium id, importing the packages that might provide it.

    Raises:
        ConfigError: no installed package registers it.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        _import_environments(module, required=True)
    candidates = [] if module else _packages_of_environments()
    while name not in gym.registry and candidates:
        _import_environments(candidates.pop(0), required=False)
    if name not in gym.registry:
        import difflib

        similar = difflib.get_close_matches(name, list(gym.registry), n=3)
        hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
        raise ConfigError(
            f"no installed package registers the Gymnasium environment '{env_id}'.{hint} "
            "Install the package that has it, or name its module: --env module:Id-v0"
        )
    return gym.spec(name)


def _import_environments(module: str, *, required: bool) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except Exception as error:  # A broken package that is not needed must not be in the way.
        if required:
            raise ConfigError(f"--env: module '{module}' cannot be imported ({error!r})") from error


def _packages_of_environments() -> list[str]:
    """Top-level modules of installed packages that need gymnasium, except our own."""
    import importlib.metadata
    import re

    needing = {
        distribution.metadata["Name"]
        for distribution in importlib.metadata.distributions()
        for requirement in distribution.requires or ()
        if re.match(r"gymnasium\b(?!-)", requirement) and "extra ==" not in requirement
    }
    modules = importlib.metadata.packages_distributions()
    return sorted(
        module
        for module, owners in modules.items()
        if needing & set(owners) and module.isidentifier() and module != "simtoreal"
    )
