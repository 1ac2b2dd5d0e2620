"""The gate's real process on a real ROS 2 graph, against an arm node that states its joints and keeps commands."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra 'ros')")

from simtoreal.envs import rotation
from simtoreal.envs.errors import SafetyError
from simtoreal.envs.panda import HOME_RAD, panda_embodiment
from simtoreal.robot.gate import SafetyGate
from simtoreal.robot.gate_limits import GateLimits
from simtoreal.robot.gate_messages import GateStatus
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.timing import PeriodicClock
from simtoreal.robot.topics import RobotConfig, load_robot_config, start_ros

pytestmark = pytest.mark.realtime


def lossless(config: RobotConfig) -> RobotConfig:
    """Deep queues for commands: the gate's newest-only ones may skip some for a busy reader, but here all count."""
    topics = config.topics
    deep = {name: dataclasses.replace(getattr(topics, name), depth=200) for name in ("target_pose", "joint_trajectory")}
    return dataclasses.replace(config, topics=dataclasses.replace(topics, **deep))


CONFIG = lossless(load_robot_config())
EMBODIMENT = panda_embodiment()
LIMITS = GateLimits.for_embodiment(EMBODIMENT)
# A runtime that moves the arm to and fro at full speed until it is killed. Given a checkpoint, it runs its inference
# process too, and stays alive itself.
RUNTIME = """
import contextlib, sys, time
import numpy as np
from tests.test_gate_process import CONFIG, EMBODIMENT, LIMITS, home_target
from simtoreal.envs.errors import SafetyError
from simtoreal.robot.gate import SafetyGate
from simtoreal.robot.inference import InferenceProcess
from simtoreal.robot.timing import PeriodicClock
inference = InferenceProcess(sys.argv[1], device="cpu") if len(sys.argv) > 1 else None
gate = SafetyGate.start(CONFIG, LIMITS, EMBODIMENT)
if inference is not None:
    gate.watch(inference.pid)
gate.begin_episode(1)
target, clock, direction = home_target(), PeriodicClock(0.05), 1.0
print(gate.pid, inference.pid if inference else 0, flush=True)
while True:
    if not gate.holding():  # as every runtime: what goes on while the arm is held stops it for good
        direction = -direction if abs(target[1] + 0.02 * direction) > 0.1 else direction
        target[1] += 0.02 * direction
    with contextlib.suppress(SafetyError):
        gate.send_target(target, time.monotonic_ns(), 1)
    clock.wait()
"""


def home_target() -> np.ndarray:
    position, quaternion = Kinematics(EMBODIMENT).forward(np.array(HOME_RAD))
    return np.concatenate([position, rotation.to_6d(quaternion), [1.0]])


