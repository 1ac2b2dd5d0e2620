"""What the skills of the scripted expert share: the scene they see, what they remember, and the goals they give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Goal:
    """Where the end effector should go next: position (m), yaw of the gripper (rad), fingers, speed factor."""

    position: np.ndarray
    yaw: float
    closed: bool
    speed: float = 1.0


@dataclass
class Scene:
    """Live state of one episode, read from its observation."""

    tcp: np.ndarray
    tcp_yaw: float
    target: np.ndarray
    opening: float
    poses: dict[str, tuple[np.ndarray, float]]
    openings: dict[str, float]


@dataclass
class Memory:
    """What the expert remembers of one episode."""

    rng: np.random.Generator
    number: int = 0
    plan_step: int = 0
    closing: int = 0
    releasing: int = 0
    retreating: bool = False
    quaternion: np.ndarray | None = None
    held: set[str] = field(default_factory=set)
    seen: dict[str, np.ndarray] = field(default_factory=dict)
    moving: str = ""
    route: list[np.ndarray] | None = None
    wall: float | None = None


def above(point: np.ndarray, height_m: float) -> np.ndarray:
    """The point ``(3,)`` ``height_m`` metres above ``point``."""
    return np.array([point[0], point[1], point[2] + height_m])


def wrap(angle: float) -> float:
    """Angle in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def nearest(angle: float, reference: float, period: float) -> float:
    """The angle equal to ``angle`` modulo ``period`` that is nearest to ``reference``, kept within one turn."""
    candidate = angle + round((reference - angle) / period) * period
    return candidate if abs(candidate) < math.pi else angle


def ramp(value: float, low: float, high: float) -> float:
    """0 below ``low``, 1 above ``high``, linear between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))
