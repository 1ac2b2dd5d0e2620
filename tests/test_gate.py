"""The safety gate: limits as properties, the state machine, and the real process on a real ROS 2 graph."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simtoreal.data_collection.foreign_embodiment import foreign_embodiment
from simtoreal.envs import rotation
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.panda import HOME_RAD, panda_embodiment
from simtoreal.robot import timing
from simtoreal.robot.gate_limits import GateLimits, MotionLimits, PoseLimiter, rotation_between, stopping_distance
from simtoreal.robot.gate_logic import GateLogic
from simtoreal.robot.gate_messages import TARGET, Request
from simtoreal.robot.joint_guard import JointGuard
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.target_interpolation import TargetInterpolator
from simtoreal.robot.topics import load_robot_config

DT = 0.008
LOW, HIGH = np.array([0.28, -0.32, 0.012]), np.array([0.72, 0.32, 0.45])
LIMITS = GateLimits(workspace_low_m=tuple(LOW), workspace_high_m=tuple(HIGH))
DOWN = np.array([0.0, 1.0, 0.0, 0.0])
CENTRE = np.array([0.5, 0.0, 0.2])


def adversarial_positions(rng: np.random.Generator, ticks: int) -> np.ndarray:
    """Steps, square waves, random walks, ramps along and through the walls, absurd magnitudes; ``(ticks, 3)``."""
    pieces = []
    while sum(map(len, pieces)) < ticks:
        length, kind = int(rng.integers(1, 200)), int(rng.integers(6))
        if kind == 0:
            piece = np.repeat(rng.uniform(LOW - 1, HIGH + 1)[None], length, axis=0)
        elif kind == 1:
            corners = rng.uniform(LOW - 0.2, HIGH + 0.2, (2, 3))
            piece = corners[np.arange(length) // int(rng.integers(1, 20)) % 2]
        elif kind == 2:
            piece = rng.uniform(LOW, HIGH) + np.cumsum(rng.normal(0, 0.003, (length, 3)), axis=0)
        elif kind == 3:
            piece = np.linspace(rng.uniform(LOW, HIGH), rng.uniform(LOW - 0.5, HIGH + 0.5), length)
        elif kind == 4:
            piece = rng.choice([-1e308, 1e308, 5e-324, 0.0, 1e3], (length, 3))
        else:
            piece = np.where(rng.random((length, 3)) < 0.5, LOW, HIGH)
        pieces.append(piece)
    return np.concatenate(pieces)[:ticks]


@pytest.mark.parametrize("seed", range(4))
def test_limits_hold_for_adversarial_streams(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ticks = 10_000
    positions = adversarial_positions(rng, ticks)
    turns = rng.normal(size=(ticks, 4)) if seed % 2 else np.repeat(rng.normal(size=(ticks // 50, 4)), 50, axis=0)
    turns /= np.linalg.norm(turns, axis=1, keepdims=True)
    limiter = PoseLimiter(LIMITS, DT)
    limiter.reset(CENTRE, DOWN)
    path, orientations = [CENTRE, CENTRE], [DOWN, DOWN]
    for tick in range(ticks):
        if rng.random() < 0.05:
            limiter.brake()
        else:
            factor = float(rng.random())
            limiter.step(positions[tick], turns[tick], (lambda v, w, f=factor: f) if rng.random() < 0.2 else None)
        path.append(limiter.position)
        orientations.append(limiter.quaternion)
    check_motion(np.array(path), np.array(orientations))


def check_motion(path: np.ndarray, orientations: np.ndarray) -> None:
    velocity = np.diff(path, axis=0) / DT
    assert np.isfinite(path).all()
    assert (path >= LOW - 1e-8).all()
    assert (path <= HIGH + 1e-8).all()
    assert np.linalg.norm(velocity, axis=1).max() <= LIMITS.max_speed_m_s * (1 + 1e-6)
    assert np.linalg.norm(np.diff(velocity, axis=0), axis=1).max() / DT <= LIMITS.max_acceleration_m_s2 * (1 + 1e-5)
    turn = rotation_between(orientations[:-1], orientations[1:]) / DT
    assert np.linalg.norm(turn, axis=1).max() <= LIMITS.max_turn_rate_rad_s * (1 + 1e-6)
    assert np.linalg.norm(np.diff(turn, axis=0), axis=1).max() / DT <= LIMITS.max_turn_acceleration_rad_s2 * (1 + 1e-5)


def test_motion_inside_the_limits_passes_bit_unchanged() -> None:
    t = np.arange(0, 4, DT)
    # Starts at rest; at most 0.35 m/s and 1.2 m/s^2, 0.9 rad/s and 2.7 rad/s^2.
    positions = CENTRE + 0.07 * (1 - np.cos(np.outer(t, [4.0, 3.0, 2.0])))
    quaternions = rotation.quaternion_multiply(
        rotation.from_rotation_vector(0.3 * (1 - np.cos(3 * t))[:, None] * np.array([0.6, 0.0, 0.8])),
        np.broadcast_to(DOWN, (len(t), 4)),
    )
    limiter = PoseLimiter(LIMITS, DT)
    limiter.reset(positions[0], quaternions[0])
    for position, quaternion in zip(positions, quaternions, strict=True):
        assert not limiter.step(position, quaternion)
        assert np.array_equal(limiter.position, position)
        assert np.array_equal(limiter.quaternion, quaternion)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_never_passes(bad: float) -> None:
    limiter = PoseLimiter(LIMITS, DT)
    limiter.reset(CENTRE, DOWN)
    for index in range(7):
        values = np.concatenate([CENTRE, DOWN])
        values[index] = bad
        with pytest.raises(ValueError, match="finite"):
            limiter.step(values[:3], values[3:])
    assert np.array_equal(limiter.position, CENTRE)
    assert limiter.at_rest


def test_a_far_goal_is_reached_without_overshoot_and_promptly() -> None:
    limiter = PoseLimiter(LIMITS, DT)
    limiter.reset(CENTRE, DOWN)
    goal = CENTRE + np.array([0.1, 0.2, -0.1])
    farthest = 0.0
    direction = (goal - CENTRE) / np.linalg.norm(goal - CENTRE)
    for _ in range(75):  # 0.6 s; 0.245 m at 0.7 m/s takes 0.40 s with acceleration and braking
        limiter.step(goal, DOWN)
        farthest = max(farthest, float((limiter.position - goal) @ direction))
    assert farthest <= 1e-9
    assert np.array_equal(limiter.position, goal)
    assert limiter.at_rest


def test_braking_from_any_allowed_motion_ends_within_100_ms() -> None:
    limiter = PoseLimiter(LIMITS, DT)
    limiter.reset(CENTRE, DOWN)
    limiter.velocity = np.array([LIMITS.max_speed_m_s, 0.0, 0.0])
    limiter.turn_rate = np.array([0.0, 0.0, LIMITS.max_turn_rate_rad_s])
    ticks = 0
    while not limiter.at_rest:
        limiter.brake()
        ticks += 1
    assert ticks * DT <= 0.1 - 2 * DT  # two ticks are left for noticing the fault
    distance = stopping_distance(LIMITS.max_speed_m_s, LIMITS.max_acceleration_m_s2, DT)
    assert np.allclose(limiter.position - CENTRE, [distance, 0, 0], atol=1e-6)


def test_a_start_outside_the_workspace_may_only_come_back() -> None:
    limiter = PoseLimiter(LIMITS, DT)
    start = np.array([0.5, 0.0, 0.0])
    limiter.reset(start, DOWN)
    heights = []
    for goal_z in (-0.1,) * 20 + (0.2,) * 60 + (-0.1,) * 100:
        limiter.step(np.array([0.5, 0.0, goal_z]), DOWN)
        heights.append(limiter.position[2])
    assert min(heights[:20]) >= -1e-8
    assert max(heights) > 0.1
    assert min(heights[80:]) >= LOW[2] - 1e-8


def test_interpolated_targets_keep_the_limits_and_do_not_overshoot() -> None:
    interpolator = TargetInterpolator(DT, 0.05)
    limiter = PoseLimiter(LIMITS, DT)
    interpolator.reset(CENTRE, DOWN, 1.0, 0)
    limiter.reset(CENTRE, DOWN)
    period, target, path = 50_000_000, CENTRE.copy(), []
    for tick in range(250):
        now = tick * 8_000_000
        if now // period != (now - 8_000_000) // period or tick == 0:
            step = now // period
            target = target + (np.array([0.0, 0.02, 0.0]) if step < 10 else 0.0)
            interpolator.add(target, DOWN, 0.0, (step + 1) * period + now % period, now)
        position, quaternion, opening = interpolator.sample(now)
        changed = limiter.step(position, quaternion)
        assert not changed  # full speed to a sudden end is inside the limits once it is smoothed
        path.append(limiter.position)
    assert opening == 0.0
    assert np.allclose(path[-1] - CENTRE, [0, 0.2, 0])
    assert np.max(np.array(path)[:, 1]) <= 0.2 + 1e-12


# ---- the state machine, with a clock made of numbers


MS = 1_000_000


class Rig:
    """The gate's logic with an arm that follows its commands exactly."""

    def __init__(self, *, limits: GateLimits = LIMITS, require_estop: bool = False) -> None:
        config = load_robot_config()
        embodiment = panda_embodiment()
        self.kinematics = Kinematics(embodiment)
        self.names = list(config.joint_names)
        self.logic = GateLogic(
            config, limits, JointGuard(self.kinematics, limits), DT, embodiment.control_period_s,
            require_estop=require_estop,
        )  # fmt: skip
        self.now = 10_000 * MS
        self.joints = np.array(HOME_RAD)
        position, quaternion = self.kinematics.forward(self.joints)
        self.target = np.concatenate([position, rotation.to_6d(quaternion), [1.0]])
        self.path: list[np.ndarray] = []
        self.silent = False
        # What stamps of joint states say less than the time they arrive at.
        self.behind = 0

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 8 * MS
            if not self.silent:
                self.logic.on_joint_state(self.names, self.joints.tolist(), [], self.now - self.behind, self.now)
            command = self.logic.tick(self.now)
            if command is not None:
                self.path.append(command.position)
                self.joints = self.kinematics.solve_ik(command.position, command.quaternion, self.joints)

    def send(self, move: tuple[float, float, float] = (0, 0, 0), *, age_ms: float = 0, episode: int = 1) -> None:
        self.target[:3] += move
        at_ns = self.now - round(age_ms * MS)
        self.logic.on_target(Request(TARGET, 0, at_ns, episode, 0, tuple(self.target.tolist())), self.now)

    def move(self, steps: int = 4) -> None:
        """Arm, and get to full speed along y."""
        self.tick()
        assert self.logic.arm(1, self.now) == ""
        for _ in range(steps):
            self.send((0, 0.02, 0))
            self.tick(6)

    def speed(self) -> float:
        return float(np.linalg.norm(self.path[-1] - self.path[-2])) / DT