class ArmNode:
    """A node that stands still at home, says so at 100 Hz, and keeps the commands it receives."""

    def __init__(self) -> None:
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node

        self.context = start_ros()
        self.node = Node("arm", context=self.context, use_global_arguments=False)
        self.poses: list[tuple[int, np.ndarray]] = []
        self.openings: list[float] = []
        self.silent = False
        topics = CONFIG.topics
        self.joints = self.node.create_publisher(topics.joint_states.message_class(), topics.joint_states.name, 1)
        self.estop = self.node.create_publisher(topics.estop.message_class(), topics.estop.name, topics.estop.qos())
        pose = topics.target_pose
        self.node.create_subscription(pose.message_class(), pose.name, self._on_pose, pose.qos())
        gripper = topics.gripper_command
        self.node.create_subscription(
            gripper.message_class(), gripper.name, lambda message: self.openings.append(message.data), gripper.qos()
        )
        self.node.create_timer(0.01, self._publish)
        self.faults: dict[str, int] = {}
        status = topics.gate_status
        self.node.create_subscription(status.message_class(), status.name, self._on_status, status.qos())
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self._spin, daemon=True)
        self.thread.start()

    def _spin(self) -> None:
        from rclpy.executors import ExternalShutdownException

        try:
            self.executor.spin()
        except ExternalShutdownException:
            return

    def _publish(self) -> None:
        if self.silent:
            return
        message = CONFIG.topics.joint_states.message_class()()
        message.header.stamp = self.node.get_clock().now().to_msg()
        message.name = list(reversed(CONFIG.joint_names))  # any order will do
        message.position = list(reversed(HOME_RAD))
        self.joints.publish(message)

    def _on_pose(self, message: object) -> None:
        stamp, position = message.header.stamp, message.pose.position
        self.poses.append((stamp.sec * 10**9 + stamp.nanosec, np.array([position.x, position.y, position.z])))

    def _on_status(self, message: object) -> None:
        self.faults = GateStatus.from_json(message.data).fault_counts

    def press_estop(self, pressed: bool) -> None:
        message = CONFIG.topics.estop.message_class()()
        message.data = pressed
        self.estop.publish(message)

    def replace_estop(self, qos: object) -> None:
        self.node.destroy_publisher(self.estop)
        topic = CONFIG.topics.estop
        self.estop = self.node.create_publisher(topic.message_class(), topic.name, qos)

    def call_rearm(self) -> object:
        from std_srvs.srv import Trigger

        client = self.node.create_client(Trigger, CONFIG.services.gate_rearm)
        assert client.wait_for_service(10.0)
        future = client.call_async(Trigger.Request())
        wait_for(future.done)
        return future.result()

    def motion(self) -> tuple[np.ndarray, np.ndarray]:
        """Stamps (s) and distance moved since the message before (m)."""
        stamps = np.array([stamp for stamp, _ in self.poses]) * 1e-9
        moved = np.linalg.norm(np.diff([position for _, position in self.poses], axis=0), axis=1)
        return stamps[1:], moved

    def close(self) -> None:
        self.context.shutdown()
        self.thread.join(5)
        self.executor.shutdown()
        self.node.destroy_node()


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


@pytest.fixture
def arm() -> Iterator[ArmNode]:
    node = ArmNode()
    yield node
    node.close()


@pytest.fixture
def gate(arm: ArmNode) -> Iterator[SafetyGate]:
    started = SafetyGate.start(CONFIG, LIMITS, EMBODIMENT)
    yield started
    started.close()


def drive(gate: SafetyGate, steps: int, target: np.ndarray, dy: float = 0.02, episode: int = 1) -> None:
    clock = PeriodicClock(0.05)
    for _ in range(steps):
        target[1] += dy
        gate.send_target(target, time.monotonic_ns(), episode)
        clock.wait()


def drive_until(condition: Callable[[], bool], gate: SafetyGate, target: np.ndarray, steps: int = 400) -> None:
    """Hold the target until the condition is true: how long messages take to arrive is the machine's affair."""
    for _ in range(steps):
        if condition():
            return
        drive(gate, 1, target, 0.0)
    raise AssertionError("the condition did not come true")


def test_targets_come_out_smooth_and_fast(arm: ArmNode, gate: SafetyGate) -> None:
    gate.begin_episode(1)
    target = home_target()
    target[9] = 0.0
    drive(gate, 5, target)
    drive_until(lambda: len(arm.poses) > 50 and np.allclose(arm.poses[-1][1], target[:3], atol=1e-6), gate, target)
    status = gate.close()
    # The arm of this test shares its interpreter: a machine that stalls silences both.
    assert status.fault_counts.keys() <= {"joint_states_stale", "command_silent"}
    assert status.publish_hz <= 126
    assert status.timing["periods"] > 50
    stamps, moved = arm.motion()
    assert np.median(np.diff(stamps)) == pytest.approx(0.008, abs=0.001)  # the gate's rate, not that of the targets
    assert moved.max() <= 0.008 * LIMITS.max_speed_m_s * 1.01
    assert set(arm.openings) == {0.0}


