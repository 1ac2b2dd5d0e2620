"""The twin: MuJoCo behind the robot's topics, in its own process, in real time, on its own clock."""

from __future__ import annotations

import array
import collections
import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.scene_motion import SceneMotion, load_motion
from simtoreal.envs.task import TaskSpec
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.timing import sleep_until
from simtoreal.robot.topics import RobotConfig, start_ros
from simtoreal.robot.twin_world import TICK_S, TwinWorld, finger_positions

CAMERA_INFO_PERIOD_S = 0.5
# A machine that stalls this long makes the twin skip time instead of racing to catch up.
MAX_LAG_S = 0.25


class Twin:
    """MuJoCo node that speaks the topics of ``config``.

    Requests for episodes come as JSON text ``{"request", "episode", "seed", "task"}`` on ``twin_command``, optionally
    with ``"motion"`` (fields of :class:`~simtoreal.envs.scene_motion.SceneMotion`). They are acknowledged by the same
    ``request`` in the truth, which is published once per control period as JSON text: ``request, error, episode, seed,
    task, time_s, skipped_s, success, milestones, contacts, object_state, scene_motion, fault``
    (``skipped_s``: real time of this episode that was not simulated because the machine was too slow). The Trigger
    service ``twin_reset`` begins an episode with the next seed.

    Images have the embodiment's pixels; sizes in ``config`` are those of a real robot's cameras.

    Physics, measurements and drawing run in the thread that calls :meth:`run`; message callbacks run in the thread
    of a single-threaded executor and only store.

    Args:
        task: what is on the table.
        embodiment: robot and cameras.
        config: topics.
        gap: ``none``, ``standard`` or ``hard``; drawn anew per episode, from its seed.
        seed: of the episode that runs until somebody asks for another.
        motion: how the scene moves in episodes whose request does not say.

    Raises:
        ConfigError: unknown gap or motion, or a camera without topics.
    """

    def __init__(
        self,
        task: TaskSpec,
        embodiment: Embodiment,
        config: RobotConfig,
        *,
        gap: str = "standard",
        seed: int = 0,
        motion: str | SceneMotion | None = None,
    ) -> None:
        config.require_fits(embodiment, "the robot yaml")
        self.config, self.embodiment, self.task = config, embodiment, task
        self.world = TwinWorld(task, embodiment, gap, motion)
        self._motion = self.world.motion
        self._deadline_ns = 0
        self._kinematics = Kinematics(embodiment)
        self._next_seed = seed
        self._requests: collections.deque[dict[str, Any]] = collections.deque()
        self._commands: collections.deque[tuple[int, Callable[[], None]]] = collections.deque()
        self._outgoing: collections.deque[tuple[int, Any, Any]] = collections.deque()
        self._joints_outgoing: collections.deque[tuple[int, Any, Any]] = collections.deque()
        self._status: dict[str, Any] = {"request": "", "error": "", "episode": 0, "seed": seed, "task": task.name}
        self._served: collections.deque[str] = collections.deque(maxlen=64)
        self.episodes, self.skipped_s, self._skipped_before_s = 0, 0.0, 0.0
        self._context = start_ros()
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node

        self.node = Node("simtoreal_twin", context=self._context, use_global_arguments=False)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._connect()
        self._thread = threading.Thread(target=self._spin, name="twin", daemon=True)

    # -- ROS -----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        from std_srvs.srv import Trigger

        topics, node = self.config.topics, self.node
        self._joint_publisher = self._publisher(topics.joint_states)
        self._truth_publisher = self._publisher(topics.twin_truth)
        self._joint_message = topics.joint_states.message_class()()
        self._joint_message.name = [*self.config.joint_names, *self.config.finger_joint_names]
        self._joint_message.header.frame_id = self.config.base_frame
        self._cameras: dict[str, tuple[Any, Any, Any]] = {}
        for camera in self.embodiment.cameras:
            names = self.config.cameras[camera.name]
            info = None if names.camera_info is None else self._publisher(names.camera_info)
            self._cameras[camera.name] = self._publisher(names.image), info, self._camera_info(camera.name)
        if self.config.command == "joint_trajectory":
            self._subscribe(topics.joint_trajectory, self._take_trajectory)
        else:
            self._subscribe(topics.target_pose, self._take_pose)
        self._subscribe(topics.gripper_command, self._take_gripper)
        self._subscribe(topics.twin_command, self._take_request)
        node.create_service(Trigger, self.config.services.twin_reset, self._reset_service)

    def _publisher(self, topic: Any) -> Any:
        return self.node.create_publisher(topic.message_class(), topic.name, topic.qos())

    def _subscribe(self, topic: Any, callback: Callable[[Any], None]) -> None:
        self.node.create_subscription(topic.message_class(), topic.name, callback, topic.qos())

    def _spin(self) -> None:
        from rclpy.executors import ExternalShutdownException

        try:
            self._executor.spin()
        except ExternalShutdownException:
            return

    def _warn(self, text: str) -> None:
        self.node.get_logger().warning(text, throttle_duration_sec=1.0)

    def _later(self, act: Callable[[], None]) -> None:
        self._commands.append((time.monotonic_ns() + int(self.world.latency.command_s * 1e9), act))

    def _take_pose(self, message: Any) -> None:
        p, q = message.pose.position, message.pose.orientation
        if message.header.frame_id != self.config.base_frame:
            self._warn(f"ignored a target in frame '{message.header.frame_id}'; expected '{self.config.base_frame}'")
            return
        self._take(np.array([p.x, p.y, p.z]), np.array([q.w, q.x, q.y, q.z]))

    def _take_trajectory(self, message: Any) -> None:
        if sorted(message.joint_names) != sorted(self.config.joint_names) or not message.points:
            self._warn(f"ignored a trajectory of {list(message.joint_names)}; expected {self.config.joint_names}")
            return
        given = dict(zip(message.joint_names, message.points[-1].positions, strict=False))
        joints = np.array([given.get(name, np.nan) for name in self.config.joint_names])
        if np.isfinite(joints).all():
            self._take(*self._kinematics.forward(joints))

    def _take(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        norm = float(np.linalg.norm(quaternion))
        if not np.isfinite(position).all() or not abs(norm - 1.0) < 1e-2:
            self._warn(f"ignored the target {position.tolist()}, {quaternion.tolist()}: not a finite pose")
            return
        self._later(lambda: self.world.command_pose(position, quaternion / norm))

    def _take_gripper(self, message: Any) -> None:
        if not np.isfinite(message.data):
            self._warn(f"ignored the gripper command {message.data}")
            return
        self._later(lambda: self.world.command_gripper(message.data))

    def _take_request(self, message: Any) -> None:
        try:
            content = json.loads(message.data)
            request = {
                "request": str(content["request"]),
                "episode": int(content["episode"]),
                "seed": int(content["seed"]),
                "task": str(content["task"]),
            }
            if "motion" in content:
                request["motion"] = load_motion(dict(content["motion"]))
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            self._warn(f"ignored a request that is not understood ({type(error).__name__}: {error})")
            return
        self._requests.append(request)

    def _reset_service(self, _: Any, response: Any) -> Any:
        seed = self._next_seed
        self._requests.append({"request": uuid.uuid4().hex, "episode": 0, "seed": seed, "task": self.task.name})
        response.success, response.message = True, f"episode with seed {seed} begins"
        return response

    def _camera_info(self, camera_name: str) -> Any:
        from sensor_msgs.msg import CameraInfo

        camera = next(camera for camera in self.embodiment.cameras if camera.name == camera_name)
        fx, fy, cx, cy = camera.intrinsics
        info = CameraInfo(height=camera.height, width=camera.width, distortion_model="plumb_bob", d=[0.0] * 5)
        # The nominal calibration: the gap's camera errors are unknown to everybody.
        info.k = [fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0]
        info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        info.p = [fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0]
        info.header.frame_id = self.config.cameras[camera_name].frame
        return info

    # -- loop ----------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Simulate and publish in real time until ``stop`` is set."""
        self._begin(self._next_seed)
        self._thread.start()
        while not stop.is_set():
            self._deadline_ns += round(TICK_S * 1e9)
            late = time.monotonic_ns() - self._deadline_ns
            if late > MAX_LAG_S * 1e9:
                self.skipped_s += late * 1e-9
                self._deadline_ns += late
            # Deadlines here need no microseconds, so nothing is spun.
            sleep_until(self._deadline_ns, spin_s=0.0)
            self._serve()
            self._apply_commands(self._deadline_ns)
            self.world.tick()
            self._measure(self._deadline_ns)
            self._publish_due(time.monotonic_ns())

    def _serve(self) -> None:
        while self._requests:
            request = self._requests.popleft()
            if request["request"] in self._served:
                continue
            self._served.append(request["request"])
            if request["task"] != self.task.name:
                error = f"it runs '{self.task.name}'. Start: simtoreal twin --task {request['task']}"
                self._status = {**self._status, "request": request["request"], "error": error}
                continue
            motion = request.pop("motion", self._motion)
            if motion != self.world.motion:
                try:
                    self.world.set_motion(motion)
                except ConfigError as error:
                    self._status = {**self._status, "request": request["request"], "error": str(error)}
                    continue
            self._begin(request["seed"])
            self._status = {**request, "error": ""}

    def _begin(self, seed: int) -> None:
        self.world.begin(seed)
        self._next_seed = seed + 1
        self.episodes += 1
        self._commands.clear()
        self._outgoing.clear()
        self._joints_outgoing.clear()
        # Building a scene takes time that belongs to no episode.
        self._deadline_ns = time.monotonic_ns()
        self._skipped_before_s = self.skipped_s

    def _apply_commands(self, now_ns: int) -> None:
        while self._commands and self._commands[0][0] <= now_ns:
            self._commands.popleft()[1]()

    def _measure(self, now_ns: int) -> None:
        """Take the measurements that are due, stamp them, and queue them for publication."""
        latency = self.world.latency
        stamp = self.node.get_clock().now().to_msg()
        positions, velocities, fingers = self.world.measure_joints()
        count = len(self.config.finger_joint_names)
        opening = finger_positions(fingers, self.config.finger_closed, self.config.finger_open, count)
        joints = array.array("d", [*positions, *opening]), array.array("d", [*velocities, *[0.0] * count])
        self._joints_outgoing.append(
            (now_ns + int(latency.joint_states_s * 1e9), self._publish_joints, (stamp, *joints))
        )
        if self.world.ticks % self.world.ticks_per_control == 0:
            with_info = self.world.ticks % round(CAMERA_INFO_PERIOD_S / TICK_S) == 0
            release = now_ns + int(latency.observation_s * 1e9)
            for camera, image in self.world.draw().items():
                self._outgoing.append((release, self._publish_image, (stamp, camera, image, with_info)))
            # The judge is no sensor: its word is not delayed.
            self._publish_truth()

    def _publish_due(self, now_ns: int) -> None:
        for queue in (self._joints_outgoing, self._outgoing):
            while queue and queue[0][0] <= now_ns:
                _, publish, content = queue.popleft()
                publish(*content)

    def _publish_joints(self, stamp: Any, positions: array.array[float], velocities: array.array[float]) -> None:
        message = self._joint_message
        message.header.stamp, message.position, message.velocity = stamp, positions, velocities
        self._joint_publisher.publish(message)

    def _publish_image(self, stamp: Any, camera: str, image: np.ndarray, with_info: bool) -> None:
        publisher, info_publisher, info = self._cameras[camera]
        names = self.config.cameras[camera]
        message = names.image.message_class()()
        message.header.stamp, message.header.frame_id = stamp, names.frame
        # Assigning an array of bytes is a copy; a list or numpy array would be checked element by element.
        if names.image.type.endswith("CompressedImage"):
            import cv2

            # PNG: at these sizes JPEG would change what the policy sees more than it saves.
            message.format = "png"
            message.data = array.array("B", cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        else:
            message.height, message.width = image.shape[:2]
            message.encoding, message.step = "rgb8", 3 * image.shape[1]
            message.data = array.array("B", image.tobytes())
        publisher.publish(message)
        if with_info and info_publisher is not None:
            info.header.stamp = stamp
            info_publisher.publish(info)

    def _publish_truth(self) -> None:
        message = self.config.topics.twin_truth.message_class()()
        skipped_s = self.skipped_s - self._skipped_before_s
        message.data = json.dumps({**self._status, **self.world.truth(), "skipped_s": skipped_s})
        self._truth_publisher.publish(message)

    def close(self) -> None:
        """Leave the graph and free the renderer."""
        self._context.shutdown()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._executor.shutdown()
        self.node.destroy_node()
        self.world.close()
