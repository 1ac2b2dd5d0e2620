"""Names, types and quality of service of everything on the ROS 2 graph, read from one yaml file."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from simtoreal.envs.config import load_config
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, closest, require
from simtoreal.robot.gate_limits import MotionLimits

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
# Nothing but the types that the code on both ends reads and writes is accepted.
TOPIC_TYPES = {
    "joint_states": "sensor_msgs/msg/JointState",
    "target_pose": "geometry_msgs/msg/PoseStamped",
    "joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    "gripper_command": "std_msgs/msg/Float64",
    "estop": "std_msgs/msg/Bool",
    "gate_status": "std_msgs/msg/String",
    "twin_command": "std_msgs/msg/String",
    "twin_truth": "std_msgs/msg/String",
}
# Larger domains have no UDP ports left on Linux.
MAX_DOMAIN_ID = 232
DISCOVERY_RANGES = ("SUBNET", "LOCALHOST", "OFF", "SYSTEM_DEFAULT")
_ROS_NAME = re.compile(r"(/[A-Za-z_][A-Za-z0-9_]*)+")


def _check_ros_name(name: str, key: str) -> None:
    if not _ROS_NAME.fullmatch(name):
        raise ValueError(
            f"{key} '{name}' is not an absolute ROS name; expected e.g. /joint_states (letters, digits, _)"
        )


@dataclass(frozen=True, kw_only=True)
class Topic:
    """One topic.

    Attributes:
        name: absolute ROS name, e.g. ``/joint_states``.
        type: interface name, e.g. ``sensor_msgs/msg/JointState``.
        reliability: ``reliable`` or ``best_effort``.
        depth: samples kept in the queue.
    """

    name: str
    type: str
    reliability: Literal["reliable", "best_effort"]
    depth: int

    def __post_init__(self) -> None:
        _check_ros_name(self.name, "topic")
        if self.depth < 1:
            raise ValueError(f"depth of {self.name} is {self.depth}; expected at least 1")

    def message_class(self) -> Any:
        """Python class of the message.

        Raises:
            MissingDependencyError: the message package is not installed.
        """
        package, kind, name = self.type.split("/")
        return getattr(require(f"{package}.{kind}", "ros", package=package), name)

    def qos(self) -> Any:
        """``rclpy.qos.QoSProfile`` for publishers and subscriptions of this topic (volatile, keep last)."""
        from rclpy.qos import QoSProfile, ReliabilityPolicy

        policy = ReliabilityPolicy.RELIABLE if self.reliability == "reliable" else ReliabilityPolicy.BEST_EFFORT
        return QoSProfile(depth=self.depth, reliability=policy)

    def require_type(self, *types: str) -> None:
        """Raise ``ValueError`` unless the topic carries one of ``types``."""
        if self.type not in types:
            raise ValueError(f"type of {self.name} is '{self.type}'. {closest(self.type, types)}")


@dataclass(frozen=True, kw_only=True)
class Topics:
    """Topics that are not cameras; see ``configs/robot/panda_ros2.yaml``."""

    joint_states: Topic
    target_pose: Topic
    joint_trajectory: Topic
    gripper_command: Topic
    estop: Topic
    gate_status: Topic
    twin_command: Topic
    twin_truth: Topic

    def __post_init__(self) -> None:
        for name, expected in TOPIC_TYPES.items():
            getattr(self, name).require_type(expected)


@dataclass(frozen=True, kw_only=True)
class Services:
    """Names of the ``std_srvs/srv/Trigger`` services."""

    gate_rearm: str
    twin_reset: str

    def __post_init__(self) -> None:
        _check_ros_name(self.gate_rearm, "gate_rearm")
        _check_ros_name(self.twin_reset, "twin_reset")


@dataclass(frozen=True, kw_only=True)
class CameraTopics:
    """Topics of one camera.

    Attributes:
        image: raw or compressed image topic.
        camera_info: intrinsics, or None when the driver has none.
        frame: optical frame id of the stamps.
        width, height: size the driver publishes in pixels, or None for the size in the embodiment.
    """

    image: Topic
    camera_info: Topic | None
    frame: str
    width: int | None
    height: int | None

    def __post_init__(self) -> None:
        self.image.require_type(*IMAGE_TYPES)
        if self.camera_info is not None:
            self.camera_info.require_type("sensor_msgs/msg/CameraInfo")
        if (self.width is None) != (self.height is None) or min(self.width or 1, self.height or 1) < 1:
            raise ValueError("width and height must both be positive, or both null")


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """When inputs count as dead.

    Attributes:
        joint_states_s, camera_s: age in seconds after which an input is stale and the robot holds.
        stop_s: seconds of holding after which the episode is given up.
        frozen_frames: identical images in a row, with advancing stamps while the arm moves, that mean frozen.
    """

    joint_states_s: float
    camera_s: float
    stop_s: float
    frozen_frames: int

    def __post_init__(self) -> None:
        for name in ("joint_states_s", "camera_s", "stop_s", "frozen_frames"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class RobotConfig:
    """A robot on the ROS 2 graph.

    Attributes:
        robot: ``Embodiment.name`` of the arm.
        base_frame, tool_frame: frame ids of commanded poses.
        joint_names: arm joints in kinematic order, as named in ``/joint_states``.
        finger_joint_names: joints whose mean gives the gripper opening.
        finger_closed, finger_open: their position when closed and open.
        command: topic that moves the arm.
        topics, services, cameras, staleness: see their classes; cameras by name.
        limits: motion limits of the safety gate, where they differ from the defaults.
        require_estop: a real robot only starts while somebody publishes its emergency stop.
    """

    robot: str
    base_frame: str
    tool_frame: str
    joint_names: tuple[str, ...]
    finger_joint_names: tuple[str, ...]
    finger_closed: float
    finger_open: float
    command: Literal["target_pose", "joint_trajectory"]
    topics: Topics
    services: Services
    cameras: dict[str, CameraTopics]
    staleness: Staleness
    limits: MotionLimits = field(default_factory=MotionLimits)
    require_estop: bool = True

    def __post_init__(self) -> None:
        names = (*self.joint_names, *self.finger_joint_names)
        if not self.joint_names or not self.finger_joint_names or len(set(names)) != len(names):
            raise ValueError(f"joint_names and finger_joint_names need distinct names, found {list(names)}")
        if not 0 < abs(self.finger_open - self.finger_closed) < float("inf"):
            raise ValueError(
                f"finger_open and finger_closed are {self.finger_open} and {self.finger_closed}; "
                "expected two different finite numbers"
            )
        taken: dict[str, str] = {}
        for key, topic in self._topics():
            if topic.name in taken:
                raise ValueError(f"{taken[topic.name]} and {key} are both '{topic.name}'; topics need distinct names")
            taken[topic.name] = key

    def _topics(self) -> Iterator[tuple[str, Topic]]:
        for name in TOPIC_TYPES:
            yield f"topics.{name}", getattr(self.topics, name)
        for name, camera in self.cameras.items():
            yield f"cameras.{name}.image", camera.image
            if camera.camera_info is not None:
                yield f"cameras.{name}.camera_info", camera.camera_info

    def require_fits(self, embodiment: Embodiment, source: str | Path) -> None:
        """Refuse an embodiment that this robot is not.

        Args:
            embodiment: what is going to act or be recorded.
            source: the robot yaml, for messages.

        Raises:
            ConfigError: another robot, another number of joints, or a camera is missing.
        """
        if embodiment.name != self.robot:
            raise ConfigError(f"{source} describes '{self.robot}', the embodiment is '{embodiment.name}'")
        needed = len(embodiment.home_joint_positions_rad)
        if len(self.joint_names) != needed:
            raise ConfigError(
                f"{source}: key 'joint_names' has {len(self.joint_names)} joints, '{embodiment.name}' has {needed}"
            )
        for camera in embodiment.cameras:
            if camera.name not in self.cameras:
                raise ConfigError(
                    f"{source}: key 'cameras' has no camera '{camera.name}', which the embodiment needs. "
                    f"{closest(camera.name, self.cameras)}"
                )


def load_robot_config(name: str | Path = "panda_ros2") -> RobotConfig:
    """Read a robot description.

    Args:
        name: name of a shipped preset (``configs/robot/<name>.yaml``) or path of a yaml file.

    Raises:
        ConfigError: unknown preset, unreadable yaml, unknown or missing key, wrong type or value.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return load_config(RobotConfig, Path(name))
    folder = importlib.resources.files("simtoreal.configs.robot")
    presets = {entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith("_ros2.yaml")}
    if str(name) not in presets:
        raise ConfigError(f"unknown robot '{name}'. {closest(str(name), presets)} Or give the path of a .yaml file.")
    with importlib.resources.as_file(folder / f"{name}.yaml") as path:
        return load_config(RobotConfig, path)


