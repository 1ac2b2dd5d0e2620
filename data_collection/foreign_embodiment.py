"""The description of a robot that we know only from its data: names, shapes and rate, and nothing made up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from simtoreal.envs.embodiment import ActionSpec, CameraSpec, Embodiment, ProprioSpec
from simtoreal.envs.errors import ConfigError

IMAGE_SUFFIX = "_image"
PROPRIO = "proprio"


def foreign_embodiment(
    *,
    name: str,
    control_hz: float,
    action_dim: int,
    action_names: Sequence[str] = (),
    observations: Mapping[str, tuple[int, ...]] | None = None,
) -> Embodiment:
    """Describe a foreign robot by what its data show.

    Actions are those of its own environment, unscaled (action mode ``env``). Observations keep their names; those of
    three dimensions are images of cameras of unknown calibration.

    Args:
        name: of the robot or of its environment.
        control_hz: rate of its control steps.
        action_dim: number of action dimensions.
        action_names: one per dimension; by default ``action_0`` and so on.
        observations: observation key -> shape of one step; image keys end in ``_image``.

    Raises:
        ConfigError: a value is out of range, names do not fit, or an image key has another ending or shape.
    """
    if not (math.isfinite(control_hz) and control_hz > 0):
        raise ConfigError(f"control rate {control_hz} Hz of '{name}' must be positive; give it with --control-hz")
    if action_dim < 1:
        raise ConfigError(f"'{name}' has {action_dim} action dimensions; expected at least 1")
    names = tuple(action_names) or tuple(f"action_{index}" for index in range(action_dim))
    if len(names) != action_dim or len(set(names)) != action_dim:
        raise ConfigError(f"'{name}' has {action_dim} action dimensions; the names {list(names)} do not fit them")
    shapes = dict(observations or {})
    width = shapes.get(PROPRIO, (0,))[0]
    return Embodiment(
        name=name,
        control_hz=float(control_hz),
        action=ActionSpec(mode="env", names=names, units=("native",) * action_dim, limits=(1.0,) * action_dim),
        proprio=ProprioSpec(names=tuple(f"{PROPRIO}_{i}" for i in range(width)), units=("native",) * width),
        cameras=tuple(_camera(key, shape) for key, shape in shapes.items() if len(shape) == 3),
        home_joint_positions_rad=(),
        workspace_low_m=(),
        workspace_high_m=(),
        gripper_max_opening_m=0.0,
        render_profile="foreign",
    )


def foreign_task(name: str, *, env_id: str = "", instruction: str = "") -> dict[str, Any]:
    """Return the description of a task that exists outside simtoreal, to be stored as a dataset's task.

    Args:
        name: of the task.
        env_id: Gymnasium id of the environment that the data come from, if there is one.
        instruction: what to do, in words.
    """
    return {"name": name, "foreign": True, "env_id": env_id, "instruction": instruction}


def is_foreign_task(task: Mapping[str, Any]) -> bool:
    """Whether a stored task was made by :func:`foreign_task`, so that it cannot be simulated here."""
    return bool(task.get("foreign", False))


def _camera(key: str, shape: tuple[int, ...]) -> CameraSpec:
    camera = key.removesuffix(IMAGE_SUFFIX)
    if not key.endswith(IMAGE_SUFFIX) or not camera or shape[2] != 3:
        raise ConfigError(
            f"observation '{key}' of shape {shape} is not an image that we can use; "
            f"expected a name that ends in '{IMAGE_SUFFIX}' and the shape (height, width, 3)"
        )
    return CameraSpec(
        name=camera, height=shape[0], width=shape[1], fov_y_deg=0.0, mount="unknown",
        position_m=(0.0, 0.0, 0.0), quaternion_wxyz=(1.0, 0.0, 0.0, 0.0),
    )  # fmt: skip
