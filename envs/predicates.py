"""The small language of goals and milestones, e.g. ``on(cube, plate) and not grasped(cube)``.

Predicates are evaluated for all simulations of a batch at once. Text is parsed with Python's ``ast`` and only
calls of known predicates, ``and``, ``or``, ``not`` and numbers are accepted; nothing is executed.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.errors import TaskError, closest

if TYPE_CHECKING:
    from simtoreal.envs.task import ObjectSpec

Array = np.ndarray


@dataclass
class SceneView:
    """State that predicates read; every array has a leading axis of simulations.

    Attributes:
        positions: object name or ``"tcp"`` -> ``(B, 3)`` metres, base frame.
        quaternions: object name or ``"tcp"`` -> ``(B, 4)`` wxyz.
        velocities: free object name -> ``(B, 3)`` m/s.
        openings: drawer name -> ``(B,)`` metres.
        touches: object name -> ``(B, 2)`` bool, contact with the left and right finger.
        gripper_opening: ``(B,)`` 0 closed to 1 open.
    """

    positions: dict[str, Array]
    quaternions: dict[str, Array]
    velocities: dict[str, Array]
    openings: dict[str, Array]
    touches: dict[str, Array]
    gripper_opening: Array


Predicate = Callable[[SceneView], Array]


def _horizontal_distance(scene: SceneView, a: str, b: str) -> Array:
    return np.linalg.norm((scene.positions[a] - scene.positions[b])[:, :2], axis=-1)


def _on(scene: SceneView, a: ObjectSpec, b: ObjectSpec) -> Array:
    """``a`` rests on ``b``: its centre above the support and its base within 12 mm of the surface."""
    position, support, radius_m = scene.positions[a.name], scene.positions[b.name], b.half_extent_m
    if b.shape in ("socket", "frame"):
        radius_m = b.size_m[0] + 2 * b.size_m[1]  # with the walls, which are what carries
    elif b.shape == "drawer":
        # The origin of a drawer is the middle of its front, and it carries on top of the cabinet.
        ahead = rotation.to_matrix(scene.quaternions[b.name])[..., :, 0]
        support, radius_m = support + b.size_m[0] * ahead, min(b.size_m[:2])
    gap = position[:, 2] - a.half_height_m - (support[:, 2] + b.top_m)
    return (np.linalg.norm((position - support)[:, :2], axis=-1) < radius_m) & (np.abs(gap) < 0.012)


def _inserted(scene: SceneView, peg: ObjectSpec, socket: ObjectSpec) -> Array:
    """The base of ``peg`` is inside the hole of ``socket``, at most a quarter of its depth from the bottom."""
    base = scene.positions[peg.name][:, 2] - peg.half_height_m - scene.positions[socket.name][:, 2]
    inside = _horizontal_distance(scene, peg.name, socket.name) < socket.size_m[0]
    return inside & (base < 0.5 * socket.size_m[2])


def _grasped(scene: SceneView, a: ObjectSpec) -> Array:
    """Both fingers touch ``a``."""
    return np.asarray(scene.touches[a.name].all(axis=-1))


def _upright(scene: SceneView, a: ObjectSpec) -> Array:
    """The z axis of ``a`` is within 15 degrees of vertical."""
    return rotation.to_matrix(scene.quaternions[a.name])[..., 2, 2] > np.cos(np.deg2rad(15.0))


def _left_of(scene: SceneView, a: ObjectSpec, b: ObjectSpec) -> Array:
    """``a`` is to the robot's left (+y) of ``b`` by at least 2 cm."""
    return scene.positions[a.name][:, 1] > scene.positions[b.name][:, 1] + 0.02


def _at(scene: SceneView, a: ObjectSpec, b: ObjectSpec, tolerance_m: float) -> Array:
    """``a`` is within ``tolerance_m`` of ``b`` in space."""
    return np.linalg.norm(scene.positions[a.name] - scene.positions[b.name], axis=-1) < tolerance_m


