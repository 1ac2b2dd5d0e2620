"""Dataset episodes out of recordings of the real robot or the twin.

Sensors, images and commands arrive at rates of their own. An episode is rebuilt on the grid of the control rate by
their stamps: joint positions and commanded targets are interpolated, images and scene truth are the newest before each
tick. Actions are what moves one target to the next. While an input is stale the observation is repeated, as by a robot.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.episode import ABORTED, Arrays, EpisodeInfo, embodiment_digest
from simtoreal.data_collection.exchange import ImportResult, refuse_existing
from simtoreal.data_collection.writer import new_dataset
from simtoreal.envs import rotation
from simtoreal.envs.action import action_towards, build_proprio
from simtoreal.envs.config import build_config
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError, RobotError, SimtorealError
from simtoreal.robot.bag_reader import BagReader, Message
from simtoreal.robot.camera_ros import decode_message
from simtoreal.robot.images import fit_image
from simtoreal.robot.inputs import JointStates
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.recorded_truth import truth_arrays
from simtoreal.robot.recording import MARKS_TOPIC, METADATA
from simtoreal.robot.resampling import Track, normalized_pose
from simtoreal.robot.stamp_clock import CLOCK_STEP_NS
from simtoreal.robot.topics import RobotConfig

# The recorder empties its queues one after the other, so an episode is complete only this long after its end.
SETTLE_NS = 500_000_000
# What is kept of the time between episodes: the state in which the next one begins.
HISTORY_NS = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a recording is about; :class:`~simtoreal.robot.recording.RunRecorder` stores it in the file.

    Attributes:
        embodiment, robot: of the run.
        task: specification of the task as plain dictionary, with its ``name``.
        source, operator: see :class:`~simtoreal.data_collection.episode.EpisodeInfo`.
        provenance: of the recording.
    """

    embodiment: Embodiment
    robot: RobotConfig
    task: dict[str, Any]
    source: str = "robot"
    operator: str = "unknown"
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Episode:
    """What the marks say about an episode; times by the system clock of the recorder.

    Its motion ends at ``over_ns`` (0: at ``end_ns``), and a person may judge it later.
    ``described`` is all that was known about an episode that an export wrote (:mod:`simtoreal.robot.bag_export`).
    """

    number: int
    seed: int
    begin_ns: int
    end_ns: int = 0
    over_ns: int = 0
    described: dict[str, Any] | None = None
    instructions: list[tuple[int, str]] = field(default_factory=list)
    success: bool = False
    failure: str = ABORTED
    milestones: dict[str, bool] = field(default_factory=dict)


def read_description(path: Path) -> Description | None:
    """Return what a recording says about itself, or None for a recording of another program.

    Raises:
        DatasetError: the file cannot be read, or its description is damaged.
    """
    content = BagReader(path).metadata(METADATA)
    if content is None:
        return None
    try:
        return Description(
            embodiment=Embodiment.from_dict(json.loads(content["embodiment"])),
            robot=build_config(RobotConfig, json.loads(content["robot"]), source=f"{path}: robot"),
            task=json.loads(content["task"]),
            source=content["source"],
            operator=content["operator"],
            provenance=json.loads(content["provenance"]),
        )
    except (KeyError, ValueError) as error:
        raise DatasetError(f"{path}: the description in the recording is damaged ({error})") from error


