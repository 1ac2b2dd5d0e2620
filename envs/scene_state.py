"""What a batch of simulations shows of its scenes: the view that predicates read, and the scene truth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simtoreal.envs.panda import FINGER_TRAVEL_M
from simtoreal.envs.predicates import SceneView
from simtoreal.envs.scene import ObjectIndex
from simtoreal.envs.task import TaskSpec


def view_scene(
    fields: Mapping[str, np.ndarray], task: TaskSpec, objects: Mapping[str, ObjectIndex], tcp: int, finger: int
) -> SceneView:
    """Collect what predicates read.

    Args:
        fields: live arrays of the batch, leading axis of simulations.
        task, objects: the task, and where its objects live.
        tcp: id of the TCP site.
        finger: address of the finger joint in ``qpos``.
    """
    positions = {"tcp": fields["site_xpos"][:, tcp]}
    quaternions: dict[str, np.ndarray] = {}
    velocities, openings, touches = {}, {}, {}
    contact = fields["sensordata"] > 0
    for index, item in enumerate(task.objects):
        where = objects[item.name]
        if item.fixed:
            positions[item.name] = fields["mocap_pos"][:, where.mocap]
            quaternions[item.name] = fields["mocap_quat"][:, where.mocap]
        else:
            positions[item.name] = fields["qpos"][:, where.qpos : where.qpos + 3]
            quaternions[item.name] = fields["qpos"][:, where.qpos + 3 : where.qpos + 7]
            velocities[item.name] = fields["qvel"][:, where.qvel : where.qvel + 3]
        if item.articulated:
            openings[item.name] = fields["qpos"][:, where.joint_qpos]
        touches[item.name] = contact[:, 2 * index : 2 * index + 2]
    opening = fields["qpos"][:, finger] / FINGER_TRAVEL_M
    return SceneView(positions, quaternions, velocities, openings, touches, opening)


def object_state(fields: Mapping[str, np.ndarray], task: TaskSpec, objects: Mapping[str, ObjectIndex]) -> np.ndarray:
    """Scene truth ``(N, D)`` float32; names in ``task.object_state_names``."""
    qpos, parts = fields["qpos"], []
    for item in task.objects:
        where = objects[item.name]
        if item.fixed:
            parts += [fields["mocap_pos"][:, where.mocap], fields["mocap_quat"][:, where.mocap]]
        else:
            parts.append(qpos[:, where.qpos : where.qpos + 7])
        if item.articulated:
            parts.append(qpos[:, where.joint_qpos : where.joint_qpos + 1])
    return np.concatenate(parts, axis=-1, dtype=np.float32, casting="same_kind")
