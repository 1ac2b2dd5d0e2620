"""Domain randomisation and the reality gap of the twin: one description of how a world may differ."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import numpy as np

from simtoreal.envs.errors import ConfigError, closest

Range = tuple[float, float]

# Commands that the simulation keeps; those that are older have taken effect.
MAX_LATENCY_STEPS = 4
# Smallest and largest value of each field: what a simulation can still compute, and cameras still see.
_SCALE = (0.01, 100.0)
_BOUNDS: dict[str, tuple[float, float]] = {
    "mass_scale": _SCALE, "friction_scale": _SCALE, "gain_scale": _SCALE,
    "latency_steps": (0, MAX_LATENCY_STEPS), "camera_offset_m": (0.0, 1.0), "camera_tilt_deg": (0.0, 90.0),
    "camera_fov_deg": (-30.0, 30.0), "light_scale": (0.0, 10.0), "light_offset_m": (0.0, 10.0),
    "color_jitter": (0.0, 1.0), "image_noise": (0.0, 255.0), "joint_noise_rad": (0.0, 1.0),
    "start_anywhere": (0.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Randomization:
    """Ranges from which a :class:`Variation` is drawn uniformly at every reset.

    Attributes:
        mass_scale: of free objects.
        friction_scale: of every contact.
        gain_scale: stiffness of the arm's Cartesian actuators.
        latency_steps: control steps between a command and its effect, inclusive.
        camera_offset_m, camera_tilt_deg: magnitude of a displacement and rotation in a random direction.
        camera_fov_deg: change of the vertical field of view.
        light_scale: brightness of the lamp and of the ambient light.
        light_offset_m: magnitude of the lamp's displacement.
        color_jitter: largest change of an object's colour channels.
        table_looks: whether the table's texture changes.
        image_noise: standard deviation of pixel noise, of 255.
        joint_noise_rad: standard deviation of noise on measured joint positions.
        start_anywhere: probability that the arm starts anywhere above the table, with open or closed gripper,
            instead of at home. Demonstrations from there teach a policy what to do after a failed grasp.

    Raises:
        ConfigError: a value is no number, or is beyond what can be simulated.
    """

    mass_scale: Range = (1.0, 1.0)
    friction_scale: Range = (1.0, 1.0)
    gain_scale: Range = (1.0, 1.0)
    latency_steps: tuple[int, int] = (0, 0)
    camera_offset_m: Range = (0.0, 0.0)
    camera_tilt_deg: Range = (0.0, 0.0)
    camera_fov_deg: Range = (0.0, 0.0)
    light_scale: Range = (1.0, 1.0)
    light_offset_m: Range = (0.0, 0.0)
    color_jitter: float = 0.0
    table_looks: bool = False
    image_noise: float = 0.0
    joint_noise_rad: float = 0.0
    start_anywhere: float = 0.0

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value, is_range = getattr(self, name), isinstance(getattr(type(self), name), tuple)
            ends = value if is_range else (value, value)
            kind = numbers.Integral if name == "latency_steps" else numbers.Real
            usable = isinstance(ends, tuple | list) and len(ends) == 2 and all(isinstance(end, kind) for end in ends)
            # Written so that NaN, of which every comparison is false, is refused too.
            if not (usable and low <= ends[0] <= ends[1] <= high):
                noun = "whole number" if kind is numbers.Integral else "number"
                what = f"(low, high) with low <= high, two {noun}s" if is_range else f"a {noun}"
                raise ConfigError(f"randomization '{name}' is {value!r}; expected {what} from {low:g} to {high:g}")


# Horizontal region of arm starts; its height begins above the tallest object.
START_LOW_M, START_HIGH_M = (0.36, -0.2), (0.6, 0.2)
START_HEIGHT_M = (0.03, 0.22)

# "standard" and "hard" are the reality gaps of the twin; "training" covers them for training.
RANDOMIZATIONS: dict[str, Randomization] = {
    "none": Randomization(),
    "standard": Randomization(
        mass_scale=(0.7, 1.3), friction_scale=(0.7, 0.7), gain_scale=(0.85, 0.85), latency_steps=(1, 2),
        camera_offset_m=(0.01, 0.02), camera_tilt_deg=(2.0, 2.0), light_scale=(0.8, 1.2), light_offset_m=(0.0, 0.3),
        color_jitter=0.04, image_noise=3.0, joint_noise_rad=0.002,
    ),
    "hard": Randomization(
        mass_scale=(0.5, 2.0), friction_scale=(0.5, 0.7), gain_scale=(0.7, 0.8), latency_steps=(2, 3),
        camera_offset_m=(0.02, 0.04), camera_tilt_deg=(3.0, 5.0), camera_fov_deg=(-2.0, 2.0), light_scale=(0.5, 1.5),
        light_offset_m=(0.2, 0.8), color_jitter=0.1, table_looks=True, image_noise=6.0, joint_noise_rad=0.004,
    ),
    "training": Randomization(
        mass_scale=(0.7, 1.4), friction_scale=(0.6, 1.1), gain_scale=(0.8, 1.1), latency_steps=(0, 2),
        camera_offset_m=(0.0, 0.025), camera_tilt_deg=(0.0, 2.5), camera_fov_deg=(-1.0, 1.0), light_scale=(0.7, 1.3),
        light_offset_m=(0.0, 0.5), color_jitter=0.06, image_noise=3.0, joint_noise_rad=0.002, start_anywhere=0.5,
    ),
}  # fmt: skip


def load_randomization(value: str | Randomization | None) -> Randomization:
    """Return a randomisation by name; None is ``none``.

    Raises:
        ConfigError: unknown name.
    """
    if isinstance(value, Randomization):
        return value
    name = value or "none"
    if name not in RANDOMIZATIONS:
        raise ConfigError(f"unknown randomization '{name}'. {closest(name, RANDOMIZATIONS)}")
    return RANDOMIZATIONS[name]


@dataclass(frozen=True, kw_only=True)
class Variation:
    """One drawn world: concrete values for every range of a :class:`Randomization`.

    Attributes:
        camera_offsets_m: ``(cameras, 3)``.
        camera_rotations_rad: ``(cameras, 3)`` rotation vectors in the camera's mount.
        light_offset_m: ``(3,)``.
        color_offsets: ``(objects, 3)``.
        table_look: index of the table's texture.
        start_m: position ``(3,)`` where the arm starts, its height above the tallest object; None for home.
        start_closed: whether the gripper is closed there.
    """

    mass_scale: float
    friction_scale: float
    gain_scale: float
    latency_steps: int
    camera_offsets_m: np.ndarray
    camera_rotations_rad: np.ndarray
    camera_fov_deg: float
    light_scale: float
    light_offset_m: np.ndarray
    color_offsets: np.ndarray
    table_look: int
    image_noise: float
    joint_noise_rad: float
    start_m: np.ndarray | None
    start_closed: bool


def sample_variation(
    randomization: Randomization, rng: np.random.Generator, *, cameras: int, objects: int, table_looks: int
) -> Variation:
    """Draw a :class:`Variation`.

    Args:
        randomization: the ranges.
        rng: random generator.
        cameras, objects, table_looks: how many of each the scene has.
    """
    r = randomization

    def direction(count: int) -> np.ndarray:
        vectors = rng.normal(size=(count, 3))
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    start = rng.uniform((*START_LOW_M, START_HEIGHT_M[0]), (*START_HIGH_M, START_HEIGHT_M[1]))
    start_closed, start_here = rng.random() < 0.5, rng.random() < r.start_anywhere
    return Variation(
        mass_scale=rng.uniform(*r.mass_scale),
        friction_scale=rng.uniform(*r.friction_scale),
        gain_scale=rng.uniform(*r.gain_scale),
        latency_steps=int(rng.integers(r.latency_steps[0], r.latency_steps[1] + 1)),
        camera_offsets_m=direction(cameras) * rng.uniform(*r.camera_offset_m, size=(cameras, 1)),
        camera_rotations_rad=direction(cameras) * np.deg2rad(rng.uniform(*r.camera_tilt_deg, size=(cameras, 1))),
        camera_fov_deg=rng.uniform(*r.camera_fov_deg),
        light_scale=rng.uniform(*r.light_scale),
        light_offset_m=direction(1)[0] * rng.uniform(*r.light_offset_m),
        color_offsets=rng.uniform(-r.color_jitter, r.color_jitter, size=(objects, 3)),
        table_look=int(rng.integers(table_looks)) if r.table_looks else 0,
        image_noise=r.image_noise,
        joint_noise_rad=r.joint_noise_rad,
        start_m=start if start_here else None,
        start_closed=bool(start_closed),
    )
