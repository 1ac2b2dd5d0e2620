"""The frozen description of a robot that datasets, checkpoints and environments must agree on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from simtoreal.envs.errors import ConfigError, EmbodimentMismatchError, closest

# The simulation takes ``ee_delta``; the ROS 2 environment (``robot/ros2_env.py``) also ``ee_abs``. ``env`` is whatever
# a foreign environment takes (``envs/gymnasium_env.py``).
ACTION_MODES = ("ee_delta", "ee_abs", "env")
# ``foreign``: drawn by somebody else's program or taken by a real camera that we know nothing about.
RENDER_PROFILES = ("fast", "high", "foreign")

# Arms that the simulation can build (``envs/panda.py``): number of joints, and bodies that a camera can be mounted on.
SIMULATED_ARMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "panda": (7, ("world", *(f"link{index}" for index in range(1, 8)), "hand", "left_finger", "right_finger")),
}

# Absolute end-effector target as it is recorded at every step and understood by the mode ``ee_abs``.
TARGET_NAMES = (
    "target_x", "target_y", "target_z",
    "target_r11", "target_r21", "target_r31", "target_r12", "target_r22", "target_r32",
    "target_gripper",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ActionSpec:
    """Action space: float32 in [-1, 1] per dimension for ``ee_delta``.

    Attributes:
        mode: ``ee_delta`` (displacement of the end-effector *target*, base frame); on ROS 2 robots only, ``ee_abs``
            (see ``TARGET_NAMES``); or ``env``, the native action of a foreign environment, of which nothing but
            the number of dimensions is known.
        names: one name per dimension.
        units: unit of each dimension after scaling.
        limits: physical value of 1.0 per dimension (metres or radians per control step; 1 for the gripper, and
            everywhere in the mode ``env``).
    """

    mode: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    limits: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.mode not in ACTION_MODES:
            raise ValueError(f"action mode '{self.mode}' is not one of {ACTION_MODES}")
        if not len(self.names) == len(self.units) == len(self.limits):
            raise ValueError("action names, units and limits must have the same length")
        if self.mode == "env" and any(limit != 1.0 for limit in self.limits):
            raise ValueError("action limits of the mode 'env' must be 1: its actions are stored as they are")

    @property
    def dim(self) -> int:
        """Number of action dimensions."""
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class ProprioSpec:
    """Names and units of the ``proprio`` observation, in order."""

    names: tuple[str, ...]
    units: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Number of proprio dimensions."""
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class CameraSpec:
    """A pinhole camera.

    Attributes:
        name: the observation key is ``<name>_image``.
        height, width: pixels.
        fov_y_deg: vertical field of view; square pixels, principal point in the centre. 0 if it is not known.
        mount: ``"world"`` (robot base frame), a body of the robot, e.g. ``"hand"``, or ``"unknown"``.
        position_m: position in the mount frame.
        quaternion_wxyz: orientation in the mount frame; the camera looks along its -z, +y is up in the image.
    """

    name: str
    height: int
    width: int
    fov_y_deg: float
    mount: str
    position_m: tuple[float, float, float]
    quaternion_wxyz: tuple[float, float, float, float]

    @property
    def intrinsics(self) -> tuple[float, float, float, float]:
        """Pinhole ``(fx, fy, cx, cy)`` in pixels.

        Raises:
            ConfigError: the field of view is not known.
        """
        if self.fov_y_deg <= 0:
            raise ConfigError(f"the field of view of camera '{self.name}' is not known; calibrate it first")
        focal = 0.5 * self.height / math.tan(math.radians(self.fov_y_deg) / 2)
        return focal, focal, self.width / 2, self.height / 2


