"""Limits on commanded end-effector motion: speed, acceleration and the workspace box, braking distance included.

No ROS here, only numbers, so that the guarantees can be tested with any number of adversarial inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError

SlowDown = Callable[[np.ndarray, np.ndarray], float]

# Part of the acceleration that approaching a goal may use; the rest corrects the direction meanwhile.
APPROACH_SHARE = 0.7
# The arm lags behind its command by its stiffness and delay; farther than this it is blocked, or is not the arm
# that the model describes. A target may not be farther ahead of the commanded pose either.
MAX_TRACKING_ERROR_M = 0.15
# Of that, what a target may get ahead while the commanded pose changes its direction at its full acceleration.
REVERSAL_M = 0.075
# Keeps results inside the limits whatever the rounding of the last operation.
ROUNDING = 1.0 - 1e-9


@dataclass(frozen=True, kw_only=True)
class MotionLimits:
    """What the safety gate allows inside the workspace; the section ``limits`` of a robot yaml.

    The defaults fit a Franka Panda with 2 cm and 0.1 rad per step at 20 Hz: below the arm's own limits (1.7 m/s,
    2.5 rad/s, 13 m/s^2, 25 rad/s^2; Franka Control Interface documentation), and chosen so that a stop from any
    allowed motion, noticing the fault included, takes less than 100 ms (0.7 / 13 = 54 ms, 1.9 / 25 = 76 ms).

    Attributes:
        max_speed_m_s, max_acceleration_m_s2: of the commanded TCP position.
        max_turn_rate_rad_s, max_turn_acceleration_rad_s2: of the commanded orientation.
        max_step_m, max_step_rad: larger jumps between successive targets, or between the first target and the
            measured pose, are refused and stop the robot.
        joint_margin_rad: the arm is slowed down to stay this far inside its joint limits.
        joint_speed_share: part of each joint's speed limit that may be used.
        command_timeout_s: silence of the runtime after which the robot is brought to rest ("hold").
        target_max_age_s: targets that should have been reached longer ago are refused.
    """

    max_speed_m_s: float = 0.7
    max_acceleration_m_s2: float = 13.0
    max_turn_rate_rad_s: float = 1.9
    max_turn_acceleration_rad_s2: float = 25.0
    max_step_m: float = 0.08
    max_step_rad: float = 0.4
    joint_margin_rad: float = 0.05
    joint_speed_share: float = 0.9
    command_timeout_s: float = 0.075
    target_max_age_s: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(MotionLimits):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ValueError(f"{field.name} is {value}; expected a positive finite number")
        if self.joint_speed_share > 1:
            raise ValueError(f"joint_speed_share is {self.joint_speed_share}; expected at most 1")

    def target_step(self, period_s: float) -> tuple[float, float]:
        """How far a target may be from the one before it, so that the commanded pose can follow.

        Args:
            period_s: seconds between targets.

        Returns:
            Metres and radians. Turning may lag behind, as nothing is hit by it; only jumps are refused.
        """
        # A reversal at speed v takes 2 v / a, in which the target gets (2 v)^2 / (2 a) ahead.
        speed = min(self.max_speed_m_s, math.sqrt(self.max_acceleration_m_s2 * REVERSAL_M / 2))
        return min(speed * period_s, self.max_step_m), self.max_step_rad


@dataclass(frozen=True, kw_only=True)
class GateLimits(MotionLimits):
    """Motion limits and the workspace they hold in.

    Attributes:
        workspace_low_m, workspace_high_m: box that the commanded TCP position stays in, base frame.
    """

    workspace_low_m: tuple[float, float, float]
    workspace_high_m: tuple[float, float, float]

    def __post_init__(self) -> None:
        super().__post_init__()
        for low, high in zip(self.workspace_low_m, self.workspace_high_m, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"workspace {self.workspace_low_m} to {self.workspace_high_m} is not a box")

    @classmethod
    def for_embodiment(cls, embodiment: Embodiment, motion: MotionLimits | None = None) -> GateLimits:
        """Limits inside the workspace of ``embodiment``: ``motion`` (of a robot yaml), or the defaults.

        Raises:
            ConfigError: nothing is known about the workspace, as of the robots of foreign data; or targets come so
                rarely that the gate would take every pause between two of them for the end of the runtime.
        """
        if not embodiment.workspace_low_m:
            raise ConfigError(f"the workspace of '{embodiment.name}' is not known; without one nothing may be driven.")
        motion = motion or MotionLimits()
        if motion.command_timeout_s <= embodiment.control_period_s:
            raise ConfigError(
                f"command_timeout_s is {motion.command_timeout_s:g} s, but '{embodiment.name}' is controlled at "
                f"{embodiment.control_hz:g} Hz: the safety gate would brake in every control step. Set 'limits: "
                f"{{ command_timeout_s: {1.5 * embodiment.control_period_s:g} }}' in the robot yaml."
            )
        low_x, low_y, low_z = embodiment.workspace_low_m
        high_x, high_y, high_z = embodiment.workspace_high_m
        return cls(
            workspace_low_m=(low_x, low_y, low_z),
            workspace_high_m=(high_x, high_y, high_z),
            **vars(motion),
        )


def _norm(vector: np.ndarray) -> float:
    return math.sqrt(float(vector @ vector))


def _shorten(vector: np.ndarray, length: float) -> np.ndarray:
    """``vector``, scaled down to ``length`` when it is longer."""
    norm = _norm(vector)
    return vector if norm <= length else vector * (length * ROUNDING / norm)


def _towards(start: np.ndarray, end: np.ndarray, change: float) -> np.ndarray:
    """``end``, or as near to it as a change of ``start`` by ``change`` reaches."""
    difference = end - start
    norm = _norm(difference)
    return end if norm <= change else start + difference * (change * ROUNDING / norm)


def stopping_distance(speed: float, acceleration: float, dt: float) -> float:
    """Way covered after this tick when every following tick loses ``acceleration * dt`` of speed."""
    loss = acceleration * dt
    ticks = math.floor(speed / loss)
    return dt * (ticks * speed - loss * ticks * (ticks + 1) / 2)


def approach_speed(distance: float, acceleration: float, dt: float) -> float:
    """Largest speed for the coming tick after which a stop within ``distance`` is still possible."""
    # One tick at u and then u^2/(2a) - u dt/2 of braking (the continuous bound of stopping_distance).
    return min(distance / dt, acceleration * (math.sqrt(dt * dt / 4 + 2 * distance / acceleration) - dt / 2))


class PoseLimiter:
    """Follows a stream of desired poses, one per tick, with limited speed and acceleration.

    Guarantees for the poses it returns, between successive ticks of ``dt`` seconds: speed and change of velocity
    stay within the limits (translation and rotation, as norms), and the position never leaves the workspace box
    and can always brake inside it. If the commanded position starts outside the box, it may only come back.
    A desired stream that keeps the limits itself passes bit-unchanged.

    Args:
        limits: see :class:`GateLimits`.
        dt: seconds between ticks.
    """

    def __init__(self, limits: GateLimits, dt: float) -> None:
        self.limits = limits
        self.dt = dt
        self._low = np.array(limits.workspace_low_m)
        self._high = np.array(limits.workspace_high_m)
        self.reset(np.zeros(3), np.array([1.0, 0.0, 0.0, 0.0]))

    def reset(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """Start at rest at ``position`` (3,) metres and ``quaternion`` (4,) wxyz."""
        self.position = np.array(position, dtype=np.float64)
        self.quaternion = np.array(quaternion, dtype=np.float64)
        self.velocity = np.zeros(3)
        self.turn_rate = np.zeros(3)
        self._low_now = np.minimum(self._low, self.position)
        self._high_now = np.maximum(self._high, self.position)
        self._desired: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def at_rest(self) -> bool:
        """Whether the commanded pose does not move."""
        return not (self.velocity.any() or self.turn_rate.any())

    def step(self, position: np.ndarray, quaternion: np.ndarray, slow_down: SlowDown | None = None) -> bool:
        """Move one tick towards a desired pose.

        Args:
            position: ``(3,)`` metres, finite.
            quaternion: ``(4,)`` unit wxyz, finite.
            slow_down: given the velocity and turn rate about to be used, returns a factor in [0, 1] that slows
                the motion down (still with limited deceleration).

        Returns:
            Whether the desired pose had to be changed.

        Raises:
            ValueError: not finite; the state is unchanged.
        """
        if not (np.isfinite(position).all() and np.isfinite(quaternion).all()):
            raise ValueError(f"desired pose {position}, {quaternion} is not finite")
        dt, limits = self.dt, self.limits
        inside = np.minimum(np.maximum(position, self._low), self._high)
        previous, previous_quaternion = self._desired or (inside, quaternion)
        velocity = _follow(
            inside - self.position, (inside - previous) / dt, self.velocity,
            limits.max_speed_m_s, limits.max_acceleration_m_s2, dt,
        )  # fmt: skip
        turn = _follow(
            rotation_between(self.quaternion, quaternion), rotation_between(previous_quaternion, quaternion) / dt,
            self.turn_rate, limits.max_turn_rate_rad_s, limits.max_turn_acceleration_rad_s2, dt,
        )  # fmt: skip
        factor = 1.0 if slow_down is None else slow_down(velocity, turn)
        if factor < 1.0:
            velocity = _towards(self.velocity, velocity * factor, limits.max_acceleration_m_s2 * dt)
            turn = _towards(self.turn_rate, turn * factor, limits.max_turn_acceleration_rad_s2 * dt)
        self._desired = (inside, quaternion)
        self._move(self._keep_in_box(velocity), turn, inside, quaternion)
        return not (np.array_equal(self.position, position) and np.array_equal(self.quaternion, quaternion))

    def brake(self) -> None:
        """Move one tick with the largest allowed deceleration; at rest, stay."""
        self._desired = None
        if not self.at_rest:
            turn = _towards(self.turn_rate, np.zeros(3), self.limits.max_turn_acceleration_rad_s2 * self.dt)
            self._move(self._braked(), turn, None, None)

    def _braked(self) -> np.ndarray:
        return _towards(self.velocity, np.zeros(3), self.limits.max_acceleration_m_s2 * self.dt)

    def _move(
        self, velocity: np.ndarray, turn: np.ndarray, position: np.ndarray | None, quaternion: np.ndarray | None
    ) -> None:
        """Integrate one tick; take over the desired values bit for bit where the motion reaches them."""
        moved = self.position + velocity * self.dt
        self.position = moved if position is None or np.abs(moved - position).max() > 1e-12 else position.copy()
        self.velocity = velocity
        turned = rotation.quaternion_multiply(rotation.from_rotation_vector(turn * self.dt), self.quaternion)
        turned = turned / _norm(turned)
        if quaternion is not None:
            near = quaternion if float(turned @ quaternion) >= 0 else -quaternion
            turned = turned if np.abs(turned - near).max() > 1e-12 else quaternion.copy()
        self.quaternion = turned
        self.turn_rate = turn
        # A commanded position outside the box (the arm was pushed there) may only come back.
        self._low_now = np.maximum(self._low_now, np.minimum(self._low, self.position))
        self._high_now = np.minimum(self._high_now, np.maximum(self._high, self.position))

    def _keep_in_box(self, velocity: np.ndarray) -> np.ndarray:
        """The velocity nearest to ``velocity``, on the way from full braking, that can still stop in the box."""
        if self._can_stop(velocity):
            return velocity
        braked = self._braked()
        share_low, share_high = 0.0, 1.0
        for _ in range(12):
            middle = (share_low + share_high) / 2
            if self._can_stop(braked + middle * (velocity - braked)):
                share_low = middle
            else:
                share_high = middle
        return braked + share_low * (velocity - braked) if share_low > 0 else braked

    def _can_stop(self, velocity: np.ndarray) -> bool:
        moved = self.position + velocity * self.dt
        speed = _norm(velocity)
        rest = moved
        if speed > 0:
            way = stopping_distance(speed, self.limits.max_acceleration_m_s2 * ROUNDING, self.dt)
            rest = moved + velocity * (way / speed)
        # The box is convex: what begins and rests inside stays inside. A nanometre of slack absorbs rounding.
        corner_low, corner_high = np.minimum(moved, rest), np.maximum(moved, rest)
        return bool((corner_low >= self._low_now - 1e-9).all() and (corner_high <= self._high_now + 1e-9).all())


def rotation_between(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Rotation vector ``(3,)`` in radians, base frame, that turns ``start`` into ``end`` (wxyz)."""
    return rotation.to_rotation_vector(rotation.quaternion_multiply(end, rotation.quaternion_conjugate(start)))


def _follow(
    error: np.ndarray, feed: np.ndarray, velocity: np.ndarray, max_speed: float, max_acceleration: float, dt: float
) -> np.ndarray:
    """Velocity for the next tick that brings ``error`` to zero without overshoot while the goal moves at ``feed``."""
    change = max_acceleration * dt
    direct = error / dt
    # Reaching the goal now is right only if its motion can be matched in the tick after.
    if _norm(direct) <= max_speed and _norm(direct - velocity) <= change and _norm(direct - feed) <= change:
        return direct
    feed = _shorten(feed, max_speed)
    gap = error - feed * dt
    distance = _norm(gap)
    wanted = feed
    if distance > 0:
        wanted = feed + gap * (approach_speed(distance, APPROACH_SHARE * max_acceleration, dt) / distance)
    wanted = _shorten(wanted, max_speed)
    return _towards(velocity, wanted, change)
