"""Skills ``open`` and ``close`` of the scripted expert: a drawer, by its handle."""

from __future__ import annotations

import math

import numpy as np

from simtoreal.data_collection.expert_scene import Goal, Memory, Scene, above, nearest, ramp, wrap
from simtoreal.envs.scene_layout import DRAWER_HANDLE_X_M
from simtoreal.envs.task import ObjectSpec


def _along(scene: Scene, drawer: ObjectSpec, x: float) -> np.ndarray:
    """Point at ``x`` along the drawer's axis (metres from its front, negative towards the robot)."""
    position, yaw = scene.poses[drawer.name]
    height = position[2] + drawer.size_m[2] + 0.004
    return np.array([position[0] + x * math.cos(yaw), position[1] + x * math.sin(yaw), height])


def open_drawer(scene: Scene, memory: Memory, drawer: ObjectSpec) -> Goal | None:
    """Hook the closed fingers behind the handle and pull."""
    opening = scene.openings[drawer.name]
    yaw = nearest(scene.poses[drawer.name][1], scene.tcp_yaw, math.pi)
    if opening > 0.125:
        memory.retreating = True
    hook = _along(scene, drawer, DRAWER_HANDLE_X_M + 0.024 - opening)
    if memory.retreating:
        return Goal(above(scene.target, 0.05), yaw, True) if scene.tcp[2] < hook[2] + 0.08 else None
    error = float(np.hypot(*(scene.tcp - hook)[:2]))
    aligned = abs(wrap(yaw - scene.tcp_yaw)) < 0.08
    if scene.tcp[2] > hook[2] + 0.01 or error > 0.03:
        height = 0.08 * ramp(error if aligned else 0.05, 0.006, 0.03)
        return Goal(above(hook, height), yaw, True)
    pull = _along(scene, drawer, DRAWER_HANDLE_X_M + 0.024 - opening - 0.035)
    return Goal(pull, yaw, True, 0.5)


def close_drawer(scene: Scene, memory: Memory, drawer: ObjectSpec) -> Goal | None:
    """Push the handle with the closed fingers."""
    opening = scene.openings[drawer.name]
    yaw = nearest(scene.poses[drawer.name][1], scene.tcp_yaw, math.pi)
    if opening < 0.006:
        memory.retreating = True
    front = _along(scene, drawer, DRAWER_HANDLE_X_M - 0.025 - opening)
    if memory.retreating:
        back = _along(scene, drawer, DRAWER_HANDLE_X_M - 0.08 - opening)
        return Goal(back, yaw, True, 0.5)
    relative = scene.tcp - front
    along = float(relative[0] * math.cos(yaw) + relative[1] * math.sin(yaw))
    across = float(abs(relative[1] * math.cos(yaw) - relative[0] * math.sin(yaw)))
    if scene.tcp[2] > front[2] + 0.015 or across > 0.03 or along > 0.02:
        start = _along(scene, drawer, DRAWER_HANDLE_X_M - 0.04 - opening)
        error = float(np.hypot(*(scene.tcp - start)[:2]))
        return Goal(above(start, 0.1 * ramp(error, 0.01, 0.04)), yaw, True)
    push = _along(scene, drawer, DRAWER_HANDLE_X_M - 0.018 - opening + 0.04)
    return Goal(push, yaw, True, 0.5)
