"""What the robot tells us: newest joint states and images from the ROS 2 graph, checked before anybody uses them."""

from __future__ import annotations

import threading
import time
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from simtoreal.envs.embodiment import CameraSpec, Embodiment
from simtoreal.envs.errors import RobotError, StaleObservationError
from simtoreal.robot.topics import CameraTopics, RobotConfig, start_ros

# Channel order of the encodings that drivers publish; the observation is RGB.
ENCODINGS = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0)}
CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4}
# A jump of transport delay beyond this is a clock being set, not a late image.
CLOCK_STEP_NS = 10_000_000_000
# Sum of absolute joint motion that must change what a camera sees.
FROZEN_MOTION_RAD = 0.1
# Encoders overshoot limits by little; degrees or millimetres overshoot by a lot.
JOINT_MARGIN_RAD = 0.15
FINGER_MARGIN = 0.25
# Fast DDS forgets a killed participant after 20 s; until then its publishers are still counted.
DISCOVERY_LEASE_S = 22.0


@dataclass(frozen=True)
class Arm:
    """Measured arm state.

    Attributes:
        joint_positions_rad: ``(7,)`` in kinematic order.
        opening: gripper opening, 0 closed to 1 open.
        arrived_ns: monotonic time of arrival.
    """

    joint_positions_rad: np.ndarray
    opening: float
    arrived_ns: int


class JointStates:
    """Reads ``sensor_msgs/JointState`` by name, in any order, and refuses what cannot be this arm in SI units."""

    def __init__(self, config: RobotConfig, joint_low_rad: np.ndarray, joint_high_rad: np.ndarray) -> None:
        self.topic = config.topics.joint_states.name
        self.names = (*config.joint_names, *config.finger_joint_names)
        self.arm_joints = len(config.joint_names)
        self.low, self.high = joint_low_rad - JOINT_MARGIN_RAD, joint_high_rad + JOINT_MARGIN_RAD
        self.closed, self.travel = config.finger_closed, config.finger_open - config.finger_closed
        self._order: tuple[tuple[str, ...], np.ndarray] | None = None

    def read(self, message: Any, arrived_ns: int) -> Arm:
        """Return the arm state in ``message``.

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
            hint = " Are these degrees? Radians are expected." if abs(arm[index]) > 2 * np.pi else ""
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
        return Arm(arm, min(max(opening, 0.0), 1.0), arrived_ns)

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


def decode_image(message: Any, topic: str) -> np.ndarray:
    """Return the RGB image ``(H, W, 3)`` uint8 in a ``sensor_msgs`` Image or CompressedImage.

    Raises:
        RobotError: unknown encoding, or the data are not as long as height, width and step say (torn).
    """
    if hasattr(message, "format"):
        import cv2

        image = cv2.imdecode(np.frombuffer(message.data, dtype=np.uint8), cv2.IMREAD_COLOR) if message.data else None
        if image is None:
            raise RobotError(f"{topic}: {len(message.data)} bytes of '{message.format}' cannot be decoded: torn image")
        return np.ascontiguousarray(image[:, :, ::-1])
    if message.encoding not in ENCODINGS:
        raise RobotError(f"{topic}: encoding '{message.encoding}' is not one of {', '.join(ENCODINGS)}")
    channels = CHANNELS[message.encoding]
    expected = message.height * message.step
    if message.step < message.width * channels or len(message.data) != expected or expected == 0:
        raise RobotError(
            f"{topic}: {len(message.data)} bytes for {message.width}x{message.height} '{message.encoding}' "
            f"with step {message.step}: torn image"
        )
    rows = np.frombuffer(message.data, dtype=np.uint8).reshape(message.height, message.step)
    pixels = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    return np.ascontiguousarray(pixels[:, :, ENCODINGS[message.encoding]])


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre-crop to the aspect of ``(height, width)`` and shrink by area averaging; same size is passed through."""
    if image.shape[:2] == (height, width):
        return image
    import cv2

    scale = min(image.shape[0] / height, image.shape[1] / width)
    crop = round(height * scale), round(width * scale)
    top, left = (image.shape[0] - crop[0]) // 2, (image.shape[1] - crop[1]) // 2
    cropped = image[top : top + crop[0], left : left + crop[1]]
    return np.asarray(cv2.resize(cropped, (width, height), interpolation=cv2.INTER_AREA))


