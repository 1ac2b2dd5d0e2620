"""Names, types and quality of service of everything on the ROS 2 graph, read from one yaml file."""

from __future__ import annotations

import importlib
import importlib.resources
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from simtoreal.envs.errors import ConfigError, closest, require

COMMANDS = ("target_pose", "joint_trajectory")
RELIABILITIES = ("reliable", "best_effort")
IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CAMERA_INFO_TYPES = ("sensor_msgs/msg/CameraInfo",)
# Nothing but the types that the code on both ends reads and writes is accepted.
TOPIC_TYPES = {
    "joint_states": ("sensor_msgs/msg/JointState",),
    "target_pose": ("geometry_msgs/msg/PoseStamped",),
    "joint_trajectory": ("trajectory_msgs/msg/JointTrajectory",),
    "gripper_command": ("std_msgs/msg/Float64",),
    "estop": ("std_msgs/msg/Bool",),
    "gate_status": ("std_msgs/msg/String",),
    "twin_command": ("std_msgs/msg/String",),
    "twin_truth": ("std_msgs/msg/String",),
}


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
    reliability: str
    depth: int

    def message_class(self) -> type:
        """Python class of the message.

        Raises:
            MissingDependencyError: the message package is not installed.
        """
        package, kind, name = self.type.split("/")
        return getattr(require(f"{package}.{kind}", "ros", package=package), name)  # type: ignore[no-any-return]

    def qos(self) -> Any:
        """``rclpy.qos.QoSProfile`` for publishers and subscriptions of this topic (volatile, keep last)."""
        from rclpy.qos import QoSProfile, ReliabilityPolicy

        policy = ReliabilityPolicy.RELIABLE if self.reliability == "reliable" else ReliabilityPolicy.BEST_EFFORT
        return QoSProfile(depth=self.depth, reliability=policy)


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


@dataclass(frozen=True, kw_only=True)
class Services:
    """Names of the ``std_srvs/srv/Trigger`` services."""

    gate_rearm: str
    twin_reset: str


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


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """Ages in seconds after which an input is stale, and when holding becomes giving up."""

    joint_states_s: float
    camera_s: float
    stop_s: float
    frozen_frames: int


@dataclass(frozen=True, kw_only=True)
class RobotConfig:
    """A robot on the ROS 2 graph.

    Attributes:
        robot: ``Embodiment.name`` of the arm.
        base_frame, tool_frame: frame ids of commanded poses.
        joint_names: arm joints in kinematic order, as named in ``/joint_states``.
        finger_joint_names: joints whose mean gives the gripper opening.
        finger_closed, finger_open: their position when closed and open.
        command: topic that moves the arm, ``target_pose`` or ``joint_trajectory``.
        topics, services, cameras, staleness: see their classes; cameras by name.
    """

    robot: str
    base_frame: str
    tool_frame: str
    joint_names: tuple[str, ...]
    finger_joint_names: tuple[str, ...]
    finger_closed: float
    finger_open: float
    command: str
    topics: Topics
    services: Services
    cameras: dict[str, CameraTopics]
    staleness: Staleness


def load_robot_config(name: str | Path = "panda_ros2") -> RobotConfig:
    """Read a robot description.

    Args:
        name: name of a shipped preset (``configs/robot/<name>.yaml``) or path of a yaml file.

    Raises:
        ConfigError: unknown preset, unreadable yaml, unknown or missing key, wrong type or value.
    """
    import yaml

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        where = str(path)
        try:
            text = path.read_text()
        except OSError as error:
            raise ConfigError(f"cannot read the robot description {path}: {error.strerror}") from error
    else:
        folder = importlib.resources.files("simtoreal.configs.robot")
        presets = {entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith("_ros2.yaml")}
        if str(name) not in presets:
            raise ConfigError(
                f"unknown robot '{name}'. {closest(str(name), presets)} Or give the path of a .yaml file."
            )
        where = f"configs/robot/{name}.yaml"
        text = (folder / f"{name}.yaml").read_text()
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid yaml: {error}") from error
    return _Reader(where).robot(content)