def test_nothing_is_commanded_before_arming_and_the_first_target() -> None:
    rig = Rig()
    assert "no joint_states" in rig.logic.arm(1, rig.now)
    rig.tick(5)
    rig.send((0, 0.02, 0))
    rig.tick(5)
    assert rig.path == []
    assert rig.logic.arm(1, rig.now) == ""
    rig.tick(50)
    assert rig.path == []
    assert rig.logic.state == "armed"
    for _ in range(4):
        rig.send()
        rig.tick(6)
    assert np.allclose(rig.path[-1], rig.target[:3])
    assert rig.path[0][1] < 0.01


@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e308])
def test_a_bad_value_anywhere_stops_in_a_controlled_way(index: int, bad: float) -> None:
    rig = Rig()
    rig.move()
    rig.target[index] = bad
    rig.send()
    if index == 9 and np.isfinite(bad):
        assert rig.logic.state == "armed"  # an opening of "more than open" is open
        return
    assert rig.logic.state == "stopped"
    assert set(rig.logic.faults) <= {"bad_target", "jump"}
    rig.tick(12)
    assert rig.logic.at_rest
    assert np.isfinite(rig.path).all()
    check_motion(np.array(rig.path), np.tile(DOWN, (len(rig.path), 1)))


def test_a_jump_is_refused_and_arming_again_recovers() -> None:
    rig = Rig()
    rig.move()
    rig.send((0, 0, 0.1))
    assert "jumps by 0.100 m" in rig.logic.reason
    assert "still moving" in rig.logic.arm(2, rig.now)
    rig.tick(12)
    assert rig.logic.arm(2, rig.now) == ""
    rig.target[:3] = rig.path[-1]
    rig.send((0, -0.02, 0), episode=2)
    for _ in range(4):
        rig.tick(6)
        rig.send(episode=2)
    assert np.allclose(rig.path[-1], rig.target[:3])