def test_position_controlled_arms_get_joint_trajectories(arm: ArmNode) -> None:
    topic = CONFIG.topics.joint_trajectory
    points: list[list[float]] = []
    arm.node.create_subscription(
        topic.message_class(), topic.name, lambda message: points.append(list(message.points[0].positions)), topic.qos()
    )
    gate = SafetyGate.start(dataclasses.replace(CONFIG, command="joint_trajectory"), LIMITS, EMBODIMENT)
    try:
        gate.begin_episode(1)
        target = home_target()
        drive_until(lambda: len(points) > 0, gate, target)  # until they reach this node, and from the start
        drive(gate, 4, target)
        forward = Kinematics(EMBODIMENT).forward
        drive_until(
            lambda: len(points) > 40 and np.allclose(forward(np.array(points[-1]))[0], target[:3], atol=2e-4),
            gate,
            target,
        )
    finally:
        gate.close()
    assert arm.poses == []
    joints = np.array(points)
    assert np.abs(joints[0] - HOME_RAD).max() < 0.01
    assert np.abs(np.diff(joints, axis=0)).max() < 0.008 * 2.175


def test_not_a_number_stops_and_says_why(arm: ArmNode, gate: SafetyGate) -> None:
    gate.begin_episode(1)
    target = home_target()
    drive(gate, 2, target)
    gate.send_target(np.full(10, np.nan), time.monotonic_ns(), 1)
    wait_for(lambda: gate.status().state == "stopped" and gate.status().at_rest)
    with pytest.raises(SafetyError, match="not finite"):
        gate.send_target(target, time.monotonic_ns(), 1)
    assert all(np.isfinite(position).all() for _, position in arm.poses)
    with pytest.raises(SafetyError, match="shape"):
        gate.send_target(target[:7], time.monotonic_ns(), 1)
    gate.begin_episode(2)  # a person or the runtime decides to go on
    drive(gate, 2, home_target(), episode=2)


def test_arming_needs_joint_states(arm: ArmNode, gate: SafetyGate) -> None:
    wait_for(lambda: gate.status().handled == 0)
    arm.silent = True
    time.sleep(0.3)
    with pytest.raises(SafetyError, match="joint_states"):
        gate.begin_episode(1, timeout_s=0.3)


def test_silent_joint_states_hold_then_stop(arm: ArmNode, gate: SafetyGate) -> None:
    gate.begin_episode(1)
    target = home_target()
    drive(gate, 2, target, 0.01)
    # A machine that stalls for 100 ms silences the arm, too, and may be doing so when the arm falls silent.
    before = gate.status().fault_counts.get("joint_states_stale", 0)
    arm.silent = True
    drive_until(lambda: gate.holding().startswith("the gate holds: joint_states is"), gate, target)
    with pytest.raises(SafetyError, match="joint_states is"):
        drive(gate, 60, target, 0.0)
    # Once for the whole silence, not once per tick.
    assert 1 <= gate.status().fault_counts["joint_states_stale"] <= before + 2
    assert gate.status().at_rest


def test_emergency_stop_latches_until_rearmed(arm: ArmNode, gate: SafetyGate) -> None:
    gate.begin_episode(1)
    target = home_target()
    drive(gate, 2, target)
    arm.press_estop(True)
    wait_for(lambda: gate.status().state == "estopped")
    with pytest.raises(SafetyError, match="emergency stop"):
        gate.send_target(target, time.monotonic_ns(), 1)
    assert not arm.call_rearm().success
    arm.press_estop(False)
    with pytest.raises(SafetyError, match="emergency stop"):
        gate.begin_episode(2)
    wait_for(lambda: arm.call_rearm().success)
    assert gate.status().state == "idle"
    gate.begin_episode(2)
    drive(gate, 2, home_target(), episode=2)


