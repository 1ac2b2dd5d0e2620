"""Skill ``align`` of the scripted expert: push a frame into a pose, from inside or from outside of it.

Quasi-static pushing with an ellipsoidal limit surface (Lynch, Maekawa and Tanie 1992): a force f at the point r of the
frame moves its middle along f and turns it by (r x f) / c^2. So the direction of pushing sets the path of the middle,
and the place along the wall sets the rotation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from simtoreal.data_collection.expert_avoid import Move
from simtoreal.envs.task import ObjectSpec

if TYPE_CHECKING:
    from simtoreal.data_collection.expert import Memory, Scene

HEIGHT_M, HOVER_M = 0.02, 0.085
FINGER_M = 0.014
APPROACH_M = 0.022
# Ratio of the moments and forces that friction can resist; about 0.7 of the radius for a frame.
TURN_LENGTH_M = 0.045
STEEPEST = 0.6
CLEARANCE_M = 0.008
DONE_M, DONE_RAD = 0.006, math.radians(3.5)


def align(scene: Scene, memory: Memory, item: ObjectSpec, to: ObjectSpec) -> Move | None:
    """Push ``item`` into the pose of ``to``; even episode numbers from inside, odd ones from outside."""
    inside = memory.number % 2 == 0
    (place, yaw), (goal, goal_yaw) = scene.poses[item.name], scene.poses[to.name]
    cosine, sine = math.cos(yaw), math.sin(yaw)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    error, relative = turn.T @ (goal - place)[:2], turn.T @ (scene.tcp - place)[:2]
    rotation = (goal_yaw - yaw + math.pi) % (2 * math.pi) - math.pi
    distance = float(np.hypot(*error))
    hole, wall, _ = item.size_m

    def go(point: np.ndarray, height: float, speed: float) -> Move:
        return np.array([*(place[:2] + turn @ point), height]), yaw, True, speed

    if distance < DONE_M and abs(rotation) < DONE_RAD:
        return scene.target.copy(), yaw, True, 0.3
    if memory.wall is None or error @ memory.wall < 0.002:
        memory.wall = _choose_wall(error, rotation)
    normal = memory.wall
    tangent = np.array([-normal[1], normal[0]])
    # The wall that is pushed, and where the middle of the fingers is when they touch it, along the normal.
    face = hole if inside else -(hole + 2 * wall)
    touch = face - FINGER_M
    forward = max(float(error @ normal), 0.004)
    slope = float(np.clip(error @ tangent / forward, -STEEPEST, STEEPEST))
    wanted_turn = rotation / max(distance, 0.03)
    limit = hole - FINGER_M - 0.004
    along = float(np.clip(face * slope - wanted_turn * TURN_LENGTH_M**2 * math.hypot(1, slope), -limit, limit))
    depth, sideways = float(relative @ normal), float(relative @ tangent)
    behind = depth < touch + 0.006
    if inside:
        within = np.abs(relative).max() < hole - 0.008
        start = np.zeros(2)
    else:
        within = behind and abs(sideways) < hole + 2 * wall
        start = (touch - APPROACH_M) * normal + along * tangent
    if not within or scene.tcp[2] > HEIGHT_M + 0.012:
        apart = float(np.hypot(*(relative - start)))
        height = HEIGHT_M + (HOVER_M - HEIGHT_M) * min(1.0, max(0.0, (apart - 0.008) / 0.015))
        return go(start, height, 1.0)
    if abs(sideways - along) > (0.004 if depth < touch - 0.004 else 0.010):
        return go((touch - CLEARANCE_M) * normal + along * tangent, HEIGHT_M, 0.4)
    lead = min(max(0.5 * distance, 0.006), 0.02)
    velocity = np.array([1.0, slope]) / math.hypot(1, slope)
    spin = wanted_turn * np.array([-along, face])
    step = lead * (velocity + np.clip(spin, -0.5, 0.5))
    return go((touch + step[0]) * normal + (sideways + step[1]) * tangent, HEIGHT_M, 0.35)


def _choose_wall(error: np.ndarray, rotation: float) -> np.ndarray:
    """Unit vector, in the frame's axes, along which to push: that of the larger remaining distance."""
    axis = int(np.argmax(np.abs(error)))
    wall = np.zeros(2)
    wall[axis] = 1.0 if error[axis] >= 0 else -1.0
    return wall