def _lifted(scene: SceneView, a: ObjectSpec, height_m: float) -> Array:
    """The base of ``a`` is at least ``height_m`` above the table."""
    return scene.positions[a.name][:, 2] - a.half_height_m > height_m


def _past(scene: SceneView, a: ObjectSpec, b: ObjectSpec) -> Array:
    """``a`` is farther from the robot (+x) than the middle of ``b``."""
    return scene.positions[a.name][:, 0] > scene.positions[b.name][:, 0]


def _below(scene: SceneView, a: ObjectSpec, height_m: float) -> Array:
    """``a`` (its origin) is less than ``height_m`` above the table."""
    return scene.positions[a.name][:, 2] < height_m


def _aligned(scene: SceneView, a: ObjectSpec, b: ObjectSpec, tolerance_m: float, tolerance_deg: float) -> Array:
    """``a`` has the horizontal position and the rotation of ``b``, within the tolerances."""
    cosine = np.abs((scene.quaternions[a.name] * scene.quaternions[b.name]).sum(-1))
    turn = 2 * np.arccos(np.minimum(cosine, 1.0))
    return (_horizontal_distance(scene, a.name, b.name) <= tolerance_m) & (turn <= np.deg2rad(tolerance_deg))


def _still(scene: SceneView, a: ObjectSpec) -> Array:
    """``a`` moves slower than 5 cm/s."""
    return np.linalg.norm(scene.velocities[a.name], axis=-1) < 0.05


# Arguments that are numbers, and their units; of them those that something has to fit into.
NUMBERS = {"number": "metres", "radius": "metres", "angle": "degrees"}
TOLERANCES = ("radius", "angle")
# What another argument may be: the words for it, and which objects are it.
KINDS: dict[str, tuple[str, Callable[[ObjectSpec], bool]]] = {
    "object": ("an object", lambda item: True),
    "place": ("an object or tcp", lambda item: True),
    "free": ("an object that can be moved", lambda item: not item.fixed),
    "solid": ("an object that can be touched", lambda item: item.shape not in ("region", "point")),
    "support": ("an object with a surface", lambda item: item.shape != "point"),
    "socket": ("a socket", lambda item: item.shape == "socket"),
    "drawer": ("a drawer", lambda item: item.articulated),
}
# name -> (kinds of the arguments, function).
PREDICATES: dict[str, tuple[tuple[str, ...], Callable[..., Array]]] = {
    "on": (("free", "support"), _on),
    "stacked": (("free", "free"), _on),
    "inserted": (("free", "socket"), _inserted),
    "grasped": (("solid",), _grasped),
    "released": (("solid",), lambda scene, a: ~scene.touches[a.name].any(axis=-1)),
    "lifted": (("free", "number"), _lifted),
    "upright": (("free",), _upright),
    "still": (("free",), _still),
    "left_of": (("place", "object"), _left_of),
    "right_of": (("place", "object"), lambda scene, a, b: _left_of(scene, b, a)),
    "at": (("place", "place", "radius"), _at),
    "above": (
        ("place", "object", "radius"),
        lambda scene, a, b, radius_m: _horizontal_distance(scene, a.name, b.name) < radius_m,
    ),
    "past": (("place", "object"), _past),
    "below": (("place", "number"), _below),
    "aligned": (("free", "object", "radius", "angle"), _aligned),
    "open": (("drawer",), lambda scene, d: scene.openings[d.name] > 0.10),
    "closed": (("drawer",), lambda scene, d: scene.openings[d.name] < 0.015),
}

# These read more than poses, so a log of poses cannot tell whether they held.
NOT_FROM_POSES = ("grasped", "released", "still")


class _Tcp:
    """Stands for the end effector where a predicate accepts a place."""

    name = "tcp"


# Far more than a goal needs, and far less than exhausts the stack when nested.
MAX_CHARACTERS = 2000


