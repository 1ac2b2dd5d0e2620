"""Builds the MuJoCo model of a task: table, robot, objects, lights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.panda import OBJECT_BIT, ROBOT_BIT, add_panda
from simtoreal.envs.scene_layout import (
    DRAWER_FRONT_M,
    DRAWER_HANDLE_HALF_M,
    DRAWER_HANDLE_X_M,
    DRAWER_TRAVEL_M,
    TABLE_CENTER_M,
    TABLE_HALF_M,
)
from simtoreal.envs.task import COLORS, ObjectSpec, TaskSpec

TIMESTEP_S = 0.005
# Looks of the table among which domain randomisation chooses; the first is the default.
TABLE_LOOKS = (
    ((0.36, 0.37, 0.41), (0.41, 0.42, 0.46)),
    ((0.55, 0.45, 0.34), (0.60, 0.50, 0.38)),
    ((0.75, 0.75, 0.73), (0.70, 0.70, 0.68)),
    ((0.20, 0.22, 0.24), (0.24, 0.26, 0.28)),
    ((0.30, 0.38, 0.34), (0.35, 0.43, 0.39)),
    ((0.52, 0.52, 0.58), (0.47, 0.47, 0.53)),
)
_SOFT = (0.004, 1.0)  # contact solref: no penetration visible at 5 ms, no chatter


@dataclass(frozen=True)
class ObjectIndex:
    """Where an object lives in the model's arrays.

    Attributes:
        body: body id.
        qpos, qvel: address of the free joint, -1 for fixed objects.
        mocap: mocap id, -1 for free objects.
        joint_qpos: address of the drawer's joint, -1 without one.
        geoms: ids of its geoms.
    """

    body: int
    qpos: int
    qvel: int
    mocap: int
    joint_qpos: int
    geoms: tuple[int, ...]


def timestep_s(period_s: float) -> float:
    """Return the longest time step (s), ``TIMESTEP_S`` at most, of which a whole number makes a control period."""
    return period_s / max(1, math.ceil(period_s / TIMESTEP_S - 1e-9))


def build_model(task: TaskSpec, embodiment: Embodiment) -> mujoco.MjModel:
    """Compile the scene of ``task`` with the robot and cameras of ``embodiment``."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    spec.modelname = f"simtoreal_{task.name}"
    option = spec.option
    option.timestep = timestep_s(embodiment.control_period_s)
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    option.impratio = 10
    option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    option.iterations, option.ls_iterations = 20, 20
    # A diverged simulation must stay diverged until we report it; MuJoCo would silently start over.
    option.disableflags = int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    _set_visual(spec, embodiment.render_profile)
    _add_table(spec, embodiment.render_profile)
    add_panda(spec, embodiment)
    for item in task.objects:
        _add_object(spec, item)
    for item in task.objects:
        _add_touch_sensors(spec, item)
    return spec.compile()


def index_objects(model: mujoco.MjModel, task: TaskSpec) -> dict[str, ObjectIndex]:
    """Look up the addresses of every object of ``task``."""
    found = {}
    for item in task.objects:
        body = model.body(item.name).id
        qpos = qvel = joint_qpos = -1
        if not item.fixed:
            joint = model.joint(f"{item.name}_free")
            qpos, qvel = int(joint.qposadr[0]), int(joint.dofadr[0])
        if item.articulated:
            joint_qpos = int(model.joint(f"{item.name}_slide").qposadr[0])
        geoms = tuple(geom for geom in range(model.ngeom) if model.body_rootid[model.geom_bodyid[geom]] == body)
        found[item.name] = ObjectIndex(body, qpos, qvel, int(model.body_mocapid[body]), joint_qpos, geoms)
    return found


def _set_visual(spec: mujoco.MjSpec, profile: str) -> None:
    quality = spec.visual.quality
    if profile == "fast":
        # On a CPU rasteriser these defaults cost ten times the image itself (design.md §3).
        quality.offsamples, quality.shadowsize = 0, 0
        quality.numslices, quality.numstacks, quality.numquads = 10, 6, 1
    else:
        quality.offsamples, quality.shadowsize = 8, 2048
        quality.numslices, quality.numstacks, quality.numquads = 28, 16, 4
    spec.visual.headlight.ambient = [0.38, 0.38, 0.38]
    spec.visual.headlight.diffuse = [0.3, 0.3, 0.3]
    spec.visual.headlight.specular = [0.0, 0.0, 0.0]
    spec.visual.map.znear, spec.visual.map.zfar = 0.01, 20
    spec.stat.extent, spec.stat.center = 1.0, [0.45, 0, 0.1]