def test_silent_joint_states_hold_then_resume_or_stop() -> None:
    rig = Rig()
    rig.move()
    rig.silent = True
    for _ in range(4):
        rig.send((0, 0.005, 0))
        rig.tick(6)
    assert rig.logic.state == "hold"
    assert "joint_states is" in rig.logic.reason
    assert rig.logic.at_rest
    rig.silent = False
    rig.tick(2)
    assert rig.logic.state == "armed"
    rig.tick(20)
    assert rig.logic.state == "hold"
    assert "no target" in rig.logic.reason
    rig.target[:3] = rig.path[-1]
    rig.send((0, 0.005, 0))
    assert rig.logic.state == "armed"
    check_motion(np.array(rig.path), np.tile(DOWN, (len(rig.path), 1)))
    rig.silent = True
    for _ in range(40):
        rig.send()
        rig.tick(6)
    assert rig.logic.state == "stopped"
    assert "gave up" in rig.logic.reason


@pytest.mark.parametrize("step_m", [0.01, 0.02, 0.034])
def test_the_arm_does_not_rush_after_a_hold_that_the_runtime_was_told_of(step_m: float) -> None:
    rig = Rig()
    rig.move()
    for _ in range(2):
        rig.send((0, step_m, 0))
        rig.tick(6)
    rig.silent, told = True, ""
    for _ in range(8):
        # As Ros2Env: what it was told at the end of a control step keeps the next target where it is.
        rig.send((0, 0 if told else step_m, 0))
        rig.tick(6)
        told = rig.logic.status().late_input
    assert (rig.logic.state, told, rig.logic.at_rest) == ("hold", "joint_states_stale", True)
    held = rig.path[-1]
    rig.silent = False
    for _ in range(6):
        rig.send()
        rig.tick(6)
    assert (rig.logic.state, rig.logic.status().late_input) == ("armed", "")
    assert np.allclose(rig.path[-1], rig.target[:3])
    assert np.linalg.norm(rig.path[-1] - held) < 2 * step_m
    check_motion(np.array(rig.path), np.tile(DOWN, (len(rig.path), 1)))
    rig.tick(12)
    assert (rig.logic.state, rig.logic.status().late_input) == ("hold", "command_silent")