@dataclass(frozen=True, kw_only=True)
class Embodiment:
    """Robot, cameras, action space and rate. Stored in every dataset and checkpoint and compared on load.

    Attributes:
        name: robot name, e.g. ``"panda"``.
        control_hz: rate of ``env.step``.
        action, proprio, cameras: see their classes.
        home_joint_positions_rad: arm configuration at reset; empty if it is not known.
        workspace_low_m, workspace_high_m: box that the end-effector target stays in, base frame; both empty if
            there is none, which the action modes with an end-effector target do not allow.
        gripper_max_opening_m: distance between the fingers when fully open; 0 if it is not known.
        render_profile: how simulated images are drawn; pixels differ between profiles.

    Raises:
        ConfigError: the control rate is not a positive number, or the workspace is no box.
        ValueError: another field is wrong.
    """

    name: str
    control_hz: float
    action: ActionSpec
    proprio: ProprioSpec
    cameras: tuple[CameraSpec, ...]
    home_joint_positions_rad: tuple[float, ...]
    workspace_low_m: tuple[float, ...]
    workspace_high_m: tuple[float, ...]
    gripper_max_opening_m: float
    render_profile: str = "fast"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.control_hz) and self.control_hz > 0):
            raise ConfigError(
                f"control_hz of embodiment '{self.name}' is {self.control_hz}; expected a positive number of steps per "
                "second"
            )
        if self.render_profile not in RENDER_PROFILES:
            raise ValueError(f"render profile '{self.render_profile}' is not one of {RENDER_PROFILES}")
        names = [camera.name for camera in self.cameras]
        if len(set(names)) < len(names):
            raise ValueError(f"cameras are {', '.join(names)}; expected distinct names")
        sizes = {len(self.workspace_low_m), len(self.workspace_high_m)}
        if sizes != {3} and (sizes != {0} or self.action.mode != "env"):
            raise ValueError("workspace_low_m and workspace_high_m must hold x, y, z (or nothing in the mode 'env')")
        for low, high in zip(self.workspace_low_m, self.workspace_high_m, strict=True):
            if not -math.inf < low <= high < math.inf:
                raise ConfigError(
                    f"workspace of embodiment '{self.name}' is {self.workspace_low_m} to {self.workspace_high_m}; "
                    "expected finite metres, low <= high for each of x, y, z"
                )

    @property
    def control_period_s(self) -> float:
        """Duration of one ``env.step`` in seconds."""
        return 1.0 / self.control_hz

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Observation keys of the cameras, e.g. ``("front_image", "wrist_image")``."""
        return tuple(f"{camera.name}_image" for camera in self.cameras)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-compatible dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Embodiment:
        """Inverse of :meth:`to_dict`; accepts lists where tuples are expected (JSON, yaml).

        Raises:
            EmbodimentMismatchError: a field is missing or unknown.
        """

        def frozen(value: Any) -> Any:
            return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value

        try:
            fields = {key: frozen(value) for key, value in content.items()}
            fields["action"] = ActionSpec(**{k: frozen(v) for k, v in content["action"].items()})
            fields["proprio"] = ProprioSpec(**{k: frozen(v) for k, v in content["proprio"].items()})
            fields["cameras"] = tuple(
                CameraSpec(**{k: frozen(v) for k, v in camera.items()}) for camera in content["cameras"]
            )
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise EmbodimentMismatchError(
                f"stored embodiment is incomplete or from another version: {error}"
            ) from error

    def differences(self, other: Embodiment) -> list[str]:
        """Return one line ``field: mine != theirs`` per differing leaf field."""

        def walk(prefix: str, mine: Any, theirs: Any) -> list[str]:
            if isinstance(mine, dict) and isinstance(theirs, dict):
                keys = [*mine, *(key for key in theirs if key not in mine)]
                return [
                    line
                    for key in keys
                    for line in walk(f"{prefix}.{key}" if prefix else key, mine.get(key), theirs.get(key))
                ]
            sequences = isinstance(mine, list | tuple) and isinstance(theirs, list | tuple)
            if sequences and (mine or theirs) and all(isinstance(item, dict) for item in (*mine, *theirs)):
                a, b = ({item["name"]: item for item in side} for side in (mine, theirs))
                order = [f"{prefix}: {', '.join(a) or 'none'} != {', '.join(b) or 'none'}"] if [*a] != [*b] else []
                return order + [line for name in a if name in b for line in walk(f"{prefix}.{name}", a[name], b[name])]
            if sequences:
                mine, theirs = list(mine), list(theirs)
            return [] if mine == theirs else [f"{prefix}: {mine} != {theirs}"]

        return walk("", self.to_dict(), other.to_dict())

    def require_simulated(self) -> None:
        """Raise unless the simulation can build this robot; a real or a foreign one need not be.

        Raises:
            ConfigError: unknown arm, a home of another number of joints, or a camera on a body that the arm has not.
        """
        if self.name not in SIMULATED_ARMS:
            raise ConfigError(
                f"robot '{self.name}' cannot be simulated. {closest(self.name, SIMULATED_ARMS)} CONTRIBUTING.md says "
                "what a further arm needs."
            )
        (joints, mounts), given = SIMULATED_ARMS[self.name], len(self.home_joint_positions_rad)
        if given != joints:
            raise ConfigError(
                f"home_joint_positions_rad of embodiment '{self.name}' has {given} values; expected {joints}, "
                "one per joint"
            )
        for camera in self.cameras:
            if camera.mount not in mounts:
                raise ConfigError(
                    f"camera '{camera.name}' of embodiment '{self.name}' is mounted on '{camera.mount}', which cannot "
                    f"be simulated. {closest(camera.mount, mounts)}"
                )

    def require_equal(self, other: Embodiment, mine: str, theirs: str) -> None:
        """Raise unless both embodiments agree in every field.

        Args:
            other: the embodiment to compare with.
            mine, theirs: what the two belong to, for the message (e.g. ``"checkpoint RUN"``).

        Raises:
            EmbodimentMismatchError: lists every differing field.
        """
        lines = self.differences(other)
        if lines:
            listed = "\n  ".join(lines)
            raise EmbodimentMismatchError(
                f"{mine} and {theirs} describe different embodiments ({len(lines)} fields differ, "
                f"{mine} != {theirs}):\n  {listed}\n"
                "Use data, checkpoint and environment made with the same robot, cameras, rate and render profile."
            )
