"""Per-simulation model fields of a batch: what a :class:`~simtoreal.envs.randomization.Variation` changes."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
from mujoco.batch import Batch

from simtoreal.envs import rotation
from simtoreal.envs.randomization import Variation
from simtoreal.envs.scene import ObjectIndex
from simtoreal.envs.task import TaskSpec

HEADLIGHT = ("vis.headlight.ambient", "vis.headlight.diffuse")
PHYSICAL = (
    "body_mass", "body_inertia", "geom_friction", "actuator_gainprm", "actuator_biasprm",
    "cam_pos", "cam_quat", "light_pos",
)  # fmt: skip
VISUAL = ("geom_rgba", "geom_matid", "cam_fovy", "light_diffuse", *HEADLIGHT)
ARM_ACTUATORS = 6


class VariedModels:
    """Gives every simulation of a batch its own values of the fields that variations change.

    Attributes:
        physics: model field -> live values with a leading axis of simulations, used by the batch.
        looks: the same for fields that only drawing reads (dotted names allowed).
    """

    def __init__(self, batch: Batch, task: TaskSpec, objects: dict[str, ObjectIndex]) -> None:
        self.model, self.task, self.objects = batch.model, task, objects
        self.physics = {name: batch.expand(name) for name in PHYSICAL}
        self.looks = {
            name: np.repeat(np.array(attrgetter(name)(batch.model))[None], batch.nsim, axis=0) for name in VISUAL
        }

    def apply(self, slot: int, variation: Variation) -> None:
        """Write a variation into the fields of one simulation; ``batch.set_const`` must follow."""
        physics, looks, model = self.physics, self.looks, self.model
        # MuJoCo lets the rougher of two surfaces decide: an object's own friction alone would hardly ever count.
        physics["geom_friction"][slot] = model.geom_friction * variation.friction_scale
        for index, item in enumerate(self.task.objects):
            where = self.objects[item.name]
            if not item.fixed:
                for name in ("body_mass", "body_inertia"):
                    physics[name][slot, where.body] = getattr(model, name)[where.body] * variation.mass_scale
            for geom in where.geoms:
                color = model.geom_rgba[geom, :3] + variation.color_offsets[index]
                looks["geom_rgba"][slot, geom, :3] = np.clip(color, 0.0, 1.0)
        for name in ("actuator_gainprm", "actuator_biasprm"):
            physics[name][slot, :ARM_ACTUATORS] = getattr(model, name)[:ARM_ACTUATORS] * variation.gain_scale
        for camera in range(model.ncam):
            physics["cam_pos"][slot, camera] = model.cam_pos[camera] + variation.camera_offsets_m[camera]
            turn = rotation.from_rotation_vector(variation.camera_rotations_rad[camera])
            physics["cam_quat"][slot, camera] = rotation.quaternion_multiply(turn, model.cam_quat[camera])
        looks["cam_fovy"][slot] = model.cam_fovy + variation.camera_fov_deg
        physics["light_pos"][slot] = model.light_pos + variation.light_offset_m
        looks["light_diffuse"][slot] = model.light_diffuse * variation.light_scale
        for name in HEADLIGHT:
            looks[name][slot] = attrgetter(name)(model) * variation.light_scale
        looks["geom_matid"][slot, model.geom("table").id] = model.material(f"table{variation.table_look}").id
