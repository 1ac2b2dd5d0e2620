"""Writes a dataset as a recording of the robot: an MCAP file with its topics, for rosbag2, Foxglove and PlotJuggler.

Every control step is one message per topic at the control rate: joint states, images, the commanded target and the
gripper command. The stamps lie on the grid of the control rate, from the start of each episode on, so that an import
finds every value where it was. Marks on ``/simtoreal/episode`` carry what ROS messages cannot.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, disk_errors
from simtoreal.data_collection.exchange import Progress, refuse_overwriting
from simtoreal.envs import rotation
from simtoreal.envs.embodiment import CameraSpec, Embodiment
from simtoreal.envs.errors import ConfigError, DatasetError, require
from simtoreal.envs.files import atomic_path
from simtoreal.robot.bag_import import SETTLE_NS
from simtoreal.robot.recording import CHUNK_BYTES, MARKS_TOPIC, MARKS_TYPE, METADATA, message_definition
from simtoreal.robot.topics import RobotConfig, Topic

# Positions in the proprio observation (``PROPRIO_NAMES`` of the arm): target position, opening, joints.
_TARGET, _OPENING, _JOINTS = slice(9, 12), 12, slice(13, None)
_FIRST_EPISODE_NS = 1_000_000_000


def export_recording(
    dataset: Dataset,
    output: Path,
    robot: RobotConfig,
    *,
    episodes: Sequence[EpisodeInfo] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the episodes one after another into one MCAP file and return their number of steps.

    Args:
        dataset: of an arm that the robot layer knows, of one task.
        output: file to create; it appears under its name when it is complete.
        robot: names and types of the topics.
        episodes: by default all.
        progress: see :data:`~simtoreal.data_collection.exchange.Progress`.

    Raises:
        ConfigError: the data are not of ``robot``, or of several tasks.
        DatasetError: the file exists, an episode lacks arrays, or the disk is full.
        MissingDependencyError: the message packages or mcap are not installed.
    """
    require("mcap_ros2.writer", "ros", package="mcap-ros2-support")
    refuse_overwriting(output)
    chosen = list(dataset.episodes if episodes is None else episodes)
    _check(dataset, robot, chosen)
    steps, next_ns = 0, _FIRST_EPISODE_NS
    with disk_errors(output), atomic_path(output) as temporary, open(temporary, "wb") as stream:
        messages = _Messages(stream, dataset.embodiment, robot, _description(dataset, robot, chosen))
        for number, episode in enumerate(chosen):
            arrays = dataset.read(episode)
            next_ns = messages.write(number, episode, arrays, max(next_ns, _started_ns(episode)))
            steps += episode.steps
            if progress is not None:
                progress(number + 1, len(chosen))
        messages.writer.finish()
    return steps


def _check(dataset: Dataset, robot: RobotConfig, episodes: Sequence[EpisodeInfo]) -> None:
    embodiment = dataset.embodiment
    joints = len(robot.joint_names)
    if embodiment.action.mode not in ("ee_delta", "ee_abs") or embodiment.proprio.dim != _JOINTS.start + joints:
        raise ConfigError(
            f"{dataset.path}: is of '{embodiment.name}' with {embodiment.action.mode} actions; only arms with "
            f"end-effector actions and {joints} joints become recordings with these topics. Use --format lerobot."
        )
    if robot.command == "joint_trajectory":
        raise ConfigError("data hold end-effector targets; export needs topics with 'command: target_pose'.")
    missing = [camera.name for camera in embodiment.cameras if camera.name not in robot.cameras]
    if missing:
        raise ConfigError(f"the robot's topics have no camera '{missing[0]}'; they have {', '.join(robot.cameras)}.")
    tasks = {episode.task for episode in episodes}
    if len(tasks) != 1:
        raise ConfigError(f"{dataset.path}: the episodes are of {sorted(tasks)}; a recording shows one task (--mask).")