def test_every_input_that_is_late_is_counted_also_one_that_becomes_so_during_a_hold() -> None:
    rig = Rig()
    rig.move()
    rig.tick(20)
    assert (rig.logic.state, rig.logic.faults) == ("hold", {"command_silent": 1})
    rig.silent = True
    rig.tick(20)
    assert (rig.logic.state, rig.logic.faults) == ("hold", {"command_silent": 1, "joint_states_stale": 1})


def test_a_target_that_goes_on_while_the_arm_is_held_stops_it() -> None:
    rig = Rig()
    rig.move()
    rig.silent = True
    for _ in range(10):
        rig.send((0, 0.01, 0))
        rig.tick(6)
    assert (rig.logic.state, rig.logic.kind) == ("stopped", "ahead")
    assert "0.08 m ahead of the commanded pose, which is held" in rig.logic.reason


def test_a_silent_runtime_is_stopped_within_100_ms_of_its_last_message() -> None:
    rig = Rig()
    rig.move()
    assert rig.speed() > 0.3
    rig.path = rig.path[-2:]
    rig.tick(12)  # 96 ms
    assert rig.logic.at_rest or rig.speed() == 0.0
    rig.tick(130)
    assert rig.logic.state == "stopped"


def test_stale_future_reordered_and_foreign_targets_are_dropped() -> None:
    rig = Rig()
    rig.move()
    for kind, arguments in {
        "stale_target": {"age_ms": 150}, "future_target": {"age_ms": -2000},
        "out_of_order": {"age_ms": 60}, "wrong_episode": {"episode": 0},
    }.items():  # fmt: skip
        before = rig.logic.state
        rig.send((0, 0, 0), **arguments)
        assert rig.logic.faults[kind] == 1
        assert rig.logic.state == before == "armed"


