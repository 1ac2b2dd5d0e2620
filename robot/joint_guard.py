"""Joint limits: measured positions and speeds are watched, and commanded motion is slowed down before a limit."""

from __future__ import annotations

import mujoco
import numpy as np

from simtoreal.envs.panda import JOINT_VELOCITY_LIMIT_RAD_S
from simtoreal.robot.gate_limits import GateLimits
from simtoreal.robot.kinematics import Kinematics

# A joint may use at most this many of the seconds' worth of way left to its limit (velocity damper of Faverjon and
# Tournassoud, 1987): it covers the braking time of the gate and the delay of the arm.
LOOK_AHEAD_S = 0.2
# Damping of the pseudo-inverse; keeps joint speeds finite at singularities.
DAMPING = 0.02
# Measured values beyond the limits by this much are faults rather than sensor noise.
POSITION_TOLERANCE_RAD = 0.02
SPEED_TOLERANCE = 1.3


class JointGuard:
    """Relates Cartesian motion to the joints of one arm at its measured configuration.

    Args:
        kinematics: model of the arm.
        limits: margin and share of speed that may be used.
    """

    def __init__(self, kinematics: Kinematics, limits: GateLimits) -> None:
        self._kinematics = kinematics
        model = kinematics.model
        self._data = mujoco.MjData(model)
        self._tcp = model.site("tcp").id
        # Arm joints come first in the model and are hinges: positions and speeds share their indices.
        self._arm = slice(0, len(kinematics.joint_low_rad))
        self._jacobian = np.zeros((6, model.nv))
        self._low = kinematics.joint_low_rad + limits.joint_margin_rad
        self._high = kinematics.joint_high_rad - limits.joint_margin_rad
        self._speed_limit = np.array(JOINT_VELOCITY_LIMIT_RAD_S)
        self._allowed_speed = limits.joint_speed_share * self._speed_limit
        self.positions = np.zeros(len(kinematics.joint_low_rad))

    def update(self, positions: np.ndarray, speeds: np.ndarray | None) -> str:
        """Take over a measurement; returns what is wrong with it, or an empty string.

        Args:
            positions: ``(7,)`` radians.
            speeds: ``(7,)`` rad/s, or None when not measured.
        """
        self.positions = np.asarray(positions, dtype=np.float64)
        self._data.qpos[self._arm] = self.positions
        mujoco.mj_kinematics(self._kinematics.model, self._data)
        mujoco.mj_comPos(self._kinematics.model, self._data)
        mujoco.mj_jacSite(self._kinematics.model, self._data, self._jacobian[:3], self._jacobian[3:], self._tcp)
        beyond = np.maximum(
            self.positions - self._kinematics.joint_high_rad, self._kinematics.joint_low_rad - self.positions
        )
        worst = int(beyond.argmax())
        if beyond[worst] > POSITION_TOLERANCE_RAD:
            return f"joint {worst + 1} is {beyond[worst]:.3f} rad beyond its limit"
        if speeds is not None:
            share = np.abs(speeds) / self._speed_limit
            worst = int(share.argmax())
            if share[worst] > SPEED_TOLERANCE:
                return f"joint {worst + 1} moves at {abs(speeds[worst]):.2f} rad/s, limit {self._speed_limit[worst]}"
        return ""

    def tcp_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured position ``(3,)`` m and quaternion ``(4,)`` wxyz of the TCP in the base frame."""
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self._data.site_xmat[self._tcp])
        return self._data.site_xpos[self._tcp].copy(), quaternion

    def tcp_position(self) -> np.ndarray:
        """Measured position ``(3,)`` of the TCP, without its orientation."""
        return self._data.site_xpos[self._tcp]

    def slow_down(self, velocity: np.ndarray, turn_rate: np.ndarray) -> float:
        """Factor in [0, 1] by which a TCP velocity (3,) m/s and turn rate (3,) rad/s must be scaled."""
        jacobian = self._jacobian[:, self._arm]
        twist = np.concatenate([velocity, turn_rate])
        square = jacobian @ jacobian.T
        square.flat[::7] += DAMPING**2
        speeds = jacobian.T @ np.linalg.solve(square, twist)
        left = np.where(speeds > 0, self._high - self.positions, self.positions - self._low)
        allowed = np.minimum(np.maximum(left, 0.0) / LOOK_AHEAD_S, self._allowed_speed)
        needed = np.abs(speeds)
        # Joints that hardly take part must not freeze the arm when one of them rests at its margin.
        moving = needed > 1e-3
        if not moving.any():
            return 1.0
        return float(min(1.0, (allowed[moving] / needed[moving]).min()))