def test_a_second_publisher_of_commands_stops(arm: ArmNode, gate: SafetyGate) -> None:
    from rclpy.node import Node

    gate.begin_episode(1)
    target = home_target()
    drive(gate, 2, target)
    intruder = Node("intruder", context=arm.context, use_global_arguments=False)
    topic = CONFIG.topics.target_pose
    intruder.create_publisher(topic.message_class(), topic.name, 1)
    with pytest.raises(SafetyError, match="/target_pose by intruder"):
        drive(gate, 100, target, 0.0)
    assert gate.status().kind == "foreign_publisher"
    assert not arm.call_rearm().success
    intruder.destroy_node()
    with pytest.raises(SafetyError, match="re-arm service"):
        gate.begin_episode(2, timeout_s=10)
    wait_for(lambda: arm.call_rearm().success)
    gate.begin_episode(2)


@pytest.mark.parametrize("reliability", ["RELIABLE", "BEST_EFFORT"])
@pytest.mark.parametrize("durability", ["VOLATILE", "TRANSIENT_LOCAL"])
def test_the_emergency_stop_is_heard_from_every_kind_of_publisher(
    arm: ArmNode, gate: SafetyGate, reliability: str, durability: str
) -> None:
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy[reliability], durability=DurabilityPolicy[durability])
    arm.replace_estop(qos)

    def pressed() -> bool:
        arm.press_estop(True)  # as a button's node does it: again and again
        return gate.status().state == "estopped"

    wait_for(pressed)


def test_a_press_that_was_latched_before_the_gate_started_counts(arm: ArmNode) -> None:
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    latched = DurabilityPolicy.TRANSIENT_LOCAL
    arm.replace_estop(QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=latched))
    arm.press_estop(True)
    gate = SafetyGate.start(CONFIG, LIMITS, EMBODIMENT)
    try:
        wait_for(lambda: gate.status().state == "estopped")
        with pytest.raises(SafetyError, match="emergency stop"):
            gate.begin_episode(1)
    finally:
        gate.close()


def test_a_robot_without_emergency_stop_is_not_armed(arm: ArmNode) -> None:
    from rclpy.node import Node
    from std_msgs.msg import String

    def refused(reason: str) -> bool:
        with pytest.raises(SafetyError) as caught:
            gate.begin_episode(1, timeout_s=0.5)
        return reason in str(caught.value)

    arm.node.destroy_publisher(arm.estop)
    gate = SafetyGate.start(CONFIG, LIMITS, EMBODIMENT, require_estop=True)
    try:
        with pytest.raises(SafetyError, match=r"nobody publishes the emergency stop /estop.*require_estop: false"):
            gate.begin_episode(1, timeout_s=1.0)
        context = start_ros()  # a topic has one type per participant
        other = Node("other", context=context, use_global_arguments=False)
        other.create_publisher(String, CONFIG.topics.estop.name, 1)
        wait_for(lambda: refused("as std_msgs/msg/Bool (only as std_msgs/msg/String)"))
        other.destroy_node()
        context.shutdown()
        arm.replace_estop(CONFIG.topics.estop.qos())
        wait_for(lambda: refused("has not said since the gate started that it is not pressed"))
        arm.press_estop(False)
        gate.begin_episode(1)
        target = home_target()
        drive(gate, 2, target)
        arm.node.destroy_publisher(arm.estop)
        with pytest.raises(SafetyError, match="nobody publishes the emergency stop"):
            drive(gate, 60, target, 0.0)
        wait_for(lambda: gate.status().at_rest)
        assert gate.status().kind == "estop_missing"
    finally:
        gate.close()


def test_pauses_between_episodes_are_no_faults(arm: ArmNode, gate: SafetyGate) -> None:
    for episode in (1, 2):
        gate.begin_episode(episode)
        target = home_target()
        drive(gate, 2, target, 0.0, episode)  # homing, which looks at no image
        gate.begin_episode(episode)
        gate.report_observation(time.monotonic_ns())
        drive(gate, 2, target, 0.0, episode)
        gate.end_episode()
        time.sleep(CONFIG.staleness.camera_s + 0.2)  # a person judges, and arranges the scene
    assert gate.status().kind == ""
    # The machine may have kept a process waiting, but the old image of the first episode held nothing.
    assert "camera_stale" not in gate.status().fault_counts
    assert "command_silent_stop" not in gate.status().fault_counts


