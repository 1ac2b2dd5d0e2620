"""Skill ``align`` of the scripted expert: push a frame into a pose, from inside or from outside of it.

From inside, the fingers open against two walls and take the frame along. From outside, both fingers lie flat against a
wall: as long as the push stays inside the friction cone and the turn is slow enough that neither finger leaves the
wall, the frame moves as one body with the gripper (Lynch and Mason 1996, stable pushing).
"""

from __future__ import annotations

import math

import numpy as np

from simtoreal.data_collection.expert_scene import Goal, Memory, Scene, wrap
from simtoreal.envs.task import ObjectSpec

HEIGHT_M, HOVER_M = 0.016, 0.07
FINGER_M = 0.011
# Distance of the open fingers' middles from the gripper's axis.
ARM_M = 0.047
APPROACH_M = 0.025
STEEPEST, SLIP = 1.0, 1.4
SETTLE_STEPS = 5
DONE_M, DONE_RAD = 0.006, math.radians(3.0)


def align(scene: Scene, memory: Memory, item: ObjectSpec, to: ObjectSpec) -> Goal | None:
    """Push ``item`` into the pose of ``to``; even episode numbers from inside, odd ones from outside."""
    (place, yaw), (goal, goal_yaw) = scene.poses[item.name], scene.poses[to.name]
    error, rotation = (goal - place)[:2], wrap(goal_yaw - yaw)
    if np.hypot(*error) < DONE_M and abs(rotation) < DONE_RAD:
        return Goal(scene.target.copy(), scene.tcp_yaw, scene.opening < 0.2, 0.3)
    if memory.number % 2 == 0:
        return _drag(scene, memory, item, error, rotation)
    return _push(scene, memory, item, error, rotation)


def _drag(scene: Scene, memory: Memory, item: ObjectSpec, error: np.ndarray, rotation: float) -> Goal:
    """Open the fingers inside the frame and carry it along on the table."""
    place, yaw = scene.poses[item.name]
    inside = np.hypot(*(scene.tcp - place)[:2]) < item.size_m[0] / 2
    if not inside or scene.tcp[2] > HEIGHT_M + 0.012:
        memory.closing = 0
        return _descend(scene, place[:2], _nearest(yaw, scene.tcp_yaw), closed=True)
    memory.closing += 1
    if memory.closing < SETTLE_STEPS:
        return Goal(np.array([*scene.target[:2], HEIGHT_M]), scene.tcp_yaw, False, 0.3)
    position = np.array([*(scene.tcp[:2] + error), HEIGHT_M])
    return Goal(position, scene.tcp_yaw + rotation, False, 0.5 if np.hypot(*error) > 0.04 else 0.25)


def _push(scene: Scene, memory: Memory, item: ObjectSpec, error: np.ndarray, rotation: float) -> Goal:
    """Push with both fingers against the wall that faces away from the goal."""
    place, yaw = scene.poses[item.name]
    outside = item.size_m[0] + 2 * item.size_m[1]
    if memory.wall is not None and _turned(error, -yaw - memory.wall)[0] < 0.002 and not memory.retreating:
        memory.retreating = True
    if memory.retreating and memory.wall is not None:
        # Leave the wall before lifting, or the fingers take it along.
        back = _turned((scene.tcp - place)[:2], -yaw - memory.wall)[0]
        if scene.tcp[2] < 0.03 and back > -(outside + FINGER_M + 0.02):
            step = _turned(np.array([-0.03, 0.0]), yaw + memory.wall)
            return Goal(np.array([*(scene.tcp[:2] + step), HEIGHT_M]), scene.tcp_yaw, False, 1.0)
        memory.retreating, memory.wall = False, None
    if memory.wall is None:
        ahead = _turned(error, -yaw)
        quarter = round(math.atan2(ahead[1], ahead[0]) / (math.pi / 2))
        memory.wall = quarter * math.pi / 2
    heading = yaw + memory.wall
    ahead, relative = _turned(error, -heading), _turned((scene.tcp - place)[:2], -heading)
    grip_yaw = _nearest(heading, scene.tcp_yaw)
    touch = -(outside + FINGER_M)
    behind = relative[0] < touch + 0.006 and abs(relative[1]) < 0.03
    if not behind or scene.tcp[2] > HEIGHT_M + 0.012:
        start = place[:2] + _turned(np.array([touch - APPROACH_M, 0.0]), heading)
        return _descend(scene, start, grip_yaw, closed=False)
    if relative[0] < touch - 0.004:
        return Goal(np.array([*(place[:2] + _turned(np.array([touch, 0.0]), heading)), HEIGHT_M]), grip_yaw, False, 0.3)
    slope = float(np.clip(SLIP * ahead[1] / max(ahead[0], 0.004), -STEEPEST, STEEPEST))
    speed = 0.35 if ahead[0] > 0.03 else 0.2
    lead = min(ahead[0] + 0.006, 0.025)
    step = _turned(np.array([lead, lead * slope]), heading)
    turn = 0.6 * speed * 0.02 / ARM_M
    yaw_goal = scene.tcp_yaw + float(np.clip(rotation, -turn, turn))
    return Goal(np.array([*(scene.tcp[:2] + step), HEIGHT_M]), yaw_goal, False, speed)


def _descend(scene: Scene, point: np.ndarray, yaw: float, *, closed: bool) -> Goal:
    """Come down at ``point`` (2,) with the fingers ready; stay above everything until they are."""
    apart = float(np.hypot(*(scene.tcp[:2] - point)))
    ready = abs(wrap(yaw - scene.tcp_yaw)) < 0.08 and (scene.opening < 0.15 if closed else scene.opening > 0.9)
    low = ready and (apart < 0.008 or (scene.tcp[2] < 0.05 and apart < 0.02))
    return Goal(np.array([*point, HEIGHT_M if low else HOVER_M]), yaw, closed, 1.0)


def _turned(vector: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([cosine * vector[0] - sine * vector[1], sine * vector[0] + cosine * vector[1]])


def _nearest(angle: float, reference: float) -> float:
    """The angle equal to ``angle`` modulo half a turn that is nearest to ``reference``."""
    return angle + round((reference - angle) / math.pi) * math.pi