def parse_predicate(
    text: str, objects: Sequence[ObjectSpec], where: str = "predicate", *, poses_only: bool = False
) -> Predicate:
    """Compile predicate text into a function of a :class:`SceneView` that returns ``(B,)`` bool.

    Args:
        text: e.g. ``"stacked(red_cube, blue_cube) and released(red_cube)"``.
        objects: objects of the task.
        where: file and key, for messages.
        poses_only: refuse predicates of ``NOT_FROM_POSES``.

    Raises:
        TaskError: syntax error, unknown predicate or object (with the closest valid name), wrong arguments, or an
            object of a shape for which the predicate means nothing.
    """
    if len(text) > MAX_CHARACTERS:
        raise TaskError(f"{where}: a predicate of {len(text)} characters; expected at most {MAX_CHARACTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise TaskError(f"{where}: cannot read predicate '{text}': {error.msg} at column {error.offset}") from error
    if poses_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in NOT_FROM_POSES:
                raise TaskError(
                    f"{where}: {node.id} cannot be told from logged poses; use one of "
                    f"{', '.join(name for name in PREDICATES if name not in NOT_FROM_POSES)}"
                )
    return _compile(tree.body, {item.name: item for item in objects}, where)


def require_sense(text: str, where: str) -> None:
    """Refuse predicate text that compiles and never changes: an object related to itself, a tolerance of 0.

    Tasks that were stored with data may say so, hence this is no part of :func:`parse_predicate`.

    Args:
        text: what :func:`parse_predicate` accepts.
        where: file and key, for messages.

    Raises:
        TaskError: names predicate and argument.
    """
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = [*zip(PREDICATES[name][0], map(ast.unparse, node.args), strict=True)]
        names = [given for kind, given in arguments if kind not in NUMBERS]
        if len(set(names)) < len(names):
            raise TaskError(f"{where}: {ast.unparse(node)} relates '{names[0]}' to itself; expected two objects")
        for kind, given in arguments:
            if kind in TOLERANCES and float(given) <= 0:
                raise TaskError(f"{where}: {name} got '{given}' where it needs more than 0 {NUMBERS[kind]}")


def _compile(node: ast.expr, objects: dict[str, Any], where: str) -> Predicate:
    if isinstance(node, ast.BoolOp):
        parts = [_compile(value, objects, where) for value in node.values]
        combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return lambda scene: combine.reduce([part(scene) for part in parts])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _compile(node.operand, objects, where)
        return lambda scene: ~inner(scene)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _compile_call(node.func.id, node.args, objects, where)
    raise TaskError(f"{where}: '{ast.unparse(node)}' is not a predicate call, and, or, not")


def _compile_call(name: str, nodes: list[ast.expr], objects: dict[str, Any], where: str) -> Predicate:
    if name not in PREDICATES:
        raise TaskError(f"{where}: unknown predicate '{name}'. {closest(name, PREDICATES)}")
    kinds, function = PREDICATES[name]
    if len(nodes) != len(kinds):
        raise TaskError(f"{where}: {name}({', '.join(kinds)}) takes {len(kinds)} arguments, got {len(nodes)}")
    arguments = [_argument(name, kind, node, objects, where) for kind, node in zip(kinds, nodes, strict=True)]
    return lambda scene: function(scene, *arguments)


def _argument(predicate: str, kind: str, node: ast.expr, objects: dict[str, Any], where: str) -> Any:
    text = ast.unparse(node)
    if kind in NUMBERS:
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf:
            return float(value)
        raise TaskError(f"{where}: {predicate} expects a number in {NUMBERS[kind]}, got '{text}'")
    if kind == "place" and text == "tcp":
        return _Tcp()
    words, accepted = KINDS[kind]
    valid = [item_name for item_name, item in objects.items() if accepted(item)]
    if text not in valid:
        hint = closest(text, [*valid, "tcp"] if kind == "place" else valid)
        given = f"'{text}' ({objects[text].shape})" if text in objects else f"'{text}'"
        raise TaskError(f"{where}: {predicate} got {given} where it needs {words}. {hint}")
    return objects[text]