def test_joint_states_are_mapped_by_name_and_incomplete_ones_do_not_count() -> None:
    rig = Rig()
    order = np.random.default_rng(0).permutation(len(rig.names))
    names = ["another_joint", *(rig.names[i] for i in order)]
    rig.tick()
    rig.logic.on_joint_state(names, [9.0, *rig.joints[order]], [], rig.now + MS, rig.now + MS)
    assert np.array_equal(rig.logic.measured_joints, rig.joints)
    assert rig.logic.arm(1, rig.now) == ""
    rig.logic.on_joint_state(rig.names[1:], rig.joints[1:].tolist(), [], rig.now + 2 * MS, rig.now + 200 * MS)
    assert f"lacks {rig.names[0]}" in rig.logic.arm(1, rig.now + 200 * MS)
    rig.logic.on_joint_state(rig.names, [np.nan] * 7, [], rig.now + 3 * MS, rig.now + 201 * MS)
    assert "not finite" in rig.logic.arm(1, rig.now + 201 * MS)
    assert rig.logic.faults == {"joint_states_incomplete": 1, "joint_states_not_finite": 1}


def test_a_joint_that_is_named_twice_is_not_measured() -> None:
    rig = Rig()
    rig.tick()
    names, positions = [*rig.names, "finger", rig.names[2]], [*rig.joints.tolist(), 0.04, rig.joints[2] + 0.3]
    rig.logic.on_joint_state(names, positions, [], rig.now + MS, rig.now + MS)
    assert np.array_equal(rig.logic.measured_joints, rig.joints)
    assert f"names {rig.names[2]} more than once" in rig.logic.arm(1, rig.now + MS)
    # Others, which are not of this arm, may be named as they like.
    others = [*rig.names, "wheel", "wheel"]
    rig.logic.on_joint_state(others, [*rig.joints.tolist(), 0.0, 0.0], [], rig.now + 2 * MS, rig.now + 2 * MS)
    assert rig.logic.arm(1, rig.now + 2 * MS) == ""


def test_a_repeated_joint_state_is_not_a_fresh_one() -> None:
    rig = Rig()
    rig.tick()
    stamp = rig.now
    for later in range(1, 30):
        rig.logic.on_joint_state(rig.names, rig.joints.tolist(), [], stamp, rig.now + later * 8 * MS)
    assert "joint_states is" in rig.logic.arm(1, rig.now + 240 * MS)


def test_joint_states_from_a_queue_that_fills_up_are_old_however_often_they_come() -> None:
    rig = Rig()
    rig.behind = -3_000_000 * MS  # the robot's clock is another one
    rig.move()
    states = []
    for _ in range(30):
        rig.behind += 4 * MS
        rig.tick()
        rig.send()
        states.append(rig.logic.state)
    assert states == ["armed"] * 25 + ["hold"] * 5
    assert "joint_states is 1" in rig.logic.reason
    assert rig.logic.faults == {"joint_states_stale": 1}
    rig.behind -= 120 * MS
    rig.tick()
    assert rig.logic.state == "armed"


def test_a_clock_of_the_robot_that_is_set_does_not_make_its_joint_states_old() -> None:
    rig = Rig()
    rig.move()
    for step in (2000 * MS, -9000 * MS):
        rig.behind += step
        rig.tick()
        assert (rig.logic.state, rig.logic.faults) == ("armed", {})
    for _ in range(20):
        rig.now += 8 * MS
        rig.logic.on_joint_state(rig.names, rig.joints.tolist(), [], 0, rig.now)  # a driver that does not stamp
        rig.send()
        rig.logic.tick(rig.now)
    assert rig.logic.state == "armed"


def test_emergency_stop_latches_in_every_state_and_needs_two_steps() -> None:
    for state in ("idle", "armed", "hold", "stopped"):
        rig = Rig()
        if state == "idle":
            rig.tick()
        else:
            rig.move()
        if state == "hold":
            rig.tick(12)
        elif state == "stopped":
            rig.send((0, 0, 0.2))
        assert rig.logic.state == state
        rig.logic.on_estop(True)
        rig.tick(12)
        assert rig.logic.state == "estopped"
        assert rig.logic.at_rest
        assert rig.logic.rearm(rig.now)[0] is False
        rig.logic.on_estop(False)
        rig.tick(100)
        assert rig.logic.state == "estopped"
        assert "emergency stop" in rig.logic.arm(2, rig.now)
        assert rig.logic.rearm(rig.now)[0] is True
        assert rig.logic.state == "idle"
        commands = len(rig.path)
        rig.tick(10)
        assert len(rig.path) == commands
        assert rig.logic.arm(2, rig.now) == ""


