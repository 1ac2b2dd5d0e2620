"""Forward and inverse kinematics of the arm, on the same model that the simulator uses."""

from __future__ import annotations

import mujoco
import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, RobotError
from simtoreal.envs.panda import ARM_JOINTS, JOINT_HIGH_RAD, JOINT_LOW_RAD, add_panda

# Solutions worse than this are refused; well inside the 1 mm that a gripper notices.
POSITION_TOLERANCE_M = 1e-4
ROTATION_TOLERANCE_RAD = 1e-3
# 200 iterations of 0.1 s cover the whole workspace from home; control-rate steps take 3 to 5.
MAX_ITERATIONS = 200
ITERATION_S = 0.1
# The null space stays where it is but for this share of the way home per call: the elbow neither swings within a
# control step, nor drifts to its limits over many.
HOMEWARD = 0.05


class Kinematics:
    """Kinematics of one arm; not thread-safe (it reuses its buffers).

    Args:
        embodiment: only ``name`` and the home configuration are used.

    Raises:
        ConfigError: no model of this robot is known.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        if embodiment.name != "panda":
            raise ConfigError(f"no kinematic model of robot '{embodiment.name}' is known. Valid: panda.")
        spec = mujoco.MjSpec()
        spec.compiler.degree = False
        add_panda(spec, embodiment)
        self.model = spec.compile()
        self._data = mujoco.MjData(self.model)
        self._tcp = self.model.site("tcp").id
        self._addresses = np.array([self.model.joint(name).qposadr[0] for name in ARM_JOINTS])
        self._home = np.array(embodiment.home_joint_positions_rad)
        self.joint_low_rad = np.array(JOINT_LOW_RAD)
        self.joint_high_rad = np.array(JOINT_HIGH_RAD)

    def forward(self, joint_positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pose of the TCP.

        Args:
            joint_positions: ``(7,)`` radians.

        Returns:
            Position ``(3,)`` in metres and quaternion ``(4,)`` wxyz, base frame.
        """
        self._data.qpos[self._addresses] = joint_positions
        mujoco.mj_kinematics(self.model, self._data)
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self._data.site_xmat[self._tcp])
        return self._data.site_xpos[self._tcp].copy(), quaternion

    def solve_ik(self, position: np.ndarray, quaternion: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Joint positions that put the TCP at a pose, near ``start`` and inside the joint limits.

        Differential inverse kinematics with a quadratic program per iteration (mink): the TCP task, a weak
        pull of the null space towards ``start``, and the joint limits as constraints.

        Args:
            position: ``(3,)`` metres, base frame.
            quaternion: ``(4,)`` wxyz, base frame.
            start: ``(7,)`` radians to begin from, usually the measured positions; None for home.

        Returns:
            ``(7,)`` radians; its forward kinematics are within 0.1 mm and 1 mrad of the pose.

        Raises:
            RobotError: the pose is not finite or cannot be reached.
            MissingDependencyError: mink is not installed.
        """
        from simtoreal.envs.errors import require

        require("mink", "ik")
        import mink

        position, quaternion = np.asarray(position, dtype=float), np.asarray(quaternion, dtype=float)
        start = self._home if start is None else np.asarray(start, dtype=float)
        if not (np.isfinite(position).all() and np.isfinite(quaternion).all() and np.isfinite(start).all()):
            raise RobotError(f"inverse kinematics needs finite numbers, got {position}, {quaternion}, {start}")
        configuration = mink.Configuration(self.model)
        full = np.zeros(self.model.nq)
        full[self._addresses] = np.clip(start, self.joint_low_rad, self.joint_high_rad)
        configuration.update(full)
        tool = mink.FrameTask("tcp", "site", position_cost=1.0, orientation_cost=0.3, lm_damping=1e-6)
        goal = mink.SE3.from_rotation_and_translation(mink.SO3(quaternion / np.linalg.norm(quaternion)), position)
        tool.set_target(goal)
        posture = mink.PostureTask(self.model, cost=1e-4)
        rest = np.zeros(self.model.nq)
        rest[self._addresses] = start + HOMEWARD * (self._home - start)
        posture.set_target(rest)
        limits = [mink.ConfigurationLimit(self.model)]
        for _ in range(MAX_ITERATIONS):
            error = tool.compute_error(configuration)
            if np.linalg.norm(error[:3]) < POSITION_TOLERANCE_M and np.linalg.norm(error[3:]) < ROTATION_TOLERANCE_RAD:
                return np.array(configuration.q[self._addresses])
            velocity = mink.solve_ik(configuration, [tool, posture], ITERATION_S, solver="daqp", limits=limits)
            configuration.integrate_inplace(velocity, ITERATION_S)
        reached, turned = self.forward(configuration.q[self._addresses])
        angle = np.linalg.norm(
            rotation.to_rotation_vector(rotation.quaternion_multiply(quaternion, rotation.quaternion_conjugate(turned)))
        )
        raise RobotError(
            f"no joint positions reach TCP position {np.round(position, 3).tolist()} m: the nearest is "
            f"{1000 * np.linalg.norm(reached - position):.1f} mm and {angle:.3f} rad away. "
            "Keep targets inside the embodiment's workspace."
        )