def import_recording(path: Path, output: Path, description: Description, *, success: bool = False) -> ImportResult:
    """Turn a recording into a new dataset.

    Args:
        path: MCAP file with ROS 2 messages.
        output: folder of the new dataset.
        description: what the recording is about, see :func:`read_description`.
        success: label of a recording without episode marks, which is imported as one episode.

    Raises:
        DatasetError: the file is no MCAP recording, the dataset exists, or not one episode could be rebuilt.
    """
    refuse_existing(output)
    reader = BagReader(path)
    rebuild = _Rebuilder(description)
    steps, successes = [], 0
    skipped: list[str] = []
    finished = rebuild.episodes(reader.messages(rebuild.topics()), unmarked_success=success)
    # Look at the first episode before the folder is made, so that a wrong file leaves nothing behind.
    first = next(finished, None)
    if first is None:
        raise DatasetError(f"{path} shows no episode: {'; '.join(reader.damaged) or 'no robot was recorded'}.")
    with new_dataset(output, description.embodiment, {str(description.task["name"]): description.task}) as writer:
        episode: _Episode | None = first
        while episode is not None:
            try:
                arrays = rebuild.resample(episode)
                writer.add(arrays, _describe(episode, description, path, arrays))
                steps.append(len(arrays["actions"]))
                successes += episode.success
            except SimtorealError as error:
                skipped.append(f"episode {episode.number}: {error}")
            episode = next(finished, None)
        if not steps:
            raise DatasetError(f"{path}: no episode could be rebuilt:\n  " + "\n  ".join(skipped))
    return ImportResult(
        episodes=len(steps),
        successes=successes,
        steps=sum(steps),
        skipped=tuple(skipped),
        damaged=(*reader.damaged, *(f"{count} messages of {text}" for text, count in rebuild.refused.items())),
        notes=rebuild.notes(),
    )


def _describe(episode: _Episode, description: Description, path: Path, arrays: Arrays) -> EpisodeInfo:
    begun = datetime.datetime.fromtimestamp(episode.begin_ns * 1e-9, tz=datetime.UTC)
    texts = tuple(text for _, text in episode.instructions)
    extra = {"recording": path.name, "recorded_episode": episode.number}
    if episode.described is not None:
        info = EpisodeInfo.from_json(json.dumps(episode.described), path=path, steps=len(arrays["actions"]))
        return dataclasses.replace(
            info,
            embodiment=embodiment_digest(description.embodiment),
            instructions=texts,
            columns={name: columns for name, columns in info.columns.items() if f"step/{name}" in arrays},
            extra={**info.extra, **extra},
        )
    return EpisodeInfo(
        task=str(description.task["name"]),
        seed=episode.seed,
        success=episode.success,
        failure="" if episode.success else episode.failure,
        operator=description.operator,
        source=description.source,
        embodiment=embodiment_digest(description.embodiment),
        instruction=texts[-1] if texts else "",
        instructions=texts,
        milestones=episode.milestones,
        started=begun.isoformat(timespec="milliseconds"),
        duration_s=len(arrays["actions"]) * description.embodiment.control_period_s,
        commit=str(description.provenance.get("commit", "")),
        versions=dict(description.provenance.get("versions", {})),
        extra=extra,
    )


