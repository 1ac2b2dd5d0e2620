"""The state machine of the safety gate: messages and measurements in, one pose per tick out. No ROS, no clock.

It fails closed: everything that is not known to be right brings the arm to rest, and says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from simtoreal.envs import rotation
from simtoreal.robot.gate_limits import MAX_TRACKING_ERROR_M, REVERSAL_M, GateLimits, PoseLimiter, rotation_between
from simtoreal.robot.gate_messages import GateStatus, Request
from simtoreal.robot.joint_guard import JointGuard
from simtoreal.robot.stamp_clock import StampClock
from simtoreal.robot.target_interpolation import TargetInterpolator
from simtoreal.robot.topics import RobotConfig

# Targets further ahead than this come from a wrong clock.
HORIZON_NS = 1_000_000_000
# A pose this far outside the workspace may still be armed, and then only moves inwards.
START_TOLERANCE_M = 0.05
# Stops that mean that the arm, or what is around it, is not as it should be: a person has to look before it moves on.
LATCHING = frozenset({"tracking", "joint_limit", "foreign_publisher"})


class Command(NamedTuple):
    """What to publish.

    Attributes:
        position: ``(3,)`` metres, base frame.
        quaternion: ``(4,)`` wxyz.
        opening: of the gripper, in [0, 1].
        starting: first command after arming.
    """

    position: np.ndarray
    quaternion: np.ndarray
    opening: float
    starting: bool


class GateLogic:
    """Decides what the arm is told.

    Times are monotonic nanoseconds. See :class:`GateStatus` for the states.

    Args:
        config: joint names and staleness limits.
        limits: motion limits.
        guard: joint limits of the arm.
        dt: seconds between ticks.
        control_period_s: seconds between targets; also the length of the smoothing window.
        require_estop: arm only once the emergency stop has said that it is not pressed.
    """

    def __init__(
        self,
        config: RobotConfig,
        limits: GateLimits,
        guard: JointGuard,
        dt: float,
        control_period_s: float,
        *,
        require_estop: bool = False,
    ) -> None:
        self.limits = limits
        self.state = "idle"
        self.reason = "not armed yet"
        self.refusal = ""
        self.kind = ""
        self.late_input = ""
        self.latched = False
        self.faults: Counter[str] = Counter()
        self.limited = 0
        self._guard = guard
        self._joint_names = config.joint_names
        self._joint_timeout_ns = round(config.staleness.joint_states_s * 1e9)
        self._camera_timeout_ns = round(config.staleness.camera_s * 1e9)
        self._stop_after_ns = round(config.staleness.stop_s * 1e9)
        self._command_timeout_ns = round(limits.command_timeout_s * 1e9)
        self._max_age_ns = round(limits.target_max_age_s * 1e9)
        self._limiter = PoseLimiter(limits, dt)
        self._interpolator = TargetInterpolator(dt, control_period_s)
        self._opening = 1.0
        self._starting = False
        self._episode: int | None = None
        self._joint_clock = StampClock()
        self._joints_ns: int | None = None
        self._joints_stamp_ns = -1
        self._joints_problem = "no joint_states received yet"
        self._target_ns: int | None = None
        self._newest_at_ns = 0
        self._last_target = (np.zeros(3), np.array([1.0, 0.0, 0.0, 0.0]))
        self._rejected = ""
        self._observation_ns = 0
        self._hold_since_ns = 0
        self._estop_pressed = False
        self._estop_name = config.topics.estop.name
        # A gate that has just started does not know whether the button is pressed.
        self._estop_awaited = require_estop
        self._foreign = ""
        self._no_estop = ""
        self._commanding = False  # from the first target until idle again; before, there is no pose to hold

    @property
    def at_rest(self) -> bool:
        """Whether the commanded pose stands still."""
        return self._limiter.at_rest

    @property
    def measured_joints(self) -> np.ndarray:
        """Newest measured joint positions ``(7,)`` in radians."""
        return self._guard.positions

    def status(self) -> GateStatus:
        """The state as told to others (counters of publishing are added by who publishes)."""
        return GateStatus(
            state=self.state, latched=self.latched, reason=self.reason, kind=self.kind, refusal=self.refusal,
            late_input=self.late_input if self.state == "hold" else "", fault_counts=dict(self.faults),
            limited=self.limited, at_rest=self.at_rest,
        )  # fmt: skip

    # ---- what the robot says

    def on_joint_state(
        self,
        names: Sequence[str],
        positions: Sequence[float],
        speeds: Sequence[float],
        stamp_ns: int,
        now_ns: int,
    ) -> None:
        """Take over a measurement; joints are found by name, in any order, among any others.

        Args:
            names: joint names of the message.
            positions: radians, in the order of ``names``.
            speeds: rad/s, or empty when not measured; NaN for joints whose speed is not measured.
            stamp_ns: when it was measured, on the robot's clock, whose offset is not known; 0 counts as ``now_ns``.
            now_ns: when it arrived.
        """
        # Equal, not smaller: the robot's clock may be set back, but a sample sent twice is not a new measurement.
        if 0 < stamp_ns == self._joints_stamp_ns:
            self.faults["joint_states_repeated"] += 1
            return
        index = {name: position for position, name in enumerate(names)}
        if len(index) < len(names) and (doubled := [name for name in self._joint_names if names.count(name) > 1]):
            # Nobody knows which of the two values is that of the arm.
            self._joints_problem = f"joint_states names {', '.join(doubled)} more than once"
            self.faults["joint_states_doubled"] += 1
            return
        missing = [name for name in self._joint_names if name not in index]
        if missing or len(positions) < len(names):
            self._joints_problem = f"joint_states lacks {', '.join(missing) or 'positions'}"
            self.faults["joint_states_incomplete"] += 1
            return
        order = [index[name] for name in self._joint_names]
        measured = np.array([positions[i] for i in order], dtype=np.float64)
        rates = np.array([speeds[i] for i in order], dtype=np.float64) if len(speeds) == len(names) else None
        if rates is not None:
            # ros2_control publishes NaN for joints without a velocity interface.
            rates = np.where(np.isnan(rates), 0.0, rates)
        if not np.isfinite(measured).all() or (rates is not None and not np.isfinite(rates).all()):
            self._joints_problem = "joint_states is not finite"
            self.faults["joint_states_not_finite"] += 1
            return
        self._joints_stamp_ns = stamp_ns
        # A queue that has filled up delivers as often as ever, but what the arm did a while ago.
        self._joints_ns = self._joint_clock.to_monotonic(stamp_ns, now_ns) if stamp_ns else now_ns
        self._joints_problem = self._guard.update(measured, rates)
        if not self._moving_allowed:
            return
        if self._joints_problem:
            self._stop("joint_limit", self._joints_problem)
            return
        if not self._commanding:
            return
        lag = float(np.linalg.norm(self._guard.tcp_position() - self._limiter.position))
        if lag > MAX_TRACKING_ERROR_M:
            self._stop("tracking", f"the arm is {lag:.2f} m away from where it is commanded to be; it may be blocked")

    def on_estop(self, pressed: bool) -> None:
        """The emergency stop button; pressing latches."""
        self._estop_pressed = pressed
        self._estop_awaited = self._estop_awaited and pressed
        if pressed and self.state != "estopped":
            self.faults["estop"] += 1
            self.state, self.kind, self.latched = "estopped", "estop", True
            self.reason = "emergency stop pressed; release it and call the re-arm service"

    def on_missing_estop(self, problem: str) -> None:
        """Why there is no emergency stop button although one is needed (empty: there is one, or none is needed).

        Without it the arm stops. A button that comes back may be pressed, and has to say that it is not.
        """
        self._no_estop = problem
        if problem:
            self._estop_awaited = True
            self.stop("estop_missing", problem)

    def on_foreign_publishers(self, description: str) -> None:
        """Others who publish commands or joint states (empty: nobody)."""
        self._foreign = description
        if description and self._moving_allowed:
            self._stop("foreign_publisher", f"somebody else publishes: {description}")

    def rearm(self, now_ns: int) -> tuple[bool, str]:
        """Release a latched stop; returns success and a message. The runtime must arm afterwards."""
        if self._estop_pressed:
            return False, "the emergency stop is still pressed"
        if self._foreign:
            return False, f"somebody else publishes: {self._foreign}"
        problem = self._joint_problem(now_ns)
        if problem:
            return False, problem
        if self.state in ("estopped", "stopped"):
            if not self.at_rest:
                return False, "the arm is still being stopped"
            self.state, self.reason, self._commanding = "idle", "re-armed; the runtime has to arm", False
            self.kind, self.latched = "", False
        return True, f"gate is {self.state}"

    # ---- what the runtime says

    def on_target(self, request: Request, now_ns: int) -> None:
        """Check a timed target and take it over.

        What cannot be meant (not finite, not a rotation, a jump) stops the robot. What is meant for another time
        or episode is dropped; when nothing else comes, silence makes the robot hold.
        """
        if not self._moving_allowed:
            return
        problem = _not_a_target(request.target)
        if problem:
            self._stop("bad_target", problem)
            return
        self._observation_ns = request.extra
        self._rejected = self._not_in_time(request, now_ns)
        if self._rejected:
            self.faults[self._rejected] += 1
            return
        if not self._commanding:
            problem = self._joint_problem(now_ns)
            if problem:
                self._stop("joint_states_stale", f"the first target came while {problem}")
                return
            self._start_at_measured_pose(now_ns)
        target = np.array(request.target)
        quaternion = rotation.from_6d(target[3:9])
        with np.errstate(over="ignore"):  # absurdly far is infinitely far
            jump = float(np.linalg.norm(target[:3] - self._last_target[0]))
            ahead = float(np.linalg.norm(target[:3] - self._limiter.position))
        turn = float(np.linalg.norm(rotation_between(self._last_target[1], quaternion)))
        if jump > self.limits.max_step_m or turn > self.limits.max_step_rad:
            self._stop("jump", f"target jumps by {jump:.3f} m and {turn:.2f} rad")
            return
        # While the arm is held nothing catches up: what goes on meanwhile would be rushed after.
        held = self.state == "hold"
        if ahead > (REVERSAL_M if held else MAX_TRACKING_ERROR_M):
            why = "is held" if held else "may not follow as fast"
            self._stop("ahead", f"target is {ahead:.2f} m ahead of the commanded pose, which {why}")
            return
        self._last_target = (target[:3], quaternion)
        self._target_ns, self._newest_at_ns, self._commanding = now_ns, request.at_ns, True
        self._update_hold(now_ns)
        if self.state == "armed":
            self._opening = min(max(float(target[9]), 0.0), 1.0)
            self._interpolator.add(target[:3], quaternion, self._opening, request.at_ns, now_ns)

    def arm(self, episode: int, now_ns: int) -> str:
        """Accept targets of ``episode`` from now on; returns why not, or an empty string.

        Nothing is commanded before the first target: until then the arm's own controller holds it, and may move it
        (a twin resets itself). Motion begins at the pose measured when that target arrives.
        """
        self.refusal = self._not_armable(now_ns)
        if not self.refusal:
            self._episode = episode
            self._target_ns, self._newest_at_ns = None, 0
            self._rejected, self._observation_ns = "", 0
            self.state, self.reason, self.kind, self.late_input, self._commanding = "armed", "", "", "", False
        return self.refusal

    def rest(self, reason: str) -> None:
        """Bring the arm to rest because nothing more is wanted of it, which is no fault."""
        if self._moving_allowed:
            self.state, self.reason, self.kind = "stopped", reason, ""

    def stop(self, kind: str, reason: str) -> None:
        """Bring the arm to rest because of something outside (a process died)."""
        if self._moving_allowed:
            self._stop(kind, reason)

    # ---- every tick

    def tick(self, now_ns: int) -> Command | None:
        """What to publish now; None while idle."""
        if not self._commanding:
            return None
        self._update_hold(now_ns)
        if self.state == "armed":
            position, quaternion, _ = self._interpolator.sample(now_ns)
            self.limited += self._limiter.step(position, quaternion, self._guard.slow_down)
        else:
            self._limiter.brake()
        starting, self._starting = self._starting, False
        return Command(self._limiter.position, self._limiter.quaternion, self._opening, starting)

    # ---- inside

    @property
    def _moving_allowed(self) -> bool:
        return self.state in ("armed", "hold")

    def _stop(self, kind: str, reason: str) -> None:
        self.faults[kind] += 1
        self.latched = kind in LATCHING
        self.state, self.kind = "stopped", kind
        self.reason = f"{reason}. Look why, then call the re-arm service" if self.latched else reason

    def _start_at_measured_pose(self, now_ns: int) -> None:
        position, quaternion = self._guard.tcp_pose()
        self._limiter.reset(position, quaternion)
        self._interpolator.reset(position, quaternion, self._opening, now_ns)
        self._last_target = (position, quaternion)
        self._starting = True

    def _update_hold(self, now_ns: int) -> None:
        """Hold while an input is late, resume when all are fresh, stop when it takes too long."""
        if not self._moving_allowed:
            return
        kind, problem = self._late_input(now_ns)
        if problem and self.state == "armed":
            self.state, self._hold_since_ns = "hold", now_ns
        if problem and kind != self.late_input:
            self.faults[kind] += 1
            self.reason = problem
        self.late_input = kind
        if problem:
            if now_ns - self._hold_since_ns > self._stop_after_ns:
                self._stop(f"{kind}_stop", f"{problem}; gave up after {self._stop_after_ns * 1e-9:.1f} s of holding")
        elif self.state == "hold":
            self._interpolator.reset(self._limiter.position, self._limiter.quaternion, self._opening, now_ns)
            self.state, self.reason = "armed", ""

    def _late_input(self, now_ns: int) -> tuple[str, str]:
        joints = self._joint_problem(now_ns)
        if joints:
            return "joint_states_stale", joints
        age_ns = now_ns - self._observation_ns if self._observation_ns else 0
        # One from the future would never get old.
        if abs(age_ns) > self._camera_timeout_ns:
            when = "ms old" if age_ns > 0 else "ms in the future; its time is not that of the monotonic clock"
            return "camera_stale", f"newest camera image is {abs(age_ns) * 1e-6:.0f} {when}"
        if self._target_ns is not None and now_ns - self._target_ns > self._command_timeout_ns:
            why = f" (last one refused: {self._rejected})" if self._rejected else ""
            return "command_silent", f"no target for {(now_ns - self._target_ns) * 1e-6:.0f} ms{why}"
        return "", ""

    def _joint_problem(self, now_ns: int) -> str:
        if self._joints_ns is None:
            return self._joints_problem
        if now_ns - self._joints_ns > self._joint_timeout_ns:
            why = f" ({self._joints_problem})" if self._joints_problem else ""
            return f"joint_states is {(now_ns - self._joints_ns) * 1e-6:.0f} ms old{why}"
        return ""

    def _not_in_time(self, request: Request, now_ns: int) -> str:
        if request.episode != self._episode:
            return "wrong_episode"
        if now_ns - request.at_ns > self._max_age_ns:
            return "stale_target"
        if request.at_ns - now_ns > HORIZON_NS:
            return "future_target"
        if request.at_ns <= self._newest_at_ns:
            return "out_of_order"
        return ""

    def _not_armable(self, now_ns: int) -> str:
        if self.latched:
            return self.reason
        if not self.at_rest:
            if self._moving_allowed:
                self.state, self.reason = "stopped", "stopping before arming again"
            return "the arm is still moving"
        if self._foreign:
            return f"somebody else publishes: {self._foreign}"
        if self._no_estop:
            return self._no_estop
        if self._estop_awaited:
            return (
                f"the emergency stop {self._estop_name} has a publisher, but it has not said since the gate started "
                "that it is not pressed (false). Let its node publish periodically, or latched (transient local)"
            )
        problem = self._joint_problem(now_ns) or self._joints_problem
        if problem:
            return problem
        position = self._guard.tcp_position()
        low, high = np.array(self.limits.workspace_low_m), np.array(self.limits.workspace_high_m)
        outside = float(np.maximum(low - position, position - high).max())
        if outside > START_TOLERANCE_M:
            return f"the arm starts {outside:.3f} m outside the workspace; move it inside by hand"
        return ""


def _not_a_target(target: tuple[float, ...]) -> str:
    values = np.array(target)
    if not np.isfinite(values).all():
        return f"target is not finite at index {int(np.flatnonzero(~np.isfinite(values))[0])}"
    x, y = values[3:6], values[6:9]
    # Absurd magnitudes overflow to infinity here, and fail as they should.
    with np.errstate(over="ignore", invalid="ignore"):
        orthonormal = abs(x @ x - 1) < 0.1 and abs(y @ y - 1) < 0.1 and abs(x @ y) < 0.1
    return "" if orthonormal else "target rotation is not two orthogonal unit vectors"
