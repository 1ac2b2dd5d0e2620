"""Joint trajectories for position-controlled arms: inverse kinematics of the poses that passed the gate."""

from __future__ import annotations

from typing import Any

import numpy as np

from simtoreal.envs.errors import RobotError
from simtoreal.envs.panda import JOINT_VELOCITY_LIMIT_RAD_S
from simtoreal.robot.kinematics import Kinematics
from simtoreal.robot.topics import RobotConfig

# Between two ticks of the gate the joints move far less; a larger difference is another solution branch.
MAX_JOINT_STEP_RAD = 0.1
# Of the arm's own speed limits; the gate already keeps them, but only up to the accuracy of the measured Jacobian.
MAX_SPEED_SHARE = 1.2


class JointCommands:
    """Publishes one ``JointTrajectory`` point per pose.

    Args:
        kinematics: model of the arm.
        config: joint names and base frame.
        publisher: of the trajectory topic.
        dt: seconds between poses; the point is to be reached after this time.
        home: ``(7,)`` radians, any configuration of the arm.
    """

    def __init__(
        self, kinematics: Kinematics, config: RobotConfig, publisher: Any, dt: float, home: np.ndarray
    ) -> None:
        from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

        self._kinematics, self._publisher = kinematics, publisher
        self._joints: np.ndarray | None = None
        self._unreachable: tuple[np.ndarray, np.ndarray, str] | None = None
        self._max_step = MAX_SPEED_SHARE * dt * np.array(JOINT_VELOCITY_LIMIT_RAD_S)
        self._point = JointTrajectoryPoint()
        self._point.time_from_start.nanosec = round(dt * 1e9)
        self._message = JointTrajectory(joint_names=list(config.joint_names), points=[self._point])
        # The stamp stays zero, which means "begin now": controllers refuse a point that is due in the past, as one with
        # a stamp of before the inverse kinematics may be.
        self._message.header.frame_id = config.base_frame
        # The first solution imports and compiles; that must not happen while the arm moves.
        kinematics.solve_ik(*kinematics.forward(home), home)

    def restart(self, measured: np.ndarray) -> None:
        """Solutions are near ``measured`` ``(7,)`` radians from now on."""
        self._joints, self._unreachable = np.array(measured), None

    def publish(self, position: np.ndarray, quaternion: np.ndarray) -> str:
        """Publish the joint positions of a pose; returns why not, or an empty string.

        Joints never move by more than their speed limits (times ``MAX_SPEED_SHARE``) per pose; what is left of the
        way comes with the next poses. The last solution is repeated when the pose cannot be reached, so that the arm
        holds.
        """
        problem = self._solve(position, quaternion)
        if self._joints is not None:
            self._point.positions = self._joints.tolist()
            self._publisher.publish(self._message)
        return problem

    def _solve(self, position: np.ndarray, quaternion: np.ndarray) -> str:
        """Take over the joint positions of a pose; returns why not, or an empty string."""
        if self._unreachable is not None:
            tried, turned, problem = self._unreachable
            # Trying everything takes several ticks, and a gate that has stopped repeats its pose until it is armed.
            if np.array_equal(tried, position) and np.array_equal(turned, quaternion):
                return problem
        self._unreachable = None
        try:
            joints = self._kinematics.solve_ik(position, quaternion, self._joints)
        except RobotError as error:
            self._unreachable = position.copy(), quaternion.copy(), str(error)
            return str(error)
        step = joints - self._joints if self._joints is not None else np.zeros_like(joints)
        if np.abs(step).max() > MAX_JOINT_STEP_RAD:
            return "inverse kinematics jumps to another configuration of the arm"
        excess = float((np.abs(step) / self._max_step).max())
        self._joints = joints - step * (1 - 1 / excess) if excess > 1 else joints
        return ""