class _Rebuilder:
    """Collects messages until an episode is complete, and puts it on the grid of the control rate."""

    def __init__(self, description: Description) -> None:
        self.embodiment, self.robot = description.embodiment, description.robot
        self.kinematics = Kinematics(self.embodiment)
        self.joint_states = JointStates(self.robot, self.kinematics.joint_low_rad, self.kinematics.joint_high_rad)
        topics = self.robot.topics
        self.joints = Track(topics.joint_states.name)
        self.poses = Track(getattr(topics, self.robot.command).name)
        self.grippers = Track(topics.gripper_command.name)
        self.truths = Track(topics.twin_truth.name)
        names = [camera.name for camera in self.embodiment.cameras]
        self.images = {name: Track(self.robot.cameras[name].image.name) for name in names}
        self.refused: dict[str, int] = {}
        self._held: dict[int, str] = {}
        self._offsets_ns: dict[str, int] = {}

    def notes(self) -> tuple[str, ...]:
        """What the user should know about the episodes that were resampled."""
        offsets = (
            f"{name}: stamps are {abs(offset_ns) * 1e-9:.3f} s {'before' if offset_ns > 0 else 'after'} their arrival, "
            "which counts as another clock and not as a delay"
            for name, offset_ns in self._offsets_ns.items()
        )
        return *offsets, *(f"episode {number}: {text}" for number, text in self._held.items())

    def topics(self) -> list[str]:
        """Every topic that is needed."""
        return [MARKS_TOPIC, *(track.name for track in self._tracks())]

    def _tracks(self) -> list[Track]:
        return [self.joints, self.poses, self.grippers, self.truths, *self.images.values()]

    def episodes(self, messages: Iterator[Message], *, unmarked_success: bool) -> Iterator[_Episode]:
        """Yield each episode at the moment when its messages are there; :meth:`resample` it before the next one."""
        running: _Episode | None = None
        marked = False
        for message in self._understood(messages):
            if running is not None and running.end_ns and message.arrived_ns > running.end_ns + SETTLE_NS:
                yield running
                running = None
            if message.topic == MARKS_TOPIC:
                mark = message.content
                if mark["event"] == "begin":
                    if running is not None:
                        # The run was restarted, or episodes follow each other at once.
                        running.end_ns = running.end_ns or running.over_ns or message.arrived_ns
                        yield running
                    self._forget_before(message.arrived_ns - HISTORY_NS)
                    running = _Episode(int(mark["episode"]), int(mark["seed"]), message.arrived_ns)
                    running.instructions.append((message.arrived_ns, str(mark["instruction"])))
                    running.described = mark.get("described")
                    marked = True
                elif running is not None and not running.end_ns:
                    _apply(mark, message.arrived_ns, running)
                continue
            if marked and running is None:
                self._forget_before(message.arrived_ns - HISTORY_NS)
        if not marked:
            running = self._unmarked(unmarked_success)
        if running is not None:
            # An episode that the recording does not see the end of lasts as long as its sensors were recorded.
            running.end_ns = (
                running.end_ns or running.over_ns or max(running.begin_ns, int(self.joints.times().max(initial=0)))
            )
            yield running

    def _understood(self, messages: Iterator[Message]) -> Iterator[Message]:
        """Put every message on its track and yield it; marks are parsed, and what makes no sense is counted."""
        for message in messages:
            try:
                if message.topic == MARKS_TOPIC:
                    yield message._replace(content=_parse_mark(message.content.data))
                else:
                    self._store(message)
                    yield message
            except (RobotError, ValueError, KeyError, IndexError) as error:
                text = f"{message.topic}: {error}"
                self.refused[text] = self.refused.get(text, 0) + 1

    def _unmarked(self, success: bool) -> _Episode | None:
        needed = [self.joints, self.poses, *self.images.values()]
        if not all(track.stamps_ns for track in needed):
            return None
        begin = max(int(track.times()[0]) for track in needed)
        end = min(int(track.times()[-1]) for track in needed)
        return _Episode(0, 0, begin, end, success=success, failure="unknown")

    def _forget_before(self, arrived_ns: int) -> None:
        for track in self._tracks():
            track.forget_before(arrived_ns)

    def _store(self, message: Message) -> None:
        content = message.content
        stamp = message.published_ns
        if hasattr(content, "header"):
            stamp = content.header.stamp.sec * 1_000_000_000 + content.header.stamp.nanosec or stamp
        track = next(track for track in self._tracks() if track.name == message.topic)
        value = self._value(track, message)
        if track.is_after(message.arrived_ns):
            # Times of before would be taken for times of what follows.
            for every in self._tracks():
                every.forget()
        track.add(stamp, message.arrived_ns, value)

    def _value(self, track: Track, message: Message) -> Any:
        """What is kept of a message on its track."""
        content = message.content
        if track is self.joints:
            arm = self.joint_states.read(content, message.arrived_ns)
            return np.append(arm.joint_positions_rad, arm.opening)
        if track is self.poses:
            return self._commanded_pose(content)
        if track is self.grippers:
            return float(content.data)
        return content.data if track is self.truths else content

    def _commanded_pose(self, content: Any) -> np.ndarray:
        """Position and quaternion wxyz ``(7,)`` of a PoseStamped, or of a joint trajectory's last point."""
        if self.robot.command == "joint_trajectory":
            given = dict(zip(content.joint_names, content.points[-1].positions, strict=True))
            joints = np.array([given[name] for name in self.robot.joint_names])
            return np.concatenate(self.kinematics.forward(joints))
        position, turn = content.pose.position, content.pose.orientation
        pose = np.array([position.x, position.y, position.z, turn.w, turn.x, turn.y, turn.z])
        # One rotation has two quaternions; interpolation must not go through zero between them.
        if self.poses.values and pose[3:] @ self.poses.values[-1][3:] < 0:
            pose[3:] *= -1
        return pose

    def resample(self, episode: _Episode) -> Arrays:
        """Return the arrays of an episode, as in :mod:`simtoreal.data_collection.episode`.

        Raises:
            DatasetError: too short, or an input was silent for longer than the robot tolerates.
        """
        period_ns = round(1e9 * self.embodiment.control_period_s)
        steps = round((episode.end_ns - episode.begin_ns) / period_ns)
        if steps < 1:
            raise DatasetError("it is shorter than one control step")
        limits = self.robot.staleness
        longest_ns = 1e9 * self._longest_s(limits.joint_states_s)
        if steps * period_ns > longest_ns * (len(self.joints.values) + 1):
            # A clock that was set by years makes a grid that does not fit into the memory.
            raise DatasetError(f"{self.joints.name} is silent for most of its {steps * period_ns * 1e-9:.0f} s")
        ticks = episode.begin_ns + period_ns * np.arange(steps + 1)
        seen = self._observed(ticks[:-1], episode.number)
        arm = self.joints.interpolate(seen, limits.joint_states_s, limits.joint_states_s)
        joints, openings = arm[:, :-1], arm[:, -1]
        forward = [self.kinematics.forward(row) for row in joints]
        positions = np.stack([position for position, _ in forward])
        quaternions = np.stack([quaternion for _, quaternion in forward])
        targets = self._targets(ticks, np.concatenate([positions[0], quaternions[0]]))
        delta = self.embodiment.action.mode == "ee_delta"
        actions = action_towards(targets[:-1], targets[1:], self.embodiment) if delta else targets[1:]
        proprio = build_proprio(positions, rotation.to_matrix(quaternions), targets[:-1, :3], openings, joints)
        last = np.arange(steps) == steps - 1
        starts = [start for start, _ in episode.instructions[1:]]
        arrays: Arrays = {
            "actions": actions.astype(np.float32),
            "rewards": (last & episode.success).astype(np.float32),
            "dones": (last & episode.success).astype(np.int8),
            "states": np.empty((steps, 0)),
            "obs/proprio": proprio,
            "step/target": targets[1:],
            "step/timestamp_ns": ticks[:-1],
            "step/instruction": np.searchsorted(starts, ticks[:-1], side="right").astype(np.int32),
        }
        for camera in self.embodiment.cameras:
            arrays[f"obs/{camera.name}_image"] = self._images(camera.name, seen)
        if self.truths.stamps_ns:
            texts = self.truths.newest(seen, limits.stop_s)
            arrays |= truth_arrays(texts, episode.described)
        for track in self._tracks():
            offset_ns = int(np.median(track.offsets())) if track.stamps_ns else 0
            if abs(offset_ns) > CLOCK_STEP_NS:
                self._offsets_ns.setdefault(track.name, offset_ns)
        return arrays

    def _longest_s(self, limit_s: float) -> float:
        """Seconds without an input, stale after ``limit_s``, that an episode goes on for or ends by.

        That the robot holds is found up to a control period late, and so is that it has held for too long.
        """
        return limit_s + self.robot.staleness.stop_s + 2 * self.embodiment.control_period_s

    def _observed(self, ticks: np.ndarray, episode: int) -> np.ndarray:
        """Return when what is observed at each tick was observed: now, or before an input became stale.

        Raises:
            DatasetError: an input is silent for longer than a robot holds.
        """
        limits = self.robot.staleness
        held = np.zeros(len(ticks), dtype=bool)
        silent = []
        inputs = [(self.joints, limits.joint_states_s)]
        for track, limit_s in inputs + [(track, limits.camera_s) for track in self.images.values()]:
            ages_s, longest_s = track.ages_s(ticks), self._longest_s(limit_s)
            stale = ages_s > limit_s
            if stale[0] or ages_s.max() > longest_s:
                most_s = limit_s if stale[0] else longest_s
                raise DatasetError(f"{track.name} is silent for {ages_s.max():.2f} s (at most {most_s:g} s)")
            if stale.any():
                held |= stale
                silent.append(track.name)
        if silent:
            self._held[episode] = (
                f"{held.sum()} of {len(ticks)} steps repeat an observation, as a robot does while it holds "
                f"(silent: {', '.join(silent)})"
            )
        return np.asarray(ticks[np.maximum.accumulate(np.where(held, 0, np.arange(len(ticks))))])

    def _targets(self, ticks: np.ndarray, home: np.ndarray) -> np.ndarray:
        """Commanded targets ``(len(ticks), 10)``; until the first command of the episode the target is at ``home``."""
        commands, grippers = Track(self.poses.name), Track(self.grippers.name)
        start = int(ticks[0])
        for own, recorded, initial in ((commands, self.poses, home), (grippers, self.grippers, 1.0)):
            times = recorded.times().tolist()
            if start not in times:
                own.add(start, start, initial)
            for time_ns, value in zip(times, recorded.values, strict=True):
                if time_ns >= start:  # a command before belongs to the previous episode
                    own.add(time_ns, time_ns, value)
        if len(commands.values) > 1 and commands.values[0][3:] @ commands.values[1][3:] < 0:
            commands.values[0] = np.concatenate([commands.values[0][:3], -commands.values[0][3:]])
        # Commands may be as far apart as control steps; a longer silence means that the target stayed where it was.
        gap_s = max(self.robot.staleness.joint_states_s, 1.5 * self.embodiment.control_period_s)
        poses = commands.interpolate(ticks, np.inf, gap_s)
        openings = np.array(grippers.newest(ticks, np.inf))[:, None]
        return np.concatenate([normalized_pose(poses), openings], axis=1)

    def _images(self, camera_name: str, ticks: np.ndarray) -> np.ndarray:
        camera = next(camera for camera in self.embodiment.cameras if camera.name == camera_name)
        track = self.images[camera_name]
        images: list[np.ndarray] = []
        decoded: Any = None
        for message in track.newest(ticks, self.robot.staleness.camera_s):
            if message is not decoded:
                image = fit_image(decode_message(message, track.name), camera.height, camera.width)
                decoded = message
            images.append(image)
        return np.stack(images)


def _parse_mark(text: str) -> dict[str, Any]:
    """Return a mark with every key that its event needs.

    Raises:
        ValueError: not JSON, or a key is missing or of the wrong type.
    """
    mark = json.loads(text)
    needed: dict[str, dict[str, type]] = {
        "begin": {"episode": int, "seed": int, "instruction": str},
        "instruction": {"instruction": str},
        "end": {"success": bool, "failure": str, "milestones": dict},
    }
    for key, kind in needed.get(mark["event"], {}).items():
        if not isinstance(mark.get(key), kind):
            raise ValueError(f"mark '{mark['event']}' has {key} {mark.get(key)!r}; expected {kind.__name__}")
    return dict(mark)


def _apply(mark: dict[str, Any], at_ns: int, episode: _Episode) -> None:
    if mark["event"] == "instruction":
        episode.instructions.append((at_ns, str(mark["instruction"])))
    elif mark["event"] == "over":
        episode.over_ns = at_ns
    elif mark["event"] == "end":
        episode.end_ns = episode.over_ns or at_ns
        episode.success = bool(mark["success"])
        episode.failure = str(mark["failure"])
        episode.milestones = {str(name): bool(reached) for name, reached in mark["milestones"].items()}