class CameraStream:
    """Checks one camera's images: size, tearing, age, and whether they still change while the arm moves."""

    def __init__(self, spec: CameraSpec, topics: CameraTopics, max_age_s: float, frozen_frames: int) -> None:
        self.spec, self.topics = spec, topics
        self.max_age_ns = int(max_age_s * 1e9)
        self.frozen_frames = frozen_frames
        self.forget()

    def forget(self) -> None:
        """Start afresh, for a new episode."""
        self._message: Any = None
        self._image = np.zeros(0, dtype=np.uint8)
        self._stamp_ns = -1
        self._hash = -1
        self._same = 0
        self._arm_when_changed: np.ndarray | None = None
        self._delay_ns = self._least_delay_ns = 0

    def read(self, message: Any, arrived_ns: int, now_ns: int, arm: np.ndarray) -> np.ndarray:
        """Return the image in ``message``, ``(H, W, 3)`` uint8 RGB in the embodiment's size, owned by the caller.

        Args:
            message: newest message of the topic.
            arrived_ns, now_ns: monotonic times.
            arm: measured joint positions, radians; tells whether an unchanging image is suspicious.

        Raises:
            StaleObservationError: too old, late or frozen.
            RobotError: torn or of another size.
        """
        topic = self.topics.image.name
        if now_ns - arrived_ns > self.max_age_ns:
            raise StaleObservationError(f"no image on {topic} for {(now_ns - arrived_ns) * 1e-9:.2f} s")
        if message is not self._message:
            image = self._check_size(decode_image(message, topic))
            self._check_delay(message, arrived_ns)
            self._check_frozen(message, arm)
            self._message, self._image = message, fit_image(image, self.spec.height, self.spec.width)
        if self._same >= self.frozen_frames:
            raise StaleObservationError(
                f"{topic} is frozen: {self._same} identical images with new stamps while the arm moved"
            )
        if self._delay_ns - self._least_delay_ns > self.max_age_ns:
            late = (self._delay_ns - self._least_delay_ns) * 1e-9
            raise StaleObservationError(f"images on {topic} arrive {late:.2f} s later than they did: a queue fills up")
        return self._image.copy()

    def _check_size(self, image: np.ndarray) -> np.ndarray:
        expected = self.topics.height or self.spec.height, self.topics.width or self.spec.width
        if image.shape[:2] != expected:
            raise RobotError(
                f"{self.topics.image.name} publishes {image.shape[1]}x{image.shape[0]} images; expected "
                f"{expected[1]}x{expected[0]}. Set width and height of camera '{self.spec.name}' in the robot yaml, "
                "or start the driver (or twin) with the size the policy was trained with."
            )
        return image

    def _check_delay(self, message: Any, arrived_ns: int) -> None:
        # Clocks of robot and computer differ by an unknown offset; only growth of the delay is meaningful.
        stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        delay = arrived_ns - stamp
        if self._stamp_ns < 0 or abs(delay - self._delay_ns) > CLOCK_STEP_NS:
            self._least_delay_ns = delay
        self._delay_ns, self._least_delay_ns = delay, min(delay, self._least_delay_ns)
        self._stamp_ns = stamp

    def _check_frozen(self, message: Any, arm: np.ndarray) -> None:
        content = zlib.crc32(message.data)
        if content != self._hash or self._arm_when_changed is None:
            self._hash, self._same, self._arm_when_changed = content, 0, arm.copy()
        elif np.abs(arm - self._arm_when_changed).sum() > FROZEN_MOTION_RAD:
            self._same += 1