@pytest.mark.parametrize("kind", ["tracking", "joint_limit", "foreign_publisher"])
def test_faults_of_the_arm_and_its_graph_latch(kind: str) -> None:
    rig = Rig()
    rig.move()
    if kind == "foreign_publisher":
        rig.logic.on_foreign_publishers("/target_pose by intruder")
    else:
        joints = np.array(HOME_RAD)
        joints[0] += 4.0 if kind == "joint_limit" else 0.8
        rig.now += MS
        rig.logic.on_joint_state(rig.names, joints.tolist(), [], rig.now, rig.now)
    assert (rig.logic.state, rig.logic.kind, rig.logic.latched) == ("stopped", kind, True)
    rig.tick(20)
    assert rig.logic.at_rest
    if kind == "foreign_publisher":
        assert rig.logic.rearm(rig.now)[0] is False
        rig.logic.on_foreign_publishers("")
    assert "re-arm service" in rig.logic.arm(2, rig.now)
    assert rig.logic.state == "stopped"
    assert rig.logic.rearm(rig.now)[0] is True
    assert rig.logic.arm(2, rig.now) == ""
    assert rig.logic.status().kind == ""


def test_arming_waits_for_an_emergency_stop_where_one_is_needed() -> None:
    rig = Rig()
    rig.tick()
    rig.logic.on_missing_estop("nobody publishes /estop")
    assert "nobody publishes" in rig.logic.arm(1, rig.now)
    rig.logic.on_missing_estop("")
    rig.logic.on_estop(False)
    assert rig.logic.arm(1, rig.now) == ""


def test_a_button_that_may_still_be_pressed_is_waited_for() -> None:
    rig = Rig(require_estop=True)
    rig.tick()
    assert "/estop has a publisher, but it has not said" in rig.logic.arm(1, rig.now)  # the gate was restarted
    rig.logic.on_estop(True)
    rig.logic.on_estop(False)
    assert "emergency stop pressed" in rig.logic.arm(1, rig.now)
    assert rig.logic.rearm(rig.now)[0]
    rig.move()
    # The button vanishes while the arm moves; when its node is back, nobody knows what it will say.
    rig.logic.on_missing_estop("nobody publishes /estop")
    rig.tick(20)
    assert (rig.logic.state, rig.logic.kind, rig.logic.at_rest) == ("stopped", "estop_missing", True)
    rig.logic.on_missing_estop("")
    assert "has not said" in rig.logic.arm(2, rig.now)
    rig.logic.on_estop(False)
    assert rig.logic.arm(2, rig.now) == ""


def test_speeds_that_are_not_measured_are_no_fault() -> None:
    rig = Rig()
    now = rig.now
    rig.logic.on_joint_state(rig.names, rig.joints.tolist(), [np.nan] * 7, now, now)
    assert rig.logic.arm(1, now) == ""
    rig.logic.on_joint_state(rig.names, rig.joints.tolist(), [np.nan, 5.0, *[np.nan] * 5], now + 1, now)
    assert "moves at 5.00 rad/s" in rig.logic.reason  # those that are measured are looked at
    assert rig.logic.faults == {"joint_limit": 1}


def test_the_end_of_an_episode_is_no_fault() -> None:
    rig = Rig()
    rig.move()
    rig.logic.rest("the episode is over")
    rig.tick(200)
    assert rig.logic.at_rest
    assert (rig.logic.state, rig.logic.kind, rig.logic.faults) == ("stopped", "", {})
    assert rig.logic.arm(2, rig.now) == ""


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_speed_m_s": 0.25, "max_step_m": 0.03}, {"max_speed_m_s": 0.08}, {"max_step_m": 0.005},
     {"max_acceleration_m_s2": 0.5}, {"max_turn_rate_rad_s": 0.1, "max_step_rad": 0.01}],
)  # fmt: skip
def test_homing_and_full_speed_of_the_policy_work_with_slower_limits(changes: dict[str, float]) -> None:
    pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra 'ros')")
    from simtoreal.robot.homing import path_home
    from simtoreal.robot.ros2_env import Ros2Env

    embodiment = panda_embodiment()
    limits = dataclasses.replace(LIMITS, **changes)
    rig = Rig(limits=limits)
    turned = rotation.quaternion_multiply(rotation.from_rotation_vector(np.array([0, 0, 0.3])), DOWN)
    rig.joints = rig.kinematics.solve_ik(np.array([0.4, 0.25, 0.05]), turned)
    rig.tick()
    assert rig.logic.arm(1, rig.now) == ""

    def command(target: np.ndarray) -> None:
        rig.target = target.copy()
        rig.send()
        rig.tick(6)
        assert rig.logic.state == "armed", rig.logic.reason

    for target in path_home(rig.joints, rig.kinematics, embodiment, limits):
        command(target)
    assert np.abs(rig.joints - HOME_RAD).max() < 0.15  # Ros2Env refuses to begin further away
    env = Ros2Env.__new__(Ros2Env)  # only what the target depends on: no graph is needed
    env.embodiment, env.config = embodiment, dataclasses.replace(load_robot_config(), limits=limits)
    target = rig.target.copy()
    for step in range(90):
        direction = 1.0 if step // 30 % 2 == 0 else -1.0
        turning = 1.0 if step // 10 % 2 == 0 else -1.0
        target = env._next_target(target, np.array([0, direction, 0, 0, 0, turning, 1], dtype=np.float32))
        command(target)
    assert rig.logic.limited or not changes