def _add_table(spec: mujoco.MjSpec, profile: str) -> None:
    for index, (light, dark) in enumerate(TABLE_LOOKS):
        spec.add_texture(
            name=f"table{index}", type=mujoco.mjtTexture.mjTEXTURE_2D, builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER,
            rgb1=light, rgb2=dark, width=64, height=64,
        )  # fmt: skip
        material = spec.add_material(name=f"table{index}", texrepeat=[4, 5.5], specular=0.1, shininess=0.1)
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"table{index}"
    world = spec.worldbody
    world.add_geom(
        name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, pos=[*TABLE_CENTER_M, 0], size=[*TABLE_HALF_M, 0.1],
        material="table0", contype=OBJECT_BIT, conaffinity=ROBOT_BIT | OBJECT_BIT, friction=[1, 0.01, 0.001],
    )  # fmt: skip
    light = world.add_light(name="lamp", pos=[0.6, -0.4, 1.8], dir=[-0.1, 0.25, -1], castshadow=profile == "high")
    light.diffuse, light.ambient, light.specular = [0.55, 0.55, 0.55], [0, 0, 0], [0.15, 0.15, 0.15]
    if profile == "high":
        _add_room(spec)


def _add_room(spec: mujoco.MjSpec) -> None:
    """Table body, floor and sky: only for pictures, they neither collide nor appear in the fast profile."""
    box = mujoco.mjtGeom.mjGEOM_BOX
    world = spec.worldbody
    quiet = {"contype": 0, "conaffinity": 0}
    world.add_geom(
        type=box, pos=[*TABLE_CENTER_M, -0.021], size=[*TABLE_HALF_M, 0.02], rgba=[0.3, 0.31, 0.34, 1], **quiet
    )
    for x in (-0.36, 0.36):
        for y in (-0.5, 0.5):
            world.add_geom(
                type=box, pos=[TABLE_CENTER_M[0] + x, y, -0.37], size=[0.025, 0.025, 0.33],
                rgba=[0.25, 0.26, 0.28, 1], **quiet,
            )  # fmt: skip
    spec.add_texture(
        name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=[0.85, 0.88, 0.93], rgb2=[0.55, 0.6, 0.7], width=256, height=256,
    )  # fmt: skip
    world.add_geom(
        type=mujoco.mjtGeom.mjGEOM_PLANE, pos=[0, 0, -0.7], size=[6, 6, 0.1], rgba=[0.62, 0.63, 0.66, 1], **quiet
    )


def _add_object(spec: mujoco.MjSpec, item: ObjectSpec) -> None:
    body = spec.worldbody.add_body(name=item.name, mocap=item.fixed)
    if not item.fixed:
        body.add_freejoint(name=f"{item.name}_free")
    rgba = [*COLORS[item.color], 1.0]
    solid = {
        "contype": OBJECT_BIT, "conaffinity": ROBOT_BIT | OBJECT_BIT, "condim": 4, "rgba": rgba,
        "friction": [item.friction, 0.02, 0.001], "solref": _SOFT,
    }  # fmt: skip
    ghost = {"contype": 0, "conaffinity": 0, "rgba": rgba}
    kinds = mujoco.mjtGeom
    size = item.size_m
    if item.shape == "box":
        body.add_geom(type=kinds.mjGEOM_BOX, size=size, mass=item.mass_kg, **solid)
    elif item.shape == "cylinder":
        body.add_geom(type=kinds.mjGEOM_CYLINDER, size=[*size, 0], mass=item.mass_kg, **solid)
    elif item.shape == "sphere":
        body.add_geom(type=kinds.mjGEOM_SPHERE, size=[*size, 0, 0], mass=item.mass_kg, **solid)
    elif item.shape == "plate":
        body.add_geom(type=kinds.mjGEOM_CYLINDER, size=[*size, 0], pos=[0, 0, size[1]], **solid)
    elif item.shape == "region":
        body.add_geom(type=kinds.mjGEOM_CYLINDER, size=[size[0], 0.0008, 0], pos=[0, 0, 0.0008], **ghost)
    elif item.shape == "point":
        body.add_geom(type=kinds.mjGEOM_SPHERE, size=[size[0], 0, 0], **ghost)
    elif item.shape == "socket":
        _add_walls(body, size, size[2], None, solid)
    elif item.shape == "frame":
        _add_walls(body, size, 0.0, item.mass_kg / 4, solid)
    else:
        _add_drawer(body, item, solid)


