"""Skill ``weave`` of the scripted expert: through rows of posts, by the gaps that the episode's seed chooses."""

from __future__ import annotations

import itertools

import numpy as np

from simtoreal.data_collection.expert_scene import Goal, Memory, Scene
from simtoreal.envs.task import ObjectSpec, TaskSpec

HEIGHT_M = 0.02
# Before and after a row the gripper is in line with its gap.
STRAIGHT_M = 0.02
START_M = 0.07
ARRIVED_M = 0.018
# An episode keeps its own place in each gap, as people do.
JITTER_M = (0.005, 0.008)


def weave(task: TaskSpec, scene: Scene, memory: Memory, finish: ObjectSpec) -> Goal | None:
    """Go down before the first row, through one gap of every row, and beyond ``finish``.

    The gaps are digits of the episode's number: consecutive seeds go through all combinations in turn, so a set of
    demonstrations is balanced over them.
    """
    if memory.route is None:
        posts = np.array([scene.poses[item.name][0][:2] for item in task.objects if item.shape == "plate"])
        memory.route = _route(posts, float(scene.poses[finish.name][0][0]), memory.number, memory.rng)
    start = memory.route[0]
    while len(memory.route) > 1 and np.hypot(*(scene.tcp[:2] - memory.route[0])) < ARRIVED_M:
        if memory.route[0] is start and scene.tcp[2] > HEIGHT_M + 0.008:
            break
        memory.route = memory.route[1:]
    position = np.array([*memory.route[0], HEIGHT_M])
    if scene.tcp[2] > HEIGHT_M + 0.015:
        away = float(np.hypot(*(scene.tcp[:2] - memory.route[0])))
        position[2] += 0.2 * min(1.0, max(0.0, (away - 0.015) / 0.085))
    return Goal(position, 0.0, True)


def gaps(posts: np.ndarray) -> list[tuple[float, list[float]]]:
    """Rows of posts ``(P, 2)`` (m) from near to far: x of the row, and y of its gaps' middles from left to right."""
    rows = []
    pitch = _pitch(posts)
    for x in np.unique(posts[:, 0].round(3)):
        ys = sorted(posts[np.isclose(posts[:, 0], x, atol=1e-3), 1], reverse=True)
        edges = [ys[0] + pitch, *ys, ys[-1] - pitch]
        rows.append((float(x), [float(left + right) / 2 for left, right in itertools.pairwise(edges)]))
    return rows


def _pitch(posts: np.ndarray) -> float:
    """Smallest distance between neighbours of a row, which an outermost gap is given too."""
    distances = [abs(a[1] - b[1]) for i, a in enumerate(posts) for b in posts[:i] if abs(a[0] - b[0]) < 1e-3]
    return float(min(distances, default=0.12))


def _route(posts: np.ndarray, finish_x: float, number: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Waypoints (2,) in metres."""
    rows = gaps(posts)
    route = [np.array([rows[0][0] - START_M, 0.0])]
    for x, middles in rows:
        number, gap = divmod(number, len(middles))
        point = np.array([x, middles[gap]]) + rng.normal(0.0, 1.0, 2).clip(-1.5, 1.5) * JITTER_M
        route += [point - [STRAIGHT_M, 0.0], point + [STRAIGHT_M, 0.0]]
    route.append(np.array([finish_x + 0.03, route[-1][1]]))
    return route
