"""The process of the safety gate: the only publisher of commands, between a runtime it does not trust and the robot."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from simtoreal.envs.config import build_config
from simtoreal.envs.embodiment import Embodiment
from simtoreal.robot.gate_limits import GateLimits
from simtoreal.robot.gate_logic import Command, GateLogic
from simtoreal.robot.gate_messages import ARM, CLOSE, MAX_BYTES, REST, TARGET, GateStatus, Request
from simtoreal.robot.joint_guard import JointGuard
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.timing import PeriodicClock, realtime
from simtoreal.robot.topics import RobotConfig, Topic, ros_graph, start_ros

PERIOD_S = 0.008  # 125 Hz
REALTIME_PRIORITY = 20
# In ticks: how often services and the graph are looked at (they cost more than topics), and status is told.
SERVICE_TICKS, GRAPH_TICKS, STATUS_TICKS, ROS_STATUS_TICKS, GRIPPER_TICKS = 5, 31, 5, 25, 12
# After the runtime is gone the pose is held this long; then the arm's own controller holds the last command.
LINGER_S = 1.0


class GateNode:
    """Connects the gate's logic to the ROS graph and to the runtime's socket.

    Args:
        channel: ``SOCK_SEQPACKET`` end of the gate.
        config, limits, embodiment, require_estop: what the runtime asked for when it started the gate.
        realtime_granted: told in the status.
    """

    def __init__(
        self,
        channel: socket.socket,
        config: RobotConfig,
        limits: GateLimits,
        embodiment: Embodiment,
        *,
        require_estop: bool = False,
        realtime_granted: bool = False,
    ) -> None:
        from geometry_msgs.msg import PoseStamped
        from rclpy.event_handler import SubscriptionEventCallbacks
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node
        from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
        from std_msgs.msg import Float64, String
        from std_srvs.srv import Trigger

        self._channel = channel
        self._channel.setblocking(False)
        self._config, self._require_estop, self._realtime = config, require_estop, realtime_granted
        self._context = start_ros()
        self._node = Node("simtoreal_gate", context=self._context, use_global_arguments=False)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        kinematics = Kinematics(embodiment)
        self._logic = GateLogic(
            config, limits, JointGuard(kinematics, limits), PERIOD_S, embodiment.control_period_s,
            require_estop=require_estop,
        )  # fmt: skip
        topics = config.topics
        self._inputs: list[tuple[Any, type, Callable[[Any], None]]] = []
        self._subscribe(topics.joint_states, topics.joint_states.qos(), self._on_joint_state)
        # No one subscription fits every publisher: best-effort ones are heard by the first only, presses that were
        # latched before the gate started by the last only, and the second loses nothing.
        reliable, best_effort = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT
        volatile, latched = DurabilityPolicy.VOLATILE, DurabilityPolicy.TRANSIENT_LOCAL
        # No warnings about publishers that do not fit one of them; another one hears them.
        self._estop_events = SubscriptionEventCallbacks(incompatible_qos=lambda event: None)
        for reliability in (best_effort, reliable):
            qos = QoSProfile(depth=10, reliability=reliability, durability=volatile)
            self._subscribe(topics.estop, qos, self._on_estop, self._estop_events)
        # Of latched presses only the newest counts.
        self._estop_latched = QoSProfile(depth=1, reliability=reliable, durability=latched)
        self._subscribe(topics.estop, self._estop_latched, self._on_estop, self._estop_events)
        self._estop_problem = ""
        self._pose = PoseStamped()
        self._pose.header.frame_id = config.base_frame
        self._opening, self._opening_sent = Float64(), -1.0
        self._text = String()
        self._pose_publisher = self._publisher(topics.target_pose)
        self._gripper_publisher = self._publisher(topics.gripper_command)
        self._status_publisher = self._publisher(topics.gate_status)
        self._owned = [topics.target_pose.name, topics.gripper_command.name]
        self._joints = None
        if config.command == "joint_trajectory":
            from simtoreal.robot.joint_commands import JointCommands

            publisher, home = self._publisher(topics.joint_trajectory), np.array(embodiment.home_joint_positions_rad)
            self._joints = JointCommands(kinematics, config, publisher, PERIOD_S, home)
            self._owned.append(topics.joint_trajectory.name)
        self._service = self._node.create_service(Trigger, config.services.gate_rearm, self._on_rearm)
        self._handled = 0
        self._watched: dict[int, int] = {}  # process id -> pidfd
        self._gone_ns: int | None = None
        self._closing = False
        self._ticks = self._published = 0
        self._interval_count, self._interval_ns = 0, 0
        self._published_ns: int | None = None
        self._told: tuple[str, str] = ("", "")
        self._clock = PeriodicClock(PERIOD_S)

    def run(self) -> None:
        """Run until the runtime closes the gate, or for a moment after it has died."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the runtime; its end stops the robot
        signal.signal(signal.SIGTERM, lambda *_: self._runtime_gone("gate was told to end"))
        self._tell(force=True)
        self._clock.restart()
        while not self._finished():
            self._clock.wait()
            self._tick(time.monotonic_ns())
        status = self._status(timing=self._clock.summary().to_dict())
        with contextlib.suppress(OSError):
            self._channel.send(status.to_json().encode())

    def close(self) -> None:
        """Leave the graph."""
        for descriptor in self._watched.values():
            os.close(descriptor)
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.shutdown()
        self._channel.close()

    # ---- one tick

    def _tick(self, now_ns: int) -> None:
        self._ticks += 1
        self._read_inputs()
        self._read_requests(now_ns)
        self._check_watched()
        if self._ticks % SERVICE_TICKS == 0:
            self._executor.spin_once(timeout_sec=0.0)
        if self._ticks % GRAPH_TICKS == 0:
            self._logic.on_foreign_publishers(self._foreign_publishers())
            self._look_for_estop()
        command = self._logic.tick(now_ns)
        if command is None:
            self._published_ns = None
        else:
            self._publish(command)
        self._tell()

    def _read_inputs(self) -> None:
        # Taking directly costs a tenth of an executor's wait set, and a tick needs no waiting.
        for subscription, message_class, handle in self._inputs:
            with subscription.handle:
                while (taken := subscription.handle.take_message(message_class, False)) is not None:
                    handle(taken[0])

    def _read_requests(self, now_ns: int) -> None:
        while self._gone_ns is None:
            try:
                content = self._channel.recv(MAX_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._runtime_gone(f"connection to the runtime broke: {error}")
                return
            if not content:
                self._runtime_gone("the runtime has died")
                return
            try:
                self._handle(Request.unpack(content), now_ns)
            except ValueError as error:
                self._logic.stop("bad_message", str(error))

    def _handle(self, request: Request, now_ns: int) -> None:
        if request.kind == TARGET:
            self._logic.on_target(request, now_ns)
        elif request.kind == ARM:
            self._logic.on_foreign_publishers(self._foreign_publishers())
            self._look_for_estop()
            self._logic.arm(request.episode, now_ns)
        elif request.kind == CLOSE:
            self._closing = True
            self._logic.rest("closed by the runtime")
        elif request.kind == REST:
            self._logic.rest("the episode is over")
        else:
            self._watch(request.extra)
        self._handled = request.sequence
        if request.kind != TARGET:
            self._tell(force=True)

    def _watch(self, process: int) -> None:
        if process not in self._watched:
            try:
                self._watched[process] = os.pidfd_open(process)
            except OSError as error:
                self._logic.stop("process_died", f"process {process} cannot be watched: {error}")

    def _check_watched(self) -> None:
        if self._watched and select.select(list(self._watched.values()), [], [], 0)[0]:
            dead = [pid for pid, fd in self._watched.items() if select.select([fd], [], [], 0)[0]]
            for process in dead:
                os.close(self._watched.pop(process))
            self._logic.stop("process_died", f"process {dead[0]}, which computes the actions, has died")

    def _runtime_gone(self, reason: str) -> None:
        if self._gone_ns is None:
            self._gone_ns = time.monotonic_ns()
            self._logic.stop("runtime_gone", reason)

    def _finished(self) -> bool:
        if self._closing:
            return self._logic.at_rest
        return self._gone_ns is not None and time.monotonic_ns() - self._gone_ns > LINGER_S * 1e9

    # ---- the ROS graph

    def _publisher(self, topic: Topic) -> Any:
        return self._node.create_publisher(topic.message_class(), topic.name, topic.qos())

    def _subscribe(self, topic: Topic, qos: Any, handle: Callable[[Any], None], events: Any = None) -> None:
        message_class = topic.message_class()
        subscription = self._node.create_subscription(message_class, topic.name, handle, qos, event_callbacks=events)
        self._inputs.append((subscription, message_class, handle))

    def _on_joint_state(self, message: Any) -> None:
        stamp = message.header.stamp
        self._logic.on_joint_state(
            message.name, message.position, message.velocity,
            stamp.sec * 1_000_000_000 + stamp.nanosec, time.monotonic_ns(),
        )  # fmt: skip

    def _on_rearm(self, request: Any, response: Any) -> Any:
        self._logic.on_foreign_publishers(self._foreign_publishers())
        response.success, response.message = self._logic.rearm(time.monotonic_ns())
        return response

    def _on_estop(self, message: Any) -> None:
        self._logic.on_estop(bool(message.data))

    def _look_for_estop(self) -> None:
        problem = self._missing_estop()
        if self._estop_problem and not problem:
            # The same button after an interruption of the network: what it latched was delivered once, and is
            # delivered again to a new subscription only.
            subscription, *_ = self._inputs.pop()
            self._node.destroy_subscription(subscription)
            self._subscribe(self._config.topics.estop, self._estop_latched, self._on_estop, self._estop_events)
        self._estop_problem = problem
        self._logic.on_missing_estop(problem)

    def _missing_estop(self) -> str:
        topic = self._config.topics.estop
        if not self._require_estop:
            return ""
        types = [info.topic_type for info in self._node.get_publishers_info_by_topic(topic.name)]
        if topic.type in types:
            return ""
        # What is published as another type is never heard.
        others = f" (only as {', '.join(sorted(set(types)))})" if types else ""
        return (
            f"nobody publishes the emergency stop {topic.name} as {topic.type}{others} in {ros_graph()}. "
            "Start the node of its button (true: pressed), or set 'require_estop: false' in the robot yaml when the "
            "arm's own emergency stop is in your hand"
        )

    def _foreign_publishers(self) -> str:
        found = []
        for name in (*self._owned, self._config.topics.joint_states.name):
            # A publisher can be seen before the name of its node is: that arrives by a topic of its own.
            others = [
                info.node_name.replace("_NODE_NAME_UNKNOWN_", "a node that just appeared")
                for info in self._node.get_publishers_info_by_topic(name)
            ]
            if name in self._owned:
                with contextlib.suppress(ValueError):
                    others.remove(self._node.get_name())
            elif len(others) == 1:
                continue  # the robot itself
            if others:
                found.append(f"{name} by {', '.join(sorted(others))}")
        return "; ".join(found)

    def _publish(self, command: Command) -> None:
        if self._joints is not None:
            if command.starting:
                self._joints.restart(self._logic.measured_joints)
            problem = self._joints.publish(command.position, command.quaternion)
            if problem:
                self._logic.stop("unreachable", problem)
        else:
            pose = self._pose.pose
            pose.position.x, pose.position.y, pose.position.z = command.position.tolist()
            q = pose.orientation
            q.w, q.x, q.y, q.z = command.quaternion.tolist()
            self._pose.header.stamp = self._node.get_clock().now().to_msg()
            self._pose_publisher.publish(self._pose)
        now_ns = time.monotonic_ns()
        self._published += 1
        if self._published_ns is not None:
            self._interval_count += 1
            self._interval_ns += now_ns - self._published_ns
        self._published_ns = now_ns
        if command.opening is not None and (command.opening != self._opening_sent or self._ticks % GRIPPER_TICKS == 0):
            self._opening.data = self._opening_sent = command.opening
            self._gripper_publisher.publish(self._opening)

    # ---- telling

    def _status(self, timing: dict[str, Any] | None = None) -> GateStatus:
        return dataclasses.replace(
            self._logic.status(), handled=self._handled, published=self._published,
            publish_hz=self._interval_count / (self._interval_ns * 1e-9) if self._interval_ns else 0.0,
            stamp_ns=time.monotonic_ns(), realtime=self._realtime, timing=timing,
        )  # fmt: skip

    def _tell(self, force: bool = False) -> None:
        changed = force or (self._logic.state, self._logic.reason) != self._told
        if not changed and self._ticks % STATUS_TICKS:
            return
        text = self._status().to_json()
        with contextlib.suppress(OSError):  # a runtime that does not read is no reason to wait
            self._channel.send(text.encode())
        if changed or self._ticks % ROS_STATUS_TICKS == 0:
            self._told = (self._logic.state, self._logic.reason)
            self._text.data = text
            self._status_publisher.publish(self._text)


def run_gate(descriptor: int) -> None:
    """Serve the runtime at the other end of the inherited socket ``descriptor``."""
    channel = socket.socket(fileno=descriptor)
    setup = json.loads(channel.recv(MAX_BYTES))
    with realtime(REALTIME_PRIORITY) as granted:
        node = GateNode(
            channel,
            build_config(RobotConfig, setup["config"], source="robot configuration of the runtime"),
            build_config(GateLimits, setup["limits"], source="limits of the runtime"),
            Embodiment.from_dict(setup["embodiment"]),
            require_estop=setup["require_estop"],
            realtime_granted=granted,
        )
        try:
            node.run()
        finally:
            node.close()