def _add_walls(
    body: mujoco.MjsBody, size: tuple[float, ...], middle: float, mass: float | None, solid: dict[str, object]
) -> None:
    """Four walls around a square hole whose middle is ``middle`` metres above the origin; ``mass`` (kg) is of each."""
    hole, wall, half_height = size
    outer = hole + 2 * wall
    weight = {} if mass is None else {"mass": mass}
    for axis in (0, 1):
        for side in (-1, 1):
            position = [0.0, 0.0, middle]
            position[axis] = side * (hole + wall)
            extent = [outer, outer, half_height]
            extent[axis] = wall
            if axis == 1:
                extent[0] = hole
            body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=position, size=extent, **solid, **weight)


def _add_drawer(body: mujoco.MjsBody, item: ObjectSpec, solid: dict[str, object]) -> None:
    """A cabinet that opens towards -x (the robot); its body origin is the middle of its front, on the table."""
    depth, width, height = item.size_m
    wall, box = 0.006, mujoco.mjtGeom.mjGEOM_BOX
    cabinet = {**solid, "rgba": [*(0.75 * c for c in COLORS[item.color]), 1.0]}
    for side in (-1, 1):
        body.add_geom(type=box, pos=[depth, side * (width - wall), height], size=[depth, wall, height], **cabinet)
    body.add_geom(type=box, pos=[depth, 0, 2 * height], size=[depth, width, wall], **cabinet)
    tray = body.add_body(name=f"{item.name}_tray")
    # The joint moves the tray out of the cabinet, along the cabinet's -x.
    tray.add_joint(
        name=f"{item.name}_slide", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[-1, 0, 0], range=[0, DRAWER_TRAVEL_M],
        damping=[4.0, 0, 0], frictionloss=0.6, armature=0.05,
    )  # fmt: skip
    inner = width - 2 * wall - 0.004
    front = DRAWER_FRONT_M / 2
    tray.add_geom(type=box, pos=[-front, 0, height], size=[front, width, height - 0.004], mass=0.15, **solid)
    ghost = {**solid, "contype": 0, "conaffinity": 0}
    tray.add_geom(type=box, pos=[depth, 0, 0.012], size=[depth - 0.01, inner, 0.006], mass=0.15, **ghost)
    grey = {**solid, "rgba": [0.25, 0.25, 0.28, 1.0], "friction": [1.5, 0.02, 0.001]}
    tray.add_geom(type=box, pos=[DRAWER_HANDLE_X_M, 0, height], size=DRAWER_HANDLE_HALF_M, mass=0.03, **grey)
    for side in (-1, 1):
        tray.add_geom(
            type=box, pos=[-0.03, side * 0.024, height], size=[0.02, 0.005, 0.006], mass=0.01, **{**grey, **_NO_CONTACT}
        )


_NO_CONTACT = {"contype": 0, "conaffinity": 0}


def _add_touch_sensors(spec: mujoco.MjSpec, item: ObjectSpec) -> None:
    """Per finger, whether it touches the object (or the moving part of it)."""
    body = f"{item.name}_tray" if item.articulated else item.name
    for finger in ("left_finger", "right_finger"):
        sensor = spec.add_sensor(
            name=f"{finger}_{item.name}", type=mujoco.mjtSensor.mjSENS_CONTACT,
            objtype=mujoco.mjtObj.mjOBJ_BODY, objname=finger, reftype=mujoco.mjtObj.mjOBJ_BODY, refname=body,
        )  # fmt: skip
        sensor.intprm[:3] = [1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND), 0, 1]