def check_ros_environment() -> None:
    """Raise ``ConfigError`` if ``ROS_DOMAIN_ID`` or ``ROS_AUTOMATIC_DISCOVERY_RANGE`` is not valid."""
    domain = os.environ.get("ROS_DOMAIN_ID", "")
    if domain and not (domain.isascii() and domain.isdigit() and int(domain) <= MAX_DOMAIN_ID):
        raise ConfigError(
            f"ROS_DOMAIN_ID is '{domain}'; expected a whole number from 0 to {MAX_DOMAIN_ID}. Export another one, "
            "the same as the robot's, or unset it for 0."
        )
    reach = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "")
    if reach and reach not in DISCOVERY_RANGES:
        raise ConfigError(f"ROS_AUTOMATIC_DISCOVERY_RANGE is '{reach}'. {closest(reach, DISCOVERY_RANGES)}")


def ros_graph() -> str:
    """Name the ROS graph of this process, for messages about what is not found on it."""
    domain = os.environ.get("ROS_DOMAIN_ID") or "0"
    return f"ROS_DOMAIN_ID {domain} (discovery {os.environ.get('ROS_AUTOMATIC_DISCOVERY_RANGE') or 'LOCALHOST'})"


def start_ros() -> Any:
    """Return a new ``rclpy`` context, discovering only this machine unless the environment says otherwise.

    Every node of ours gets its own context, so that several can live in one process and stop one by one.

    Raises:
        ConfigError: a ROS variable of the environment is not valid.
        MissingDependencyError: rclpy cannot be imported.
    """
    check_ros_environment()
    # DDS would otherwise greet every host of the local network, and any of them could move the arm.
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    require("rclpy", "ros")
    from rclpy.context import Context

    context = Context()
    context.init(args=[])
    return context
