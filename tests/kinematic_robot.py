"""A robot for tests: a real ROS 2 node with an arm that goes exactly where it is told, and faults on demand."""

from __future__ import annotations

import threading
import time

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.embodiment import Embodiment
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.topics import RobotConfig, start_ros

JOINT_STATES_S = 0.01
JOINTS_PER_IMAGE = 5


class KinematicRobot:
    """Publishes joint states at 100 Hz and noisy images at 20 Hz; takes targets like the safety gate does.

    Attributes:
        silent: topics that are not published: ``joint_states`` or camera names.
        permutation: order in which joints are named.
        scale: factor on arm positions (57.3: degrees).
        drop: joint names left out.
        frozen, torn: cameras that repeat their image, or cut it.
        size: image height and width.
        fov_scale: factor on the published focal length.
        resent: the joint states are sent again and again with the stamp of the first of them.
        skipped: camera -> every how many-th image is lost.
        held: why the gate holds, or empty.
        targets: everything sent, with the episode.
    """

    def __init__(self, config: RobotConfig, embodiment: Embodiment, joints: np.ndarray | None = None) -> None:
        self.config, self.embodiment = config, embodiment
        self.kinematics = Kinematics(embodiment)
        home = np.array(embodiment.home_joint_positions_rad)
        self.joints = home if joints is None else joints
        self.opening = 1.0
        self.silent: set[str] = set()
        self.permutation = np.arange(9)
        self.scale = 1.0
        self.drop: set[str] = set()
        self.frozen: set[str] = set()
        self.torn: set[str] = set()
        self.size = (embodiment.cameras[0].height, embodiment.cameras[0].width)
        self.fov_scale = 1.0
        self.resent = False
        self.skipped: dict[str, int] = {}
        self.held = ""
        self.targets: list[tuple[np.ndarray, int]] = []
        self.episodes: list[int] = []
        self._joint_stamp = None
        self.context = start_ros()
        from rclpy.node import Node

        self.node = Node("kinematic_robot", context=self.context, use_global_arguments=False)
        self.joint_publisher = self._publisher(config.topics.joint_states)
        self.cameras = {
            camera.name: (
                self._publisher(config.cameras[camera.name].image),
                self._publisher(config.cameras[camera.name].camera_info),
            )
            for camera in embodiment.cameras
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _publisher(self, topic):
        return self.node.create_publisher(topic.message_class(), topic.name, topic.qos())

    # What the safety gate offers.

    def begin_episode(self, episode: int) -> None:
        self.episodes.append(episode)

    def report_observation(self, observation_ns: int) -> None:
        assert 0 < observation_ns <= time.monotonic_ns()

    def holding(self) -> str:
        return self.held

    def end_episode(self) -> None:
        pass

    def send_target(self, target: np.ndarray, at_ns: int, episode: int) -> None:
        self.targets.append((target, episode))
        self.joints = self.kinematics.solve_ik(target[:3], rotation.from_6d(target[3:9]), self.joints)
        self.opening = target[9]

    # The driver.

    def _run(self) -> None:
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (*self.size, 3), dtype=np.uint8)
        ticks = 0
        while not self._stop.wait(JOINT_STATES_S):
            ticks += 1
            if "joint_states" not in self.silent:
                self._publish_joints()
            if ticks % JOINTS_PER_IMAGE == 0:
                for camera in self.cameras:
                    if camera not in self.frozen or noise.shape[:2] != self.size:
                        noise = rng.integers(0, 256, (*self.size, 3), dtype=np.uint8)
                    lost = ticks // JOINTS_PER_IMAGE % self.skipped.get(camera, 10**9) == 0
                    if camera not in self.silent and not lost:
                        self._publish_image(camera, noise)

    def _publish_joints(self) -> None:
        message = self.config.topics.joint_states.message_class()()
        if not self.resent or self._joint_stamp is None:
            self._joint_stamp = self.node.get_clock().now().to_msg()
        message.header.stamp = self._joint_stamp
        finger = self.config.finger_closed + self.opening * (self.config.finger_open - self.config.finger_closed)
        positions = [*(self.joints * self.scale), finger, finger]
        names = [*self.config.joint_names, *self.config.finger_joint_names]
        kept = [index for index in self.permutation if names[index] not in self.drop]
        message.name = [names[index] for index in kept]
        message.position = [float(positions[index]) for index in kept]
        self.joint_publisher.publish(message)

    def _publish_image(self, camera: str, image: np.ndarray) -> None:
        publisher, info_publisher = self.cameras[camera]
        message = self.config.cameras[camera].image.message_class()()
        message.header.stamp = self.node.get_clock().now().to_msg()
        message.height, message.width = image.shape[:2]
        message.encoding, message.step = "rgb8", 3 * image.shape[1]
        data = image.tobytes()
        message.data = data[: len(data) // 2] if camera in self.torn else data
        publisher.publish(message)
        info = self.config.cameras[camera].camera_info.message_class()()
        info.height, info.width = self.size
        focal = next(c.intrinsics[0] for c in self.embodiment.cameras if c.name == camera) * self.fov_scale
        info.k = [focal, 0.0, 0.0, 0.0, focal, 0.0, 0.0, 0.0, 1.0]
        info_publisher.publish(info)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.node.destroy_node()
        self.context.shutdown()
