"""The simulated world behind the twin's topics, stepped in small ticks instead of control steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.panda import FINGER_TRAVEL_M, pose_to_control
from simtoreal.envs.scene_motion import SceneMotion
from simtoreal.envs.scene_state import object_state
from simtoreal.envs.tabletop_vector import TabletopVectorEnv
from simtoreal.envs.task import SUCCESS_HOLD_STEPS, TaskSpec
from simtoreal.robot.gap import Latency, load_gap, sample_latency

# Joint states are measured this often (100 Hz), and commands take effect with this resolution.
TICK_S = 0.01
# After a reset the arm follows commands only once they agree with where it is, as real controllers demand:
# otherwise the last command of the previous episode would tear it away.
ENGAGE_DISTANCE_M = 0.05
ENGAGE_ANGLE_RAD = 0.3
# A commanded pose further than this from the first one is motion.
DRIVEN_M = 0.001


class TwinWorld(TabletopVectorEnv):
    """One simulation with the reality gap of a named level, driven by poses instead of actions.

    Args:
        task: what is on the table.
        embodiment: robot and cameras, with the pixels of the policy.
        gap: ``none``, ``standard`` or ``hard``.
        motion: how the scene moves once somebody drives the arm; None for not at all.
    """

    def __init__(
        self, task: TaskSpec, embodiment: Embodiment, gap: str, motion: str | SceneMotion | None = None
    ) -> None:
        super().__init__(task, 1, embodiment=embodiment, randomization=load_gap(gap), motion=motion)
        self.ticks_per_control = round(embodiment.control_period_s / TICK_S)
        if not np.isclose(self.ticks_per_control * TICK_S, embodiment.control_period_s):
            raise ConfigError(f"a control rate of {embodiment.control_hz} Hz is no multiple of {TICK_S} s")
        self.substeps = round(TICK_S / self.model.opt.timestep)
        self.latency = Latency(command_s=0.0, observation_s=0.0)
        self.engaged = False
        self.ticks = 0

    def begin(self, seed: int) -> None:
        """Start the episode of ``seed``: objects, arm near home, and a newly drawn gap."""
        self.reset(seed=[seed])
        self.latency = sample_latency(int(self._latency[0]), self.embodiment.control_period_s, seed)
        self.engaged, self.ticks = False, 0
        self._began_at = self._position[0].copy()

    def command_pose(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        """Pull the TCP to a pose: ``(3,)`` m and unit quaternion ``(4,)`` wxyz, base frame.

        Ignored after :meth:`begin` until a commanded pose is near the arm.
        """
        if not self.engaged:
            away = rotation.quaternion_multiply(quaternion, rotation.quaternion_conjugate(self._quaternion[0]))
            self.engaged = bool(
                np.linalg.norm(position - self._position[0]) < ENGAGE_DISTANCE_M
                and np.linalg.norm(rotation.to_rotation_vector(away)) < ENGAGE_ANGLE_RAD
            )
        if self.engaged:
            self._position[0], self._quaternion[0] = position, quaternion
            self._send()

    def command_gripper(self, opening: float) -> None:
        """Drive the fingers towards an opening between 0 and 1; ignored until a pose command has engaged the arm."""
        if self.engaged:
            self._opening[0] = min(max(opening, 0.0), 1.0)
            self._send()

    def _send(self) -> None:
        self.fields["ctrl"][:] = pose_to_control(self._position, self._quaternion, self._opening)

    @property
    def fault(self) -> str:
        """Why the simulation had to be stopped, or empty."""
        return str(self._faults[0])

    def tick(self) -> None:
        """Advance the physics by ``TICK_S``, and judge the task whenever a control period is complete."""
        self.ticks += 1
        if self.fault:
            return
        # As in simulation, the scene waits for the first commanded motion.
        self._driven[0] |= bool(np.linalg.norm(self._position[0] - self._began_at) > DRIVEN_M)
        if self._driven[0]:
            self._move_scene(np.array([0]), TICK_S)
        self._step_physics(None)
        if self.ticks % self.ticks_per_control == 0:
            self._hold = np.where(self.task.goal_predicate(self._scene()), self._hold + 1, 0)

    def measure_joints(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arm positions (7,) rad and velocities (7,) rad/s with sensor noise, and finger positions (2,) m."""
        qpos, qvel = self.fields["qpos"][0], self.fields["qvel"][0]
        positions = qpos[:7] + self._joint_noise[0] * self._noise[0].normal(size=7)
        return positions, qvel[:7].copy(), qpos[self._finger : self._finger + 2].copy()

    def draw(self) -> dict[str, np.ndarray]:
        """Camera name -> image ``(H, W, 3)`` uint8 of this moment, with the gap's camera errors and noise."""
        images = self._draw(np.array([0]))
        return {camera.name: images[f"{camera.name}_image"][0] for camera in self.embodiment.cameras}

    def truth(self) -> dict[str, Any]:
        """What only a simulation knows, as plain values: success, milestones, contacts and ``object_state``."""
        scene = self._scene()
        return {
            "time_s": self.ticks * TICK_S,
            "success": bool(self._hold[0] >= SUCCESS_HOLD_STEPS) and not self.fault,
            "milestones": {
                name: bool(predicate(scene)[0]) for name, predicate in self.task.milestone_predicates.items()
            },
            "contacts": {name: bool(touch.any()) for name, touch in scene.touches.items()},
            "object_state": object_state(self.fields, self.task, self.objects)[0].tolist(),
            "scene_motion": {name: float(value[0]) for name, value in self._mover.log().items()} if self._mover else {},
            "fault": self.fault,
        }


def finger_positions(openings_m: np.ndarray, closed: float, opened: float, count: int) -> list[float]:
    """Finger joint positions as the robot's driver would report them, from simulated finger travel in metres."""
    share = float(openings_m.mean()) / FINGER_TRAVEL_M
    return [closed + share * (opened - closed)] * count
