"""Turning actions into absolute end-effector targets, the same way in simulation and on the robot."""

from __future__ import annotations

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ActionError

RANGE_TOLERANCE = 1e-3


def check_action(action: np.ndarray, shape: tuple[int, ...], *, bounded: bool = True) -> np.ndarray:
    """Validate an action and return it as float32, clipped by at most the tolerance.

    Args:
        action: the action given by the user.
        shape: expected shape, ``(dim,)`` or ``(num_envs, dim)``.
        bounded: whether values must lie in [-1, 1] (``ee_delta``).

    Raises:
        ActionError: wrong type, shape or dtype, not finite, or out of range by more than 1e-3.
    """
    array = np.asarray(action)
    if array.dtype.kind not in "fiu":
        raise ActionError(f"action has dtype {array.dtype}; expected float32 of shape {shape}")
    if array.shape != shape:
        raise ActionError(f"action has shape {array.shape}; expected {shape}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ActionError(f"action is not finite at index {where} (value {array[tuple(where)]})")
    if bounded:
        excess = np.abs(array).max(initial=0.0)
        if excess > 1 + RANGE_TOLERANCE:
            where = np.unravel_index(np.abs(array).argmax(), array.shape)
            index = [int(i) for i in where]
            raise ActionError(f"action at index {index} is {array[where]:.4f}; expected a value in [-1, 1]")
        array = np.clip(array, -1.0, 1.0)
    return array


def integrate_pose(
    position: np.ndarray, quaternion: np.ndarray, action: np.ndarray, embodiment: Embodiment
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the next target pose for an ``ee_delta`` action.

    The displacement applies to the previous *target*, not to the measured pose, so that the target does
    not sag under load; rotation deltas are in the base frame.

    Args:
        position: ``(..., 3)`` current target position in metres, base frame.
        quaternion: ``(..., 4)`` current target orientation, wxyz.
        action: ``(..., 7)`` validated action.
        embodiment: gives limits and workspace box.

    Returns:
        position ``(..., 3)`` inside the workspace box, quaternion ``(..., 4)``, opening ``(...)`` 0 or 1.
    """
    scaled = np.asarray(action, dtype=np.float64) * embodiment.action.limits
    moved = position + scaled[..., :3]
    low, high = embodiment.workspace_low_m, embodiment.workspace_high_m
    moved = np.minimum(np.maximum(moved, low), high)
    turned = rotation.quaternion_multiply(rotation.from_rotation_vector(scaled[..., 3:6]), quaternion)
    turned /= np.sqrt((turned * turned).sum(-1, keepdims=True))
    return moved, turned, (action[..., 6] > 0).astype(np.float64)


def integrate_action(target: np.ndarray, action: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """Return the next absolute target for an action in the embodiment's mode.

    Args:
        target: ``(..., 10)`` current target (``TARGET_NAMES``: metres, 6-D rotation, opening in [0, 1]).
        action: ``(..., action_dim)`` validated action.
        embodiment: gives mode, limits and workspace box.

    Returns:
        ``(..., 10)`` float64 target, position inside the workspace box.

    Raises:
        ActionError: the actions are those of a foreign environment (mode ``env``).
    """
    if embodiment.action.mode == "env":
        raise ActionError(f"actions of '{embodiment.name}' are those of a foreign environment; they have no target")
    if embodiment.action.mode == "ee_delta":
        pose = integrate_pose(target[..., :3], rotation.from_6d(target[..., 3:9]), action, embodiment)
        position, quaternion, opening = pose
        return np.concatenate([position, rotation.to_6d(quaternion), opening[..., None]], axis=-1)
    result = np.array(action, dtype=np.float64)
    result[..., :3] = np.clip(result[..., :3], embodiment.workspace_low_m, embodiment.workspace_high_m)
    result[..., 3:9] = rotation.to_6d(rotation.from_6d(result[..., 3:9]))
    result[..., 9] = np.clip(result[..., 9], 0.0, 1.0)
    return result


def action_towards(target: np.ndarray, goal: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """Return the ``ee_delta`` action that moves ``target`` as far towards ``goal`` as the limits allow.

    The inverse of :func:`integrate_action`; translation and rotation keep their direction when they saturate.

    Args:
        target, goal: ``(..., 10)`` absolute targets.
        embodiment: gives the limits.

    Returns:
        ``(..., 7)`` float32 in [-1, 1].
    """
    limits = np.asarray(embodiment.action.limits)
    move = (goal[..., :3] - target[..., :3]) / limits[:3]
    turn_q = rotation.quaternion_multiply(
        rotation.from_6d(goal[..., 3:9]), rotation.quaternion_conjugate(rotation.from_6d(target[..., 3:9]))
    )
    turn = rotation.to_rotation_vector(turn_q) / limits[3:6]
    move = move / np.maximum(np.abs(move).max(-1, keepdims=True), 1.0)
    turn = turn / np.maximum(np.abs(turn).max(-1, keepdims=True), 1.0)
    gripper = np.where(goal[..., 9:] > 0.5, 1.0, -1.0)
    return np.concatenate([move, turn, gripper], axis=-1).astype(np.float32)


def build_proprio(
    tcp_position: np.ndarray,
    tcp_matrix: np.ndarray,
    target_position: np.ndarray,
    opening: np.ndarray,
    joint_positions: np.ndarray,
) -> np.ndarray:
    """Assemble the proprio observation, in the order of ``PROPRIO_NAMES`` of the robot.

    Args:
        tcp_position: ``(..., 3)`` metres, base frame.
        tcp_matrix: ``(..., 3, 3)`` rotation matrix, base frame.
        target_position: ``(..., 3)`` commanded target, metres, base frame.
        opening: ``(...)`` measured finger opening, 0 closed to 1 open.
        joint_positions: ``(..., 7)`` radians.

    Returns:
        ``(..., 20)`` float32.
    """
    parts = [
        tcp_position,
        tcp_matrix[..., 0],
        tcp_matrix[..., 1],
        target_position,
        opening[..., None],
        joint_positions,
    ]
    return np.concatenate(parts, axis=-1).astype(np.float32)