def _description(dataset: Dataset, robot: RobotConfig, episodes: Sequence[EpisodeInfo]) -> dict[str, str]:
    first = episodes[0]
    return {
        "embodiment": json.dumps(dataset.embodiment.to_dict()),
        "robot": json.dumps(dataclasses.asdict(robot)),
        "task": json.dumps(dataset.tasks[first.task]),
        "source": first.source,
        "operator": first.operator,
        "provenance": json.dumps({"commit": first.commit, "versions": first.versions}),
    }


def _started_ns(episode: EpisodeInfo) -> int:
    try:
        started = datetime.datetime.fromisoformat(episode.started)
    except ValueError:
        return 0
    return round(started.timestamp() * 1e6) * 1000


class _Messages:
    """Turns steps into messages."""

    def __init__(
        self, stream: BinaryIO, embodiment: Embodiment, robot: RobotConfig, description: dict[str, str]
    ) -> None:
        from mcap.writer import CompressionType
        from mcap_ros2.writer import Writer

        self.embodiment, self.robot = embodiment, robot
        # rclpy's serializer pads messages with empty arrays, which strict readers (rosbags) refuse; this one does not.
        self.writer: Any = Writer(stream, chunk_size=CHUNK_BYTES, compression=CompressionType.LZ4)
        self.writer.add_metadata(METADATA, description)
        self._schemas: dict[str, Any] = {}
        self._sequences: dict[str, int] = {}

    def _write(self, topic: str, type_name: str, content: dict[str, Any], at_ns: int) -> None:
        if type_name not in self._schemas:
            package, _, name = type_name.split("/")
            message_class = getattr(require(f"{package}.msg", "ros", package=package), name)
            self._schemas[type_name] = self.writer.register_msgdef(type_name, message_definition(message_class))
        sequence = self._sequences.get(topic, 0)
        self.writer.write_message(topic, self._schemas[type_name], content, at_ns, at_ns, sequence)
        self._sequences[topic] = sequence + 1

    def write(self, number: int, episode: EpisodeInfo, arrays: Arrays, begin_ns: int) -> int:
        """Write an episode that begins at ``begin_ns`` and return when the next one may begin.

        Raises:
            DatasetError: it lacks ``proprio`` or absolute targets.
        """
        for name in ("obs/proprio", "step/target"):
            if name not in arrays:
                raise DatasetError(f"{episode.path}: has no '{name}', which a recording is made of.")
        proprio = arrays["obs/proprio"].astype(np.float64)
        targets = np.concatenate([self._first_target(proprio[0], arrays)[None], arrays["step/target"]])
        commands = self._commands(targets)
        period_ns = round(1e9 * self.embodiment.control_period_s)
        texts = episode.instructions or (episode.instruction,)
        current = 0
        described = json.loads(episode.to_json())
        self._mark(begin_ns, "begin", episode=number, seed=episode.seed, instruction=texts[0], described=described)
        for step in range(episode.steps + 1):
            at_ns = begin_ns + step * period_ns
            if step < episode.steps:
                now = int(arrays["step/instruction"][step]) if len(texts) > 1 else 0
                for index in range(current + 1, now + 1):
                    self._mark(at_ns, "instruction", instruction=texts[index])
                current = max(current, now)
                self._observe(
                    at_ns, proprio[step], {key: rows[step] for key, rows in arrays.items() if key[:4] == "obs/"}
                )
                self._tell_truth(at_ns, step, episode, arrays)
            self._send(getattr(self.robot.topics, self.robot.command), at_ns, commands[step])
            self._send(self.robot.topics.gripper_command, at_ns, {"data": float(targets[step, 9])})
        end_ns = begin_ns + episode.steps * period_ns
        self._mark(
            end_ns, "end", episode=number, success=episode.success, failure=episode.failure, steps=episode.steps,
            milestones=episode.milestones,
        )  # fmt: skip
        return end_ns + 2 * SETTLE_NS

    def _first_target(self, proprio: np.ndarray, arrays: Arrays) -> np.ndarray:
        """Target ``(10,)`` before the first action: position as observed, rotation from undoing the first action."""
        after = arrays["step/target"][0].astype(np.float64)
        turn = rotation.from_6d(proprio[3:9])
        if self.embodiment.action.mode == "ee_delta":
            scaled = arrays["actions"][0][3:6].astype(np.float64) * self.embodiment.action.limits[3:6]
            undone = rotation.quaternion_conjugate(rotation.from_rotation_vector(scaled))
            turn = rotation.quaternion_multiply(undone, rotation.from_6d(after[3:9]))
        return np.concatenate([proprio[_TARGET], rotation.to_6d(turn), [float(proprio[_OPENING] > 0.5)]])

    def _commands(self, targets: np.ndarray) -> list[dict[str, Any]]:
        commands = []
        for target in targets:
            w, x, y, z = rotation.from_6d(target[3:9]).tolist()
            position = dict(zip("xyz", target[:3].tolist(), strict=True))
            commands.append({"pose": {"position": position, "orientation": {"x": x, "y": y, "z": z, "w": w}}})
        return commands

    def _observe(self, at_ns: int, proprio: np.ndarray, observation: Arrays) -> None:
        robot = self.robot
        finger = robot.finger_closed + float(proprio[_OPENING]) * (robot.finger_open - robot.finger_closed)
        names = [*robot.joint_names, *robot.finger_joint_names]
        positions = [*proprio[_JOINTS].tolist(), *[finger] * len(robot.finger_joint_names)]
        self._send(robot.topics.joint_states, at_ns, {"name": names, "position": positions})
        for camera in self.embodiment.cameras:
            image = observation.get(f"obs/{camera.name}_image")
            if image is not None:
                self._send_image(camera, at_ns, image)

    def _tell_truth(self, at_ns: int, step: int, episode: EpisodeInfo, arrays: Arrays) -> None:
        """Publish what only a simulation knows, as the twin does."""
        truth: dict[str, Any] = {}
        if "obs/object_state" in arrays:
            truth["object_state"] = arrays["obs/object_state"][step].tolist()
        if "step/scene_motion" in arrays:
            values = arrays["step/scene_motion"][step].tolist()
            truth["scene_motion"] = dict(zip(episode.columns["scene_motion"], values, strict=True))
        if truth:
            self._send(self.robot.topics.twin_truth, at_ns, {"data": json.dumps(truth)})

    def _send_image(self, camera: CameraSpec, at_ns: int, image: np.ndarray) -> None:
        topics = self.robot.cameras[camera.name]
        if topics.image.type.endswith("CompressedImage"):
            import cv2

            png = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))[1]
            content: dict[str, Any] = {"format": "png", "data": png.tobytes()}
        else:
            height, width = image.shape[:2]
            content = {"height": height, "width": width, "encoding": "rgb8", "step": 3 * width, "data": image.tobytes()}
        self._send(topics.image, at_ns, content, frame=topics.frame)
        if topics.camera_info is not None:
            fx, fy, cx, cy = camera.intrinsics
            matrix = [fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0]
            projection = [fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0]
            info = {"height": camera.height, "width": camera.width, "k": matrix, "p": projection}
            model = {"distortion_model": "plumb_bob", "d": [0.0] * 5, "r": np.eye(3).reshape(-1).tolist()}
            self._send(topics.camera_info, at_ns, {**info, **model}, frame=topics.frame)

    def _mark(self, at_ns: int, event: str, **content: Any) -> None:
        text = json.dumps({"event": event, **content}, allow_nan=False)
        self._write(MARKS_TOPIC, MARKS_TYPE, {"data": text}, at_ns)

    def _send(self, topic: Topic, at_ns: int, content: dict[str, Any], *, frame: str = "") -> None:
        if not topic.type.startswith("std_msgs/"):
            seconds, nanoseconds = divmod(at_ns, 1_000_000_000)
            stamp = {"sec": seconds, "nanosec": nanoseconds}
            content = {"header": {"stamp": stamp, "frame_id": frame or self.robot.base_frame}, **content}
        self._write(topic.name, topic.type, content, at_ns)
