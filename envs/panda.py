"""Franka Panda from primitive shapes, with a Cartesian impedance controller inside the model.

Kinematics are the published Denavit-Hartenberg parameters (d1 .333, d3 .316, a4 .0825, a5 -.0825, d5 .384,
a7 .088, flange .107, TCP .1034, hand turned by -45 degrees); inertias are rounded. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from simtoreal.envs.embodiment import ActionSpec, CameraSpec, Embodiment, ProprioSpec
from simtoreal.envs.scene_layout import GRIPPER_OPENING_M

ARM_JOINTS = tuple(f"panda_joint{i}" for i in range(1, 8))
FINGER_JOINT = "panda_finger_joint1"
JOINT_LOW_RAD = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)
JOINT_HIGH_RAD = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
JOINT_VELOCITY_LIMIT_RAD_S = (2.1750, 2.1750, 2.1750, 2.1750, 2.6100, 2.6100, 2.6100)
# Gripper down with the TCP at (0.45, 0, 0.25) m: in reach of the whole table and in view of the front camera.
HOME_RAD = (0.0, -0.1848, 0.0, -2.4967, 0.0, 2.3119, 0.7854)
FINGER_TRAVEL_M = GRIPPER_OPENING_M / 2

# Bits of the collision masks: the robot does not collide with itself.
ROBOT_BIT, OBJECT_BIT = 1, 2

ACTUATORS = ("x", "y", "z", "rx", "ry", "rz", "null", "gripper")

PROPRIO_NAMES = (
    "tcp_x", "tcp_y", "tcp_z",
    "tcp_r11", "tcp_r21", "tcp_r31", "tcp_r12", "tcp_r22", "tcp_r32",
    "target_x", "target_y", "target_z",
    "gripper_opening",
    *ARM_JOINTS,
)  # fmt: skip
PROPRIO_UNITS = (*("m",) * 3, *("1",) * 6, *("m",) * 3, "1", *("rad",) * 7)

_WHITE, _DARK, _BLUE = (0.93, 0.93, 0.95, 1), (0.22, 0.23, 0.26, 1), (0.25, 0.45, 0.75, 1)


@dataclass(frozen=True)
class _Link:
    """One link: pose in its parent, mass (kg), centre of mass, diagonal inertia, and a capsule to draw it."""

    position: tuple[float, float, float]
    quaternion: tuple[float, float, float, float]
    mass: float
    center: tuple[float, float, float]
    inertia: tuple[float, float, float]
    radius: float
    capsule: tuple[float, float, float, float, float, float]


_S = 0.70710678
_LINKS = (
    _Link((0, 0, 0.333), (1, 0, 0, 0), 3.0, (0, 0, -0.1), (0.03, 0.03, 0.02), 0.06, (0, 0, -0.22, 0, 0, 0)),
    _Link((0, 0, 0), (_S, -_S, 0, 0), 3.0, (0, -0.1, 0), (0.03, 0.02, 0.03), 0.06, (0, 0, 0, 0, -0.24, 0)),
    _Link((0, -0.316, 0), (_S, _S, 0, 0), 2.5, (0, 0, 0), (0.03, 0.03, 0.02), 0.055, (0, 0, 0, 0.0825, 0, 0)),
    _Link((0.0825, 0, 0), (_S, _S, 0, 0), 2.5, (-0.04, 0.1, 0), (0.03, 0.02, 0.03), 0.055, (0, 0, 0, -0.0825, 0.2, 0)),
    _Link((-0.0825, 0.384, 0), (_S, -_S, 0, 0), 2.5, (0, 0, -0.1), (0.02, 0.02, 0.01), 0.05, (0, 0, -0.19, 0, 0, 0)),
    _Link((0, 0, 0), (_S, _S, 0, 0), 1.5, (0.02, 0, 0), (0.006, 0.006, 0.006), 0.05, (0, 0, 0, 0.088, 0, 0)),
    _Link((0.088, 0, 0), (_S, _S, 0, 0), 1.0, (0, 0, 0.06), (0.004, 0.004, 0.003), 0.045, (0, 0, 0.02, 0, 0, 0.08)),
)


def look_at(
    position: tuple[float, float, float], point: tuple[float, float, float]
) -> tuple[float, float, float, float]:
    """Camera orientation (wxyz; looks along -z, +y up) at ``position`` towards ``point``, with no roll."""
    from simtoreal.envs import rotation

    back = np.subtract(position, point).astype(float)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    matrix = np.stack([right, np.cross(back, right), back], axis=-1)
    w, x, y, z = rotation.from_matrix(matrix).tolist()
    return round(w, 9), round(x, 9), round(y, 9), round(z, 9)


FRONT_POSITION_M = (1.06, 0.0, 0.52)
FRONT_LOOKS_AT_M = (0.47, 0.0, 0.04)
WRIST_POSITION_M = (0.075, 0.0, 0.03)
WRIST_LOOKS_AT_M = (0.028, 0.0, 0.115)
# OpenGL draws no larger ones everywhere.
MAX_IMAGE_SIZE = 4096


def panda_cameras(image_size: int = 64) -> tuple[CameraSpec, ...]:
    """Default cameras: ``front`` looks at the table from across, ``wrist`` looks along the fingers."""
    back = np.subtract(WRIST_POSITION_M, WRIST_LOOKS_AT_M).astype(float)
    back /= np.linalg.norm(back)
    # Image up points away from the hand's front, so that the fingers enter the picture from its top.
    right = np.array([0.0, -1.0, 0.0])
    from simtoreal.envs import rotation

    wrist = rotation.from_matrix(np.stack([right, np.cross(back, right), back], axis=-1))
    return (
        CameraSpec(
            name="front", height=image_size, width=image_size, fov_y_deg=36.0, mount="world",
            position_m=FRONT_POSITION_M, quaternion_wxyz=look_at(FRONT_POSITION_M, FRONT_LOOKS_AT_M),
        ),
        CameraSpec(
            name="wrist", height=image_size, width=image_size, fov_y_deg=75.0, mount="hand",
            position_m=WRIST_POSITION_M, quaternion_wxyz=tuple(round(float(v), 9) for v in wrist),  # type: ignore[arg-type]
        ),
    )  # fmt: skip


def panda_embodiment(
    image_size: int = 64,
    *,
    cameras: tuple[str, ...] = ("front", "wrist"),
    render_profile: str = "fast",
) -> Embodiment:
    """The default embodiment: Panda at 20 Hz, ``ee_delta`` with 2 cm and 0.1 rad per step.

    Args:
        image_size: height and width of every camera in pixels.
        cameras: names of the cameras to use, of ``front`` and ``wrist``; empty for state observations.
        render_profile: ``fast`` or ``high``.

    Raises:
        ConfigError: unknown camera, one that is named twice, or images that cannot be drawn.
    """
    from simtoreal.envs.errors import ConfigError, closest

    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ConfigError(f"image size {image_size} is not possible; expected 1 to {MAX_IMAGE_SIZE} pixels")

    available = {camera.name: camera for camera in panda_cameras(image_size)}
    for name in cameras:
        if name not in available:
            raise ConfigError(f"unknown camera '{name}'. {closest(name, available)}")
    if len(set(cameras)) < len(cameras):
        raise ConfigError(f"cameras are {', '.join(cameras)}; name each once")
    return Embodiment(
        name="panda",
        control_hz=20.0,
        action=ActionSpec(
            mode="ee_delta",
            names=("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
            units=("m", "m", "m", "rad", "rad", "rad", "1"),
            limits=(0.02, 0.02, 0.02, 0.1, 0.1, 0.1, 1.0),
        ),
        proprio=ProprioSpec(names=PROPRIO_NAMES, units=PROPRIO_UNITS),
        cameras=tuple(available[name] for name in cameras),
        home_joint_positions_rad=HOME_RAD,
        workspace_low_m=(0.28, -0.32, 0.012),
        workspace_high_m=(0.72, 0.32, 0.45),
        gripper_max_opening_m=2 * FINGER_TRAVEL_M,
        render_profile=render_profile,
    )


def add_panda(spec: mujoco.MjSpec, embodiment: Embodiment) -> None:
    """Add the arm, its Cartesian impedance actuators, sensors and cameras to ``spec``, base at the origin.

    The six Cartesian actuators act on the TCP site relative to a reference site; the rotation reference is
    aligned with the gripper-down pose so that the axis-angle error stays away from its singularity at pi.
    Gains are those of an equilibrium-pose impedance controller (1500 N/m, 150 Nm/rad).
    """
    world = spec.worldbody
    world.add_site(name="base")
    world.add_site(name="gripper_down", quat=[0, 1, 0, 0])
    _decorate(world, "capsule", 0.075, (0, 0, 0.03, 0, 0, 0.13), _DARK)
    parent = world
    for index, link in enumerate(_LINKS):
        body = parent.add_body(
            name=f"link{index + 1}", pos=link.position, quat=link.quaternion, gravcomp=1,
            mass=link.mass, ipos=link.center, inertia=link.inertia, explicitinertial=True,
        )  # fmt: skip
        body.add_joint(
            name=ARM_JOINTS[index], axis=[0, 0, 1], range=[JOINT_LOW_RAD[index], JOINT_HIGH_RAD[index]],
            damping=[3.0, 0, 0], armature=0.1,
        )  # fmt: skip
        _decorate(body, "capsule", link.radius, link.capsule, _WHITE)
        parent = body
    hand = parent.add_body(
        name="hand", pos=[0, 0, 0.107], quat=[0.9238795, 0, 0, -0.3826834], gravcomp=1,
        mass=0.7, ipos=[0, 0, 0.03], inertia=[0.002, 0.002, 0.001], explicitinertial=True,
    )  # fmt: skip
    _add_hand(hand)
    for name, side, turn in (("left_finger", 1, [1, 0, 0, 0]), ("right_finger", -1, [0, 0, 0, 1])):
        finger = hand.add_body(
            name=name, pos=[0, 0, 0.0584], quat=turn, gravcomp=1,
            mass=0.1, ipos=[0, 0.01, 0.02], inertia=[1e-4, 1e-4, 1e-4], explicitinertial=True,
        )  # fmt: skip
        joint = FINGER_JOINT if side > 0 else "panda_finger_joint2"
        finger.add_joint(
            name=joint, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, 1, 0], range=[0, FINGER_TRAVEL_M],
            damping=[10.0, 0, 0], armature=0.01,
        )  # fmt: skip
        finger.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.011, 0.007, 0.0265], pos=[0, 0.007, 0.0265],
            contype=ROBOT_BIT, conaffinity=OBJECT_BIT, friction=[1.5, 0.02, 0.001], condim=4, rgba=_DARK, mass=0,
        )  # fmt: skip
    equality = spec.add_equality(name1=FINGER_JOINT, name2="panda_finger_joint2", type=mujoco.mjtEq.mjEQ_JOINT)
    equality.objtype = mujoco.mjtObj.mjOBJ_JOINT
    equality.data[:5] = [0, 1, 0, 0, 0]
    _add_actuators(spec)
    for camera in embodiment.cameras:
        mount = world if camera.mount == "world" else spec.body(camera.mount)
        mount.add_camera(name=camera.name, pos=camera.position_m, quat=camera.quaternion_wxyz, fovy=camera.fov_y_deg)


def _add_hand(hand: mujoco.MjsBody) -> None:
    box = mujoco.mjtGeom.mjGEOM_BOX
    hand.add_geom(
        type=box, size=[0.022, 0.1, 0.028], pos=[0, 0, 0.03], rgba=_WHITE, mass=0,
        contype=ROBOT_BIT, conaffinity=OBJECT_BIT,
    )  # fmt: skip
    hand.add_geom(type=box, size=[0.0225, 0.03, 0.012], pos=[0, 0, 0.02], rgba=_BLUE, mass=0, contype=0, conaffinity=0)
    hand.add_site(name="tcp", pos=[0, 0, 0.1034])


def _decorate(
    body: mujoco.MjsBody, shape: str, radius: float, fromto: tuple[float, ...], color: tuple[float, ...]
) -> None:
    """Add a shape that is drawn but neither collides nor weighs."""
    kinds = {"capsule": mujoco.mjtGeom.mjGEOM_CAPSULE, "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER}
    body.add_geom(type=kinds[shape], size=[radius, 0, 0], fromto=fromto, rgba=color, contype=0, conaffinity=0, mass=0)


def _add_actuators(spec: mujoco.MjSpec) -> None:
    for index, name in enumerate(ACTUATORS[:6]):
        gear = np.zeros(6)
        gear[index] = 1
        stiffness, damping = (1500.0, 120.0) if index < 3 else (150.0, 12.0)
        reference = "base" if index < 3 else "gripper_down"
        actuator = spec.add_actuator(
            name=name, target="tcp", refsite=reference, trntype=mujoco.mjtTrn.mjTRN_SITE, gear=gear
        )
        actuator.set_to_position(kp=stiffness, kv=damping)
        limit = 120.0 if index < 3 else 30.0
        actuator.forcerange, actuator.forcelimited = [-limit, limit], True
    null = spec.add_actuator(name="null", target=ARM_JOINTS[2], trntype=mujoco.mjtTrn.mjTRN_JOINT)
    null.set_to_position(kp=20.0, kv=5.0)
    gripper = spec.add_actuator(name="gripper", target=FINGER_JOINT, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    gripper.set_to_position(kp=800.0, kv=40.0)
    gripper.forcerange, gripper.forcelimited = [-40.0, 40.0], True


def pose_to_control(position: np.ndarray, quaternion: np.ndarray, opening: np.ndarray) -> np.ndarray:
    """Actuator commands ``(..., 8)`` that make the impedance controller pull the TCP to a pose.

    Args:
        position: ``(..., 3)`` metres, base frame.
        quaternion: ``(..., 4)`` wxyz, base frame.
        opening: ``(...)`` finger opening, 0 closed to 1 open.
    """
    from simtoreal.envs import rotation

    # Relative to gripper-down (0, 1, 0, 0): its conjugate times q, written out.
    w, x, y, z = np.moveaxis(quaternion, -1, 0)
    turn = rotation.to_rotation_vector(np.stack([x, -w, z, -y], axis=-1))
    result = np.zeros((*position.shape[:-1], len(ACTUATORS)))
    result[..., :3], result[..., 3:6], result[..., 7] = position, turn, opening * FINGER_TRAVEL_M
    return result