def test_the_default_limits_allow_every_action() -> None:
    embodiment = panda_embodiment()
    largest_m, _ = LIMITS.target_step(embodiment.control_period_s)
    assert np.linalg.norm(embodiment.action.limits[:3]) <= largest_m


def test_limits_come_from_the_robot_yaml(tmp_path: Path) -> None:
    shipped = files("simtoreal.configs.robot").joinpath("panda_ros2.yaml").read_text()

    def limits(text: str) -> GateLimits:
        path = tmp_path / "robot.yaml"
        path.write_text(f"{shipped}\nlimits: {text}\n")
        return GateLimits.for_embodiment(panda_embodiment(), load_robot_config(path).limits)

    assert limits("{}") == GateLimits.for_embodiment(panda_embodiment())
    foreign = foreign_embodiment(name="hand", control_hz=20, action_dim=3)
    with pytest.raises(ConfigError, match="workspace of 'hand' is not known"):
        GateLimits.for_embodiment(foreign)
    slow = dataclasses.replace(panda_embodiment(), control_hz=10.0)
    with pytest.raises(ConfigError, match=r"'panda' is controlled at 10 Hz.*command_timeout_s: 0.15"):
        GateLimits.for_embodiment(slow)
    assert GateLimits.for_embodiment(slow, MotionLimits(command_timeout_s=0.15)).command_timeout_s == 0.15
    changed = limits("{ max_speed_m_s: 0.25, joint_margin_rad: 0.1 }")
    assert (changed.max_speed_m_s, changed.joint_margin_rad, changed.max_step_m) == (0.25, 0.1, 0.08)
    for text, message in {
        "{ max_sped_m_s: 0.25 }": "max_speed_m_s",
        "{ workspace_low_m: [0, 0, 0] }": "workspace_low_m",
        "{ max_speed_m_s: -1 }": "expected a positive finite number",
        "{ joint_speed_share: 2 }": "at most 1",
        "{ max_step_m: fast }": "max_step_m",
    }.items():
        with pytest.raises(ConfigError, match=message):
            limits(text)


class Publisher:
    """Keeps the positions of the trajectories it is given."""

    def __init__(self) -> None:
        self.positions: list[np.ndarray] = []

    def publish(self, message: Any) -> None:
        self.positions.append(np.array(message.points[0].positions))
        # "Begin now": a stamp would be of before the inverse kinematics, and a point in the past is refused.
        assert (message.header.stamp.sec, message.header.stamp.nanosec) == (0, 0)


def test_joint_trajectories_never_move_faster_than_the_joints_may() -> None:
    pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra 'ros')")
    from simtoreal.envs.panda import JOINT_VELOCITY_LIMIT_RAD_S
    from simtoreal.robot.joint_commands import JointCommands

    kinematics, publisher, home = Kinematics(panda_embodiment()), Publisher(), np.array(HOME_RAD)
    commands = JointCommands(kinematics, load_robot_config(), publisher, DT, home)
    commands.restart(home)
    position, quaternion = kinematics.forward(home)
    near, far = position + [0.0, 0.03, 0.0], position + [0.0, 0.3, 0.0]
    assert commands.publish(near, quaternion) == ""
    assert np.abs(publisher.positions[0] - home).max() > 0.01
    for _ in range(10):
        assert commands.publish(near, quaternion) == ""
    assert np.allclose(kinematics.forward(publisher.positions[-1])[0], near, atol=2e-4)
    assert "jumps" in commands.publish(far, quaternion)
    steps = np.abs(np.diff([home, *publisher.positions], axis=0))
    assert (steps <= 1.2 * DT * np.array(JOINT_VELOCITY_LIMIT_RAD_S) * (1 + 1e-9)).all()
    assert (steps[-1] == 0).all()


