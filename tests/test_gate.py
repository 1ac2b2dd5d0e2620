"""The safety gate: limits as properties, the state machine, and the real process on a real ROS 2 graph."""

from __future__ import annotations

import numpy as np
import pytest

from simtoreal.envs import rotation
from simtoreal.robot.gate_limits import GateLimits, PoseLimiter, rotation_between, stopping_distance
from simtoreal.robot.target_interpolation import TargetInterpolator

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