class _Reader:
    """Turns plain yaml content into :class:`RobotConfig`, naming file and key in every complaint."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, key: str, message: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key or 'the file'}: {message}")

    def mapping(self, value: Any, key: str, names: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(key, f"expected a mapping, found {type(value).__name__}")
        for name in value:
            if name not in names:
                raise self.fail(key, f"unknown key '{name}'. {closest(str(name), names)}")
        missing = [name for name in names if name not in value]
        if missing:
            raise self.fail(key, f"missing key '{missing[0]}'")
        return value

    def text(self, value: Any, key: str, options: tuple[str, ...] | None = None) -> str:
        if not isinstance(value, str) or not value:
            raise self.fail(key, f"expected a text, found {value!r}")
        if options is not None and value not in options:
            raise self.fail(key, f"'{value}' is not accepted here. {closest(value, options)}")
        return value

    def ros_name(self, value: Any, key: str) -> str:
        name = self.text(value, key)
        parts = name.split("/")[1:]
        good = name.startswith("/") and all(
            part.isascii() and part.replace("_", "a").isalnum() and not part[0].isdigit() for part in parts if part
        )
        if not good or not all(parts):
            raise self.fail(
                key, f"'{name}' is not an absolute ROS name; expected e.g. /joint_states (letters, digits, _)"
            )
        return name

    def number(self, value: Any, key: str, low: float = -math.inf) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(key, f"expected a finite number, found {value!r}")
        if value <= low:
            raise self.fail(key, f"expected a number above {low:g}, found {value}")
        return float(value)

    def count(self, value: Any, key: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, f"expected a whole number of at least 1, found {value!r}")
        return value

    def names(self, value: Any, key: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            raise self.fail(key, f"expected a list of joint names, found {value!r}")
        names = tuple(self.text(item, f"{key}[{index}]") for index, item in enumerate(value))
        if len(set(names)) != len(names):
            raise self.fail(key, f"a name appears twice in {list(names)}")
        return names

    def topic(self, value: Any, key: str, types: tuple[str, ...]) -> Topic:
        content = self.mapping(value, key, tuple(field.name for field in fields(Topic)))
        return Topic(
            name=self.ros_name(content["name"], f"{key}.name"),
            type=self.text(content["type"], f"{key}.type", types),
            reliability=self.text(content["reliability"], f"{key}.reliability", RELIABILITIES),
            depth=self.count(content["depth"], f"{key}.depth"),
        )

    def camera(self, value: Any, key: str) -> CameraTopics:
        content = self.mapping(value, key, tuple(field.name for field in fields(CameraTopics)))
        info, width, height = content["camera_info"], content["width"], content["height"]
        if (width is None) != (height is None):
            raise self.fail(key, "give both width and height, or null for both")
        return CameraTopics(
            image=self.topic(content["image"], f"{key}.image", IMAGE_TYPES),
            camera_info=None if info is None else self.topic(info, f"{key}.camera_info", CAMERA_INFO_TYPES),
            frame=self.text(content["frame"], f"{key}.frame"),
            width=None if width is None else self.count(width, f"{key}.width"),
            height=None if height is None else self.count(height, f"{key}.height"),
        )

    def robot(self, value: Any) -> RobotConfig:
        content = self.mapping(value, "", tuple(field.name for field in fields(RobotConfig)))
        topics = self.mapping(content["topics"], "topics", tuple(TOPIC_TYPES))
        services = self.mapping(content["services"], "services", tuple(field.name for field in fields(Services)))
        stale = self.mapping(content["staleness"], "staleness", tuple(field.name for field in fields(Staleness)))
        cameras = content["cameras"]
        if not isinstance(cameras, dict):
            raise self.fail("cameras", f"expected a mapping of camera names, found {type(cameras).__name__}")
        config = RobotConfig(
            robot=self.text(content["robot"], "robot"),
            base_frame=self.text(content["base_frame"], "base_frame"),
            tool_frame=self.text(content["tool_frame"], "tool_frame"),
            joint_names=self.names(content["joint_names"], "joint_names"),
            finger_joint_names=self.names(content["finger_joint_names"], "finger_joint_names"),
            finger_closed=self.number(content["finger_closed"], "finger_closed"),
            finger_open=self.number(content["finger_open"], "finger_open"),
            command=self.text(content["command"], "command", COMMANDS),
            topics=Topics(**{name: self.topic(topics[name], f"topics.{name}", TOPIC_TYPES[name]) for name in topics}),
            services=Services(**{name: self.ros_name(services[name], f"services.{name}") for name in services}),
            cameras={str(name): self.camera(camera, f"cameras.{name}") for name, camera in cameras.items()},
            staleness=Staleness(
                joint_states_s=self.number(stale["joint_states_s"], "staleness.joint_states_s", 0.0),
                camera_s=self.number(stale["camera_s"], "staleness.camera_s", 0.0),
                stop_s=self.number(stale["stop_s"], "staleness.stop_s", 0.0),
                frozen_frames=self.count(stale["frozen_frames"], "staleness.frozen_frames"),
            ),
        )
        if config.finger_open == config.finger_closed:
            raise self.fail("finger_open", "must differ from finger_closed")
        return config


def start_ros() -> Any:
    """Return a new ``rclpy`` context, discovering only this machine unless the environment says otherwise.

    Every node of ours gets its own context, so that several can live in one process and stop one by one.

    Raises:
        MissingDependencyError: rclpy cannot be imported.
    """
    # DDS would otherwise greet every host of the local network, and any of them could move the arm.
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    require("rclpy", "ros")
    from rclpy.context import Context

    context = Context()
    context.init(args=[])
    return context