def test_a_pose_that_cannot_be_reached_is_not_tried_in_every_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rclpy", reason="ROS 2 is not installed (extra 'ros')")
    from simtoreal.robot.joint_commands import JointCommands

    kinematics, publisher, home = Kinematics(panda_embodiment()), Publisher(), np.array(HOME_RAD)
    commands = JointCommands(kinematics, load_robot_config(), publisher, DT, home)
    commands.restart(home)
    position, quaternion = kinematics.forward(home)
    solve, tried = kinematics.solve_ik, []
    monkeypatch.setattr(kinematics, "solve_ik", lambda *given: (tried.append(given), solve(*given))[1])
    # A gate that has stopped there publishes this pose until it is armed again.
    problems = {commands.publish(position + [0.0, 0.0, 2.0], quaternion) for _ in range(20)}
    assert len(tried) == len(problems) == 1
    assert "no joint positions reach" in problems.pop()
    np.testing.assert_array_equal(publisher.positions, np.tile(home, (20, 1)))
    assert commands.publish(position, quaternion) == ""
    assert len(tried) == 2


def test_rearming_needs_fresh_joint_states() -> None:
    rig = Rig()
    rig.move()
    rig.logic.on_estop(True)
    rig.logic.on_estop(False)
    rig.silent = True
    rig.tick(20)
    accepted, message = rig.logic.rearm(rig.now)
    assert not accepted
    assert "joint_states" in message


def test_an_arm_that_does_not_follow_is_stopped() -> None:
    rig = Rig()
    rig.tick()
    rig.logic.arm(1, rig.now)
    for _ in range(12):
        rig.send((0, 0.02, 0))
        for _ in range(6):
            rig.now += 8 * MS
            rig.logic.on_joint_state(rig.names, list(HOME_RAD), [], rig.now, rig.now)
            rig.logic.tick(rig.now)
    assert rig.logic.state == "stopped"
    assert "blocked" in rig.logic.reason


def test_an_old_camera_image_holds() -> None:
    rig = Rig()
    rig.move()
    rig.logic.on_target(Request(TARGET, 0, rig.now, 1, rig.now - 400 * MS, tuple(rig.target.tolist())), rig.now)
    assert rig.logic.state == "hold"
    assert "camera" in rig.logic.reason


def test_an_image_from_the_future_does_not_keep_its_camera_fresh() -> None:
    rig = Rig()
    rig.move()
    rig.logic.on_target(Request(TARGET, 0, rig.now, 1, rig.now + 10**12, tuple(rig.target.tolist())), rig.now)
    assert rig.logic.state == "hold"
    assert "1000000 ms in the future" in rig.logic.reason


def test_periods_are_counted_beyond_those_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "HISTORY", 10)
    clock = timing.PeriodicClock(1e-6, spin_s=0.0)
    for _ in range(25):
        clock.wait()
    summary = clock.summary()
    assert (summary.periods, sum(summary.histogram["counts"])) == (25, 10)


def test_joints_are_kept_away_from_their_limits() -> None:
    kinematics = Kinematics(panda_embodiment())
    guard = JointGuard(kinematics, LIMITS)
    joints = np.array(HOME_RAD)
    assert guard.update(joints, None) == ""
    assert guard.slow_down(np.array([0.0, 0.2, 0.1]), np.zeros(3)) == 1.0
    joints[3] = kinematics.joint_low_rad[3] + LIMITS.joint_margin_rad  # the elbow is folded as far as it goes
    guard.update(joints, None)
    factors = [guard.slow_down(0.2 * direction, np.zeros(3)) for direction in (np.eye(3)[0], -np.eye(3)[0])]
    assert min(factors) == 0.0  # further in
    assert max(factors) > 0.0  # out again
    joints[3] = kinematics.joint_low_rad[3] - 0.1
    assert "joint 4 is 0.100 rad beyond" in guard.update(joints, None)
    assert "moves at 5.00 rad/s" in guard.update(np.array(HOME_RAD), np.array([0, 5.0, 0, 0, 0, 0, 0]))
