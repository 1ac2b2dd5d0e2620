"""What the robot tells us: newest joint states and images, checked before anybody uses them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simtoreal.envs.embodiment import CameraSpec, Embodiment
from simtoreal.envs.errors import RobotError, StaleObservationError
from simtoreal.robot.camera import FrozenCameraError
from simtoreal.robot.images import fit_image
from simtoreal.robot.stamp_clock import StampClock
from simtoreal.robot.stream_counter import FrameCounts, StreamCounter
from simtoreal.robot.topics import RobotConfig, Topic, ros_graph, start_ros

if TYPE_CHECKING:
    from simtoreal.robot.camera import Camera

# What one message on the joint states topic measures.
ARM_SENSORS = ("joint_states", "gripper")
# Sum of absolute joint motion since an image last changed that must have changed what the camera sees: some
# centimetres, as images may have few pixels.
MOVED_RAD = 0.2
# Less than this from one reading to the next is rest; at 0.05 m/s it is about three times as much.
RESTING_RAD = 0.002
# Encoders overshoot limits by little; degrees or millimetres overshoot by a lot.
JOINT_MARGIN_RAD = 0.15
FINGER_MARGIN = 0.25
# Fast DDS forgets a killed participant after 20 s; until then its publishers are still counted.
DISCOVERY_LEASE_S = 22.0
# Calibrations differ by a per cent or two between cameras of one type.
FOCAL_TOLERANCE = 0.05


@dataclass(frozen=True)
class Arm:
    """Measured arm state.

    Attributes:
        joint_positions_rad: ``(7,)`` in kinematic order.
        opening: gripper opening, 0 closed to 1 open.
        arrived_ns: monotonic time of arrival.
        capture_ns: monotonic time of measurement (see :class:`~simtoreal.robot.stamp_clock.StampClock`); that of
            arrival if the driver does not stamp its messages.
    """

    joint_positions_rad: np.ndarray
    opening: float
    arrived_ns: int
    capture_ns: int


class JointStates:
    """Reads ``sensor_msgs/JointState`` by name, in any order, and refuses what cannot be this arm in SI units."""

    def __init__(self, config: RobotConfig, joint_low_rad: np.ndarray, joint_high_rad: np.ndarray) -> None:
        self.topic = config.topics.joint_states.name
        self.names = (*config.joint_names, *config.finger_joint_names)
        self.arm_joints = len(config.joint_names)
        self.low, self.high = joint_low_rad - JOINT_MARGIN_RAD, joint_high_rad + JOINT_MARGIN_RAD
        self.closed, self.travel = config.finger_closed, config.finger_open - config.finger_closed
        self._order: tuple[tuple[str, ...], np.ndarray] | None = None

    def read(self, message: Any, arrived_ns: int, capture_ns: int | None = None) -> Arm:
        """Return the arm state in ``message``; without ``capture_ns`` it counts as measured when it arrived.

        Raises:
            RobotError: names are missing or doubled, lengths differ, or values are not finite or implausible.
        """
        positions = np.array(message.position, dtype=np.float64)
        names = tuple(message.name)
        if self._order is None or self._order[0] != names:
            self._order = names, self._find(names)
        if len(positions) != len(names):
            raise RobotError(f"{self.topic} has {len(names)} names but {len(positions)} positions")
        values = positions[self._order[1]]
        if not np.isfinite(values).all():
            bad = self.names[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise RobotError(f"{self.topic}: position of '{bad}' is not finite")
        arm = values[: self.arm_joints]
        outside = (arm < self.low) | (arm > self.high)
        if outside.any():
            index = int(np.flatnonzero(outside)[0])
            # Any of them: a joint near zero is a plausible number of degrees, too.
            hint = " Are these degrees? Radians are expected." if np.abs(arm).max() > 2 * np.pi else ""
            raise RobotError(
                f"{self.topic}: '{self.names[index]}' is at {arm[index]:.3f}, outside its limits "
                f"[{self.low[index] + JOINT_MARGIN_RAD:.3f}, {self.high[index] - JOINT_MARGIN_RAD:.3f}] rad.{hint}"
            )
        opening = float((values[self.arm_joints :].mean() - self.closed) / self.travel)
        if not -FINGER_MARGIN <= opening <= 1 + FINGER_MARGIN:
            raise RobotError(
                f"{self.topic}: the fingers are at {values[self.arm_joints :].tolist()}, far outside "
                f"[{self.closed}, {self.closed + self.travel}]. Are these millimetres, or is finger_open wrong?"
            )
        captured = arrived_ns if capture_ns is None else capture_ns
        return Arm(arm, min(max(opening, 0.0), 1.0), arrived_ns, captured)

    def _find(self, names: tuple[str, ...]) -> np.ndarray:
        missing = [name for name in self.names if name not in names]
        if missing:
            raise RobotError(
                f"{self.topic} lacks {missing}; it names {list(names)}. "
                "Set joint_names and finger_joint_names in the robot yaml to what the driver publishes."
            )
        doubled = [name for name in self.names if names.count(name) > 1]
        if doubled:
            raise RobotError(f"{self.topic} names {doubled} more than once")
        return np.array([names.index(name) for name in self.names])


@dataclass
class _Unchanged:
    """What is known since an image of a camera last changed: its ``sequence``, and where the arm was at first sight."""

    first: int
    joint_positions_rad: np.ndarray
    newest_rad: np.ndarray
    moved: bool = False
    frozen: bool = False

    def suspicious(self, joint_positions_rad: np.ndarray) -> bool:
        """Whether the next image has to be another one, now that the arm is at ``joint_positions_rad``.

        An arm that has left the picture and rests excuses an image that does not change. One that rests because the
        camera was found frozen does not.
        """
        resting = float(np.abs(joint_positions_rad - self.newest_rad).sum()) < RESTING_RAD
        self.newest_rad = joint_positions_rad
        self.moved |= float(np.abs(joint_positions_rad - self.joint_positions_rad).sum()) > MOVED_RAD
        return self.moved and (self.frozen or not resting)


@dataclass(frozen=True)
class Images:
    """Checked images.

    Attributes:
        images: by observation key.
        arrived_ns: when the oldest of them arrived (monotonic; now without cameras).
        capture_ns, receive_ns: when each was taken and arrived, by camera name (monotonic).
    """

    images: dict[str, np.ndarray]
    arrived_ns: int
    capture_ns: dict[str, int]
    receive_ns: dict[str, int]


class RobotInputs:
    """Node that keeps the newest message of every input; callbacks only decode, store and stamp.

    One single-threaded executor runs in one thread (rclpy's multi-threaded and events executors starve or hang).

    Args:
        config: topics.
        embodiment: cameras expected.
        joint_low_rad, joint_high_rad: ``(7,)`` limits of the arm.
        cameras: cameras read by this process (RealSense, USB) instead of from their image topics, by name; they stay
            the caller's to close.
        check_robot: called while the robot is silent; raises what is wrong with it.
        name: node name.
    """

    def __init__(
        self,
        config: RobotConfig,
        embodiment: Embodiment,
        joint_low_rad: np.ndarray,
        joint_high_rad: np.ndarray,
        cameras: Mapping[str, Camera] | None = None,
        check_robot: Callable[[], None] | None = None,
        name: str = "simtoreal_env",
    ) -> None:
        self.config = config
        self.embodiment = embodiment
        self.check_robot = check_robot or (lambda: None)
        self.joints = JointStates(config, joint_low_rad, joint_high_rad)
        self._lock = threading.Lock()
        self._newest: dict[str, tuple[Any, int]] = {}
        self._joint_clock, self._joint_frames = StampClock(), StreamCounter()
        self._joints: tuple[Any, int, int] | None = None
        self._unchanged: dict[str, _Unchanged] = {}
        self._context = start_ros()
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node

        from simtoreal.robot.camera_ros import RosCamera

        self.node = Node(name, context=self._context, use_global_arguments=False)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        joints = config.topics.joint_states
        self.node.create_subscription(joints.message_class(), joints.name, self._receive_joints, joints.qos())
        given = dict(cameras or {})
        self.cameras: dict[str, tuple[CameraSpec, Camera]] = {}
        self._topics_read = [config.topics.joint_states.name]
        for spec in embodiment.cameras:
            if spec.name in given:
                self.cameras[spec.name] = spec, given[spec.name]
                continue
            topics = config.cameras[spec.name]
            frozen = config.staleness.frozen_frames
            self.cameras[spec.name] = spec, RosCamera(spec.name, self.node, topics.image, frozen_frames=frozen)
            self._topics_read.append(topics.image.name)
            if topics.camera_info is not None:
                self.listen(f"{spec.name}_info", topics.camera_info)
        self._thread = threading.Thread(target=self._spin, name=name, daemon=True)
        self._thread.start()

    def listen(self, key: str, topic: Topic) -> None:
        """Keep the newest message of ``topic`` under ``key``."""

        def store(message: Any) -> None:
            with self._lock:
                self._newest[key] = message, time.monotonic_ns()

        self.node.create_subscription(topic.message_class(), topic.name, store, topic.qos())

    def _receive_joints(self, message: Any) -> None:
        arrived = time.monotonic_ns()
        stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        captured = self._joint_clock.to_monotonic(stamp, arrived) if stamp else arrived
        with self._lock:
            if self._joints is not None and captured <= self._joints[2]:
                # An old measurement sent again does not become a new one; if nothing else comes, it is stale.
                return
            self._joints = message, arrived, captured
        self._joint_frames.note(captured)

    def frame_counts(self) -> dict[str, FrameCounts]:
        """Frames by sensor since :meth:`restart_counts`."""
        cameras = {name: camera.frames.counts() for name, (_, camera) in self.cameras.items()}
        return dict.fromkeys(ARM_SENSORS, self._joint_frames.counts()) | cameras

    def restart_counts(self) -> None:
        """Count the frames of every sensor from zero."""
        self._joint_frames.restart()
        for _, camera in self.cameras.values():
            camera.frames.restart()

    def newest(self, key: str) -> tuple[Any, int] | None:
        """Newest message and its monotonic time of arrival, or None."""
        with self._lock:
            return self._newest.get(key)

    def read_arm(self, after_ns: int = 0) -> Arm:
        """Return the checked arm state.

        Args:
            after_ns: monotonic time; what arrived before does not count.

        Raises:
            StaleObservationError: silent topic.
            RobotError: see :class:`JointStates`.
        """
        with self._lock:
            found = self._joints
        name = self.config.topics.joint_states.name
        if found is None or found[1] < after_ns:
            raise StaleObservationError(f"nothing received on {name}")
        # By its stamp: a driver that sends old measurements again is as dead as one that is silent.
        age_s = (time.monotonic_ns() - found[2]) * 1e-9
        if age_s > self.config.staleness.joint_states_s:
            behind = (time.monotonic_ns() - found[1]) * 1e-9 <= self.config.staleness.joint_states_s
            why = "the last one was late, or the clock of its sender was set" if behind else "no newer one has come"
            raise StaleObservationError(
                f"no message on {name} for {age_s:.2f} s (by the stamps of the messages; {why})"
            )
        return self.joints.read(*found)

    def read_images(self, arm: Arm, after_ns: int = 0) -> Images:
        """Return the newest image of every camera, checked and in the embodiment's size.

        Args:
            arm: tells by its motion since an image last changed whether that is suspicious.
            after_ns: monotonic time; what arrived before does not count.

        Raises:
            StaleObservationError: silent, late or frozen camera, or only torn images.
            RobotError: images of another size than the robot yaml says.
        """
        images, captured, received = {}, {}, {}
        oldest = time.monotonic_ns()
        for name, (spec, camera) in self.cameras.items():
            since, joints = self._unchanged.get(name), arm.joint_positions_rad
            suspicious = since is not None and since.suspicious(joints)
            try:
                frame = camera.read(self.config.staleness.camera_s, moving=suspicious)
            except FrozenCameraError:
                if since is not None:
                    since.frozen = True
                raise
            first = frame.sequence - frame.identical
            if since is None or since.first != first:
                self._unchanged[name] = _Unchanged(first, joints, joints)
            if frame.receive_ns < after_ns:
                raise StaleObservationError(f"camera '{name}' has delivered no image yet")
            self._check_size(spec, frame.image)
            images[f"{name}_image"] = fit_image(frame.image, spec.height, spec.width).copy()
            captured[name], received[name] = frame.capture_ns, frame.receive_ns
            oldest = min(oldest, frame.receive_ns)
        return Images(images, oldest, captured, received)

    def _check_size(self, spec: CameraSpec, image: np.ndarray) -> None:
        topics = self.config.cameras[spec.name]
        expected = topics.height or spec.height, topics.width or spec.width
        if image.shape[:2] != expected:
            raise RobotError(
                f"camera '{spec.name}' gives {image.shape[1]}x{image.shape[0]} images; expected "
                f"{expected[1]}x{expected[0]}. Set its width and height in the robot yaml, or start the driver (or "
                "twin) with the size the policy was trained with."
            )

    def wait_until_ready(self, timeout_s: float, after_ns: int = 0) -> Arm:
        """Wait until every input is alive, and check that there is one robot and that its cameras are ours.

        Args:
            timeout_s: how long to wait.
            after_ns: monotonic time; what arrived before does not count.

        Returns:
            The arm state.

        Raises:
            StaleObservationError: an input stays silent for ``timeout_s``.
            RobotError: implausible inputs, several publishers, or other intrinsics than the embodiment's.
        """
        deadline = time.monotonic_ns() + int(timeout_s * 1e9)
        # Nobody may have looked for seconds, in which the arm moved, came to rest, and was seen at rest for long.
        self._unchanged.clear()
        while True:
            try:
                arm = self.read_arm(after_ns)
                self.read_images(arm, after_ns)
                self._check_intrinsics()
                break
            except StaleObservationError as error:
                self.check_robot()
                if time.monotonic_ns() > deadline:
                    raise StaleObservationError(
                        f"the robot is not ready after {timeout_s:g} s: {error}. Start its driver or `simtoreal twin` "
                        f"where it can be heard in {ros_graph()}, with the topic names of the robot yaml."
                    ) from error
                time.sleep(0.01)
        self._check_single_publisher()
        return arm

    def _check_single_publisher(self) -> None:
        deadline = time.monotonic_ns() + int(DISCOVERY_LEASE_S * 1e9)
        for name in self._topics_read:
            while (count := self.node.count_publishers(name)) > 1:
                if time.monotonic_ns() > deadline:
                    raise RobotError(
                        f"{count} nodes publish {name}. Stop all but one robot or twin, or give each its ROS_DOMAIN_ID."
                    )
                time.sleep(0.1)

    def _check_intrinsics(self) -> None:
        for name, (spec, _) in self.cameras.items():
            topic = self.config.cameras[name].camera_info
            if topic is None or self.config.cameras[name].image.name not in self._topics_read:
                continue
            found = self.newest(f"{name}_info")
            if found is None:
                raise StaleObservationError(f"nothing received on {topic.name}")
            info = found[0]
            scale = min(info.height / spec.height, info.width / spec.width)
            focal = spec.intrinsics[1] * scale
            if scale <= 0 or abs(info.k[4] - focal) > FOCAL_TOLERANCE * focal:
                raise RobotError(
                    f"{topic.name}: focal length {info.k[4]:.1f} px at {info.width}x{info.height}; camera '{name}' of "
                    f"the embodiment has {focal:.1f} px there (field of view {spec.fov_y_deg} degrees)."
                )

    def _spin(self) -> None:
        from rclpy.executors import ExternalShutdownException

        try:
            self._executor.spin()
        except ExternalShutdownException:
            return

    def close(self) -> None:
        """Stop listening; may be called twice."""
        if self._context.ok():
            self._context.shutdown()
            self._thread.join(timeout=5.0)
            self._executor.shutdown()
            self.node.destroy_node()