class RobotInputs:
    """Node that keeps the newest message of every input; callbacks only store and stamp.

    One single-threaded executor runs in one thread (rclpy's multi-threaded and events executors starve or hang).

    Args:
        config: topics.
        embodiment: cameras expected.
        joint_low_rad, joint_high_rad: ``(7,)`` limits of the arm.
        name: node name.
    """

    def __init__(
        self,
        config: RobotConfig,
        embodiment: Embodiment,
        joint_low_rad: np.ndarray,
        joint_high_rad: np.ndarray,
        name: str = "simtoreal_env",
    ) -> None:
        self.config = config
        self.embodiment = embodiment
        self.joints = JointStates(config, joint_low_rad, joint_high_rad)
        limits = config.staleness
        self.streams = {
            camera.name: CameraStream(camera, config.cameras[camera.name], limits.camera_s, limits.frozen_frames)
            for camera in embodiment.cameras
        }
        self._lock = threading.Lock()
        self._newest: dict[str, tuple[Any, int]] = {}
        self._context = start_ros()
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node

        self.node = Node(name, context=self._context, use_global_arguments=False)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.listen("joint_states", config.topics.joint_states)
        for camera in self.streams:
            topics = config.cameras[camera]
            self.listen(f"{camera}_image", topics.image)
            if topics.camera_info is not None:
                self.listen(f"{camera}_info", topics.camera_info)
        self._thread = threading.Thread(target=self._spin, name=name, daemon=True)
        self._thread.start()

    def listen(self, key: str, topic: Any) -> None:
        """Keep the newest message of ``topic`` under ``key``."""

        def store(message: Any) -> None:
            with self._lock:
                self._newest[key] = message, time.monotonic_ns()

        self.node.create_subscription(topic.message_class(), topic.name, store, topic.qos())

    def newest(self, key: str) -> tuple[Any, int] | None:
        """Newest message and its monotonic time of arrival, or None."""
        with self._lock:
            return self._newest.get(key)

    def forget(self) -> None:
        """Drop everything received, so that the next episode starts from what arrives from now on."""
        with self._lock:
            # Camera infos may be published once, or rarely.
            self._newest = {key: value for key, value in self._newest.items() if key.endswith("_info")}
        for stream in self.streams.values():
            stream.forget()

    def read_arm(self) -> Arm:
        """Return the checked arm state.

        Raises:
            StaleObservationError: silent topic.
            RobotError: see :class:`JointStates`.
        """
        found = self.newest("joint_states")
        name = self.config.topics.joint_states.name
        if found is None:
            raise StaleObservationError(f"nothing received on {name}")
        age_s = (time.monotonic_ns() - found[1]) * 1e-9
        if age_s > self.config.staleness.joint_states_s:
            raise StaleObservationError(f"no message on {name} for {age_s:.2f} s")
        return self.joints.read(*found)

    def read_images(self, arm: Arm) -> dict[str, np.ndarray]:
        """Return the checked newest image per observation key.

        Raises:
            StaleObservationError: silent, late or frozen camera.
            RobotError: torn image or another size.
        """
        images = {}
        for camera, stream in self.streams.items():
            found = self.newest(f"{camera}_image")
            if found is None:
                raise StaleObservationError(f"nothing received on {stream.topics.image.name}")
            images[f"{camera}_image"] = stream.read(*found, time.monotonic_ns(), arm.joint_positions_rad)
        return images

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until every input is alive, and check that there is one robot and that its cameras are ours.

        Raises:
            StaleObservationError: an input stays silent for ``timeout_s``.
            RobotError: implausible inputs, several publishers, or other intrinsics than the embodiment's.
        """
        deadline = time.monotonic_ns() + int(timeout_s * 1e9)
        while True:
            try:
                self.read_images(self.read_arm())
                self._check_intrinsics()
                break
            except StaleObservationError as error:
                if time.monotonic_ns() > deadline:
                    raise StaleObservationError(
                        f"the robot is not ready after {timeout_s:g} s: {error}. Start its driver or `simtoreal twin`, "
                        "in the same ROS_DOMAIN_ID, with the topic names of the robot yaml."
                    ) from error
                time.sleep(0.01)
        self._check_single_publisher()

    def _check_single_publisher(self) -> None:
        topics = [self.config.topics.joint_states.name, *(s.topics.image.name for s in self.streams.values())]
        deadline = time.monotonic_ns() + int(DISCOVERY_LEASE_S * 1e9)
        for name in topics:
            while (count := self.node.count_publishers(name)) > 1:
                if time.monotonic_ns() > deadline:
                    raise RobotError(
                        f"{count} nodes publish {name}. Stop all but one robot or twin, or give each its ROS_DOMAIN_ID."
                    )
                time.sleep(0.1)

    def _check_intrinsics(self) -> None:
        for camera, stream in self.streams.items():
            if stream.topics.camera_info is None:
                continue
            found = self.newest(f"{camera}_info")
            if found is None:
                raise StaleObservationError(f"nothing received on {stream.topics.camera_info.name}")
            info, spec = found[0], stream.spec
            scale = min(info.height / spec.height, info.width / spec.width)
            focal = spec.intrinsics[1] * scale
            if scale <= 0 or abs(info.k[4] - focal) > 0.05 * focal:
                raise RobotError(
                    f"{stream.topics.camera_info.name}: focal length {info.k[4]:.1f} px at {info.width}x{info.height}; "
                    f"camera '{camera}' of the embodiment has {focal:.1f} px (field of view {spec.fov_y_deg} degrees)."
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
