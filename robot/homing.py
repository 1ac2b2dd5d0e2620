"""The way home: targets that take an arm from wherever it is to its home, out of the scene first."""

from __future__ import annotations

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.embodiment import Embodiment
from simtoreal.robot.gate_limits import MotionLimits
from simtoreal.robot.kinematics import Kinematics

HOMING_SPEED_M_S = 0.15
HOMING_TURN_RATE_RAD_S = 0.7
# Of slower limits of the gate, so that its own smoothing does not add up to a lag.
LIMITS_SHARE = 0.9
# For the arm to catch up with its target at the end.
HOMING_SETTLE_S = 0.5


def path_home(
    joint_positions_rad: np.ndarray, kinematics: Kinematics, embodiment: Embodiment, limits: MotionLimits
) -> list[np.ndarray]:
    """Targets ``(10,)`` (``TARGET_NAMES``), one per control period: rise, go straight home, rest; fingers open.

    The arm first rises vertically, without turning, to the height of home, unless it is above it already: a straight
    line from the table home could sweep through the scene.

    Args:
        joint_positions_rad: ``(7,)`` where the arm is.
        kinematics: of the arm.
        embodiment: home and control rate.
        limits: of the safety gate, which the path keeps.
    """
    largest_m, largest_rad = limits.target_step(embodiment.control_period_s)
    speed = min(HOMING_SPEED_M_S, LIMITS_SHARE * largest_m / embodiment.control_period_s)
    turn_rate = LIMITS_SHARE * min(limits.max_turn_rate_rad_s, largest_rad / embodiment.control_period_s)
    turn_rate = min(HOMING_TURN_RATE_RAD_S, turn_rate)
    begin, quaternion = kinematics.forward(joint_positions_rad)
    home, upright = kinematics.forward(np.array(embodiment.home_joint_positions_rad))
    above = np.array([begin[0], begin[1], max(begin[2], home[2])])
    turn = rotation.to_rotation_vector(rotation.quaternion_multiply(upright, rotation.quaternion_conjugate(quaternion)))
    path = []
    for start, end, leg_turn in ((begin, above, np.zeros(3)), (above, home, turn)):
        seconds = max(
            float(np.linalg.norm(end - start)) / speed,
            float(np.linalg.norm(leg_turn)) / turn_rate,
        )
        steps = int(np.ceil(seconds / embodiment.control_period_s))
        for step in range(1, steps + 1):
            share = step / steps
            between = rotation.quaternion_multiply(rotation.from_rotation_vector(share * leg_turn), quaternion)
            path.append(np.concatenate([start + share * (end - start), rotation.to_6d(between), [1.0]]))
    rest = np.concatenate([home, rotation.to_6d(upright), [1.0]])
    return path + [rest] * int(np.ceil(HOMING_SETTLE_S / embodiment.control_period_s))
