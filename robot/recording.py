"""Recording of a deployed run: everything on the robot's topics into one MCAP file that rosbag2 and Foxglove read.

The recorder is a process of its own that never deserialises a message, so it costs the control loop nothing. What is
on disk survives SIGKILL: at most the last chunk (``CHUNK_BYTES`` or ``POLL_S``) is lost, and readers of a file without
an end simply stop there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError, RobotError, require
from simtoreal.envs.provenance import provenance
from simtoreal.envs.rollout import EpisodeResult, Listener, Observation, Step
from simtoreal.robot.topics import RobotConfig, Topic, start_ros

# Begin and end of episodes, as JSON text. Not a topic on the graph: the runtime hands its marks to the recorder.
MARKS_TOPIC = "/simtoreal/episode"
MARKS_TYPE = "std_msgs/msg/String"
METADATA = "simtoreal"

CHUNK_BYTES = 64 * 1024
# Queues are emptied at this period; deep enough for a kilohertz topic.
POLL_S = 0.05
QUEUE_DEPTH = 200
# Data reach the disk this often, so that a power cut loses no more.
SYNC_S = 1.0
START_TIMEOUT_S = 30.0
# What speaks steadily is waited for this long before the run begins; only silent topics take all of it.
DISCOVERY_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 15.0

_PRIMITIVES = {"double": "float64", "float": "float32", "boolean": "bool", "octet": "byte"}


class RunRecorder(Listener):
    """Records the topics of a robot while its context is open, and marks the episodes of a rollout it listens to.

    Args:
        path: file to write, e.g. ``outputs/deploy/run.mcap``.
        robot: topics to record.
        embodiment, task: stored in the file (``task`` as plain dictionary), for the import as a dataset.
        source: ``twin`` or ``robot``.
        operator: who acts, e.g. the name of the policy.

    Raises:
        DatasetError: the file exists already.
        MissingDependencyError: rclpy or mcap is not installed.
        RobotError: the recorder did not start.
    """

    def __init__(
        self,
        path: Path,
        robot: RobotConfig,
        *,
        embodiment: Embodiment,
        task: dict[str, Any],
        source: str,
        operator: str,
    ) -> None:
        if path.exists():
            raise DatasetError(f"{path} exists; recordings are never overwritten. Choose another name or move it away.")
        require("mcap.writer", "ros", package="mcap")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.messages = 0
        self._problem = ""
        self._finished = False
        description = {
            "embodiment": json.dumps(embodiment.to_dict()),
            "robot": json.dumps(dataclasses.asdict(robot)),
            "task": json.dumps(task),
            "source": source,
            "operator": operator,
            "provenance": json.dumps(provenance()),
        }
        context = multiprocessing.get_context("spawn")
        self._link, remote = context.Pipe()
        self._process = context.Process(
            target=_record, args=(str(path), robot, description, remote), name="recorder", daemon=True
        )
        self._process.start()
        remote.close()
        self._await("ready", START_TIMEOUT_S)

    @property
    def problem(self) -> str:
        """Why recording has stopped early (disk full, recorder killed), or an empty text. Cheap enough per step."""
        if not self._problem:
            # Asked before its last words are read, so that these count and not its end.
            alive = self._process.is_alive()
            with contextlib.suppress(EOFError, OSError):
                while self._link.poll():
                    self._take(self._link.recv())
            if not self._problem and not self._finished and not alive:
                self._problem = f"the recorder ended with exit status {self._process.exitcode}"
        return self._problem

    def mark(self, event: str, **content: Any) -> None:
        """Note an event with its time in the recording; never waits and never fails the run.

        Args:
            event: ``begin``, ``instruction`` or ``end`` of an episode; ``over`` where its motion ends before it is
                judged; or anything of your own.
            content: JSON-compatible.
        """
        with contextlib.suppress(OSError):
            self._link.send((time.monotonic_ns(), {"event": event, **content}))

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        self._instruction = str(info.get("instruction", ""))
        self.mark("begin", episode=episode, seed=seed, instruction=self._instruction)

    def on_step(self, step: Step) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`.

        Raises:
            RobotError: recording has stopped. The run ends here, rather than going on unrecorded.
        """
        if self.problem:
            raise RobotError(
                f"{self.path} is not recorded any more: {self.problem}. What was recorded before is intact, and the "
                "running episode is not counted. Mend that and run the same command again, which continues"
            )
        instruction = str(step.info["instruction"][0]) if "instruction" in step.info else self._instruction
        if instruction != self._instruction:
            self._instruction = instruction
            self.mark("instruction", instruction=instruction)

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        self.mark(
            "end",
            episode=result.episode,
            success=result.success,
            failure=result.failure,
            steps=result.steps,
            milestones=result.milestones,
        )

    def close(self) -> int:
        """Finish the file and return the number of recorded messages; may be called twice.

        Raises:
            RobotError: recording had stopped early; what was written until then is intact.
        """
        if not self.problem and not self._finished:
            with contextlib.suppress(OSError):
                self._link.send(None)
            with contextlib.suppress(RobotError):
                self._await("finished", STOP_TIMEOUT_S)
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._problem = self._problem or "the recorder did not stop and was killed"
        if self._problem:
            raise RobotError(f"{self.path} is incomplete: {self._problem}. What was recorded before is intact.")
        return self.messages

    def _await(self, kind: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._problem:
            try:
                if not self._link.poll(max(0.0, deadline - time.monotonic())):
                    self._problem = f"no sign of being {kind} within {timeout_s:g} s"
                    break
                if self._take(self._link.recv()) == kind:
                    return
            except (EOFError, OSError):
                self._process.join(1.0)
                self._problem = f"it ended with exit status {self._process.exitcode}"
        raise RobotError(f"the recorder of {self.path} failed: {self._problem}")

    def _take(self, report: tuple[str, Any]) -> str:
        kind, content = report
        if kind == "failed":
            self._problem = str(content)
        elif kind == "finished":
            self.messages, self._finished = int(content), True
        return kind

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A lost recording must not hide why the run itself failed.
        with contextlib.suppress(*([RobotError] if kind is not None else [])):
            self.close()


def recorded_topics(robot: RobotConfig) -> dict[str, str]:
    """Return name -> type of every topic that is recorded."""
    topics: list[Topic] = list(vars(robot.topics).values())
    for camera in robot.cameras.values():
        topics += [topic for topic in (camera.image, camera.camera_info) if topic is not None]
    return {topic.name: topic.type for topic in topics}


def message_definition(message_class: type) -> str:
    """Return the definition of a message and of every message inside it, in rosbag2's ``ros2msg`` form.

    It is made from the Python class, so it is what is really on the wire; constants and defaults, which are not, are
    left out.
    """
    parts: dict[str, str] = {}

    def visit(cls: type) -> str:
        lines = []
        for name, kind in cls.get_fields_and_field_types().items():  # type: ignore[attr-defined]
            match = re.fullmatch(r"sequence<(.+?)(?:, (\d+))?>|(.+?)\[(\d+)\]|(.+)", kind)
            if match is None:
                raise RobotError(f"field '{name}' of {cls.__name__} has the type '{kind}', which is not understood")
            inner = match[1] or match[3] or match[5]
            suffix = ("[]" if match[2] is None else f"[<={match[2]}]") if match[1] else ""
            suffix = f"[{match[4]}]" if match[3] else suffix
            inner = re.sub(r"(w?string)<(\d+)>", r"\1<=\2", _PRIMITIVES.get(inner, inner))
            lines.append(f"{inner}{suffix} {name}")
            if "/" in inner and inner not in parts:
                parts[inner] = ""  # reserved, so that the order is that of first use
                package, nested = inner.split("/")
                parts[inner] = visit(getattr(require(f"{package}.msg", "ros"), nested))
        return "\n".join(lines)

    main = visit(message_class)
    return "\n".join([main, *(f"{'=' * 80}\nMSG: {name}\n{text}" for name, text in parts.items())]) + "\n"


class _File:
    """An MCAP file under construction."""

    def __init__(self, path: str, description: dict[str, str]) -> None:
        from mcap.writer import CompressionType, Writer

        self._stream = open(path, "xb")  # noqa: SIM115 - closed by finish
        self._writer = Writer(self._stream, chunk_size=CHUNK_BYTES, compression=CompressionType.LZ4)
        self._writer.start(profile="ros2", library="simtoreal")
        self._writer.add_metadata(METADATA, description)
        self._sequences: dict[int, int] = {}
        self._synced = time.monotonic()
        self.messages = 0

    def add_channel(self, topic: str, type_name: str) -> int:
        """Register a topic and return its channel."""
        package, _, name = type_name.split("/")
        message_class = getattr(require(f"{package}.msg", "ros"), name)
        definition = message_definition(message_class).encode()
        schema = self._writer.register_schema(type_name, "ros2msg", definition)
        channel = self._writer.register_channel(topic, "cdr", schema)
        self._sequences[channel] = 0
        return channel

    def add(self, channel: int, data: bytes, received_ns: int, published_ns: int) -> None:
        """Append a serialised message."""
        self._writer.add_message(channel, received_ns, data, published_ns, self._sequences[channel])
        self._sequences[channel] += 1
        self.messages += 1

    def flush(self) -> None:
        """Hand finished chunks to the operating system, and now and then to the disk."""
        self._stream.flush()
        if time.monotonic() - self._synced > SYNC_S:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def finish(self) -> None:
        """Write index and footer, and close."""
        self._writer.finish()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _record(path: str, robot: RobotConfig, description: dict[str, str], link: Connection) -> None:
    """Body of the recorder process."""
    # Ctrl-C, and the end of a terminal, reach the whole process group; the runtime ends the run and then tells us to
    # stop, or dies, which ends the link. Who ends processes one by one (timeout, systemd, a scheduler) ends this one,
    # too; its file gets an end all the same.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    os.nice(5)
    try:
        file = _File(path, description)
        with _subscriptions(robot) as subscriptions:
            channels = {topic: file.add_channel(topic, kind) for topic, kind in recorded_topics(robot).items()}
            marks = file.add_channel(MARKS_TOPIC, MARKS_TYPE)
            # Nodes find each other in their own time. Commands begin with the first episode and would be missed, so
            # the run waits until their sender, the gate, is heard.
            unheard = {robot.topics.joint_states.name, robot.topics.gate_status.name}
            unheard |= {camera.image.name for camera in robot.cameras.values()}
            deadline = time.monotonic() + DISCOVERY_TIMEOUT_S
            stopping = ready = False
            while not stopping:
                if not ready and (not unheard or time.monotonic() > deadline):
                    link.send(("ready", None))
                    ready = True
                # Marks first: what is on the topics when the stop is seen still gets recorded.
                stopping = _take_marks(link, file, marks) or terminated.is_set()
                time.sleep(POLL_S)
                for topic, subscription in subscriptions.items():
                    if _drain(subscription, file, channels[topic]):
                        unheard.discard(topic)
                file.flush()
        file.finish()
        # A run must not go on unrecorded.
        told = ("failed", "it was told to end (SIGTERM)") if terminated.is_set() else ("finished", file.messages)
        with contextlib.suppress(BrokenPipeError):  # nobody is left to be told
            link.send(told)
    except OSError as error:
        with contextlib.suppress(OSError):
            link.send(("failed", f"{path}: {error.strerror or error}"))


def _take_marks(link: Connection, file: _File, channel: int) -> bool:
    """Write the marks of the runtime; return whether to stop (also when the runtime has died)."""
    from rclpy.serialization import serialize_message
    from std_msgs.msg import String

    try:
        while link.poll():
            mark = link.recv()
            if mark is None:
                return True
            made_ns, content = mark
            text = json.dumps(content, allow_nan=False)
            # The other messages carry the time of the middleware, which is that of the system clock.
            wall_ns = time.clock_gettime_ns(time.CLOCK_REALTIME) - (time.monotonic_ns() - made_ns)
            file.add(channel, serialize_message(String(data=text)), wall_ns, wall_ns)
    except EOFError:
        return True
    return False


@contextlib.contextmanager
def _subscriptions(robot: RobotConfig) -> Iterator[dict[str, Any]]:
    """Subscribe to everything; the queues are emptied by polling, which is far cheaper than a wake-up per message."""
    context = start_ros()
    from rclpy.node import Node
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    # Best effort hears reliable publishers too, and can never make one wait for us.
    qos = QoSProfile(depth=QUEUE_DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)
    node = Node("simtoreal_recorder", context=context, use_global_arguments=False)
    try:
        found = {}
        for topic, kind in recorded_topics(robot).items():
            package, _, name = kind.split("/")
            message_class = getattr(require(f"{package}.msg", "ros"), name)
            found[topic] = node.create_subscription(message_class, topic, lambda _: None, qos, raw=True)
        yield found
    finally:
        node.destroy_node()
        context.shutdown()


def _drain(subscription: Any, file: _File, channel: int) -> int:
    """Write what the queue holds; return how many messages."""
    before = file.messages
    with subscription.handle:
        while (taken := subscription.handle.take_message(subscription.msg_type, True)) is not None:
            data, info = taken
            received = int(info["received_timestamp"])
            file.add(channel, data, received, int(info["source_timestamp"]) or received)
    return file.messages - before