def test_the_death_of_the_policy_process_stops(arm: ArmNode, gate: SafetyGate) -> None:
    policy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    gate.watch(policy.pid)
    gate.begin_episode(1)
    target = home_target()
    drive(gate, 2, target)
    policy.kill()
    with pytest.raises(SafetyError, match=f"process {policy.pid}"):
        drive(gate, 20, target, 0.0)
    policy.wait()


def test_a_dead_gate_is_an_error_at_once(arm: ArmNode, gate: SafetyGate) -> None:
    gate.begin_episode(1)
    os.kill(gate.pid, signal.SIGKILL)
    with pytest.raises(SafetyError, match=r"gone|ended|died"):
        drive(gate, 10, home_target())
    assert gate.close().state == "stopped"


def runs(pid: int) -> bool:
    """Whether a process is there, and neither stopped nor waiting to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] not in "TZX"
    except FileNotFoundError:
        return False


def check_rest_within_100_ms(arm: ArmNode, pid: int, number: signal.Signals) -> None:
    """End a process in full motion; the stamps of the commands say when they came to rest.

    What a busy machine adds does not count: the time until the process is really gone (its memory is freed first),
    and that in which the gate was kept from running.
    """
    wait_for(lambda: len(arm.poses) > 100)
    wait_for(lambda: arm.motion()[1][-1] > 0.002)  # in full motion, 0.25 m/s or more
    os.kill(pid, number)
    wait_for(lambda: not runs(pid))
    ended_s = time.time_ns() * 1e-9
    wait_for(lambda: arm.poses[-1][0] * 1e-9 > ended_s + 0.4)
    stamps, moved = arm.motion()
    last_motion_s = stamps[moved > 0][-1]
    periods = np.diff(stamps[(stamps >= ended_s - 0.008) & (stamps <= last_motion_s)])
    kept_waiting_s = np.maximum(periods - 2 * 0.008, 0).sum()
    assert last_motion_s - ended_s - kept_waiting_s <= 0.1
    # The deceleration is limited too: 13 m/s^2 change the way per tick of 8 ms by 0.83 mm at most.
    assert np.abs(np.diff(moved)).max() <= 0.008**2 * LIMITS.max_acceleration_m_s2 * 1.01
    # It holds the last pose, still publishing.
    assert (stamps > last_motion_s).sum() > 10


def test_the_arm_rests_within_100_ms_of_the_death_of_the_policy(arm: ArmNode, tmp_path: Path) -> None:
    from test_deploy import make_checkpoint

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-c", RUNTIME, str(make_checkpoint(tmp_path))]
    runtime = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    try:
        assert runtime.stdout is not None
        gate_pid, policy_pid = map(int, runtime.stdout.readline().split())
        check_rest_within_100_ms(arm, policy_pid, signal.SIGKILL)
        assert runtime.poll() is None
        assert arm.faults["process_died"] == 1
    finally:
        runtime.kill()
        runtime.wait()
        wait_for(lambda: not os.path.exists(f"/proc/{gate_pid}"))  # it must not publish into the next test


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_the_arm_rests_within_100_ms_of_the_end_of_the_runtime(arm: ArmNode, kind: signal.Signals) -> None:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    runtime = subprocess.Popen([sys.executable, "-c", RUNTIME], stdout=subprocess.PIPE, cwd=root)
    try:
        assert runtime.stdout is not None
        gate_pid = int(runtime.stdout.readline().split()[0])
        check_rest_within_100_ms(arm, runtime.pid, kind)
    finally:
        runtime.kill()
        runtime.wait()
        # Without its runtime the gate ends by itself.
        wait_for(lambda: not os.path.exists(f"/proc/{gate_pid}"))
