"""Scene motion while a demonstration is given: MOVE (motion-based variability enhancement, arXiv 2512.04813).

Object, target and cameras move during an episode, so that one demonstration sweeps a continuum of relative
configurations instead of a single placement. Motion is kinematic: poses are overwritten between physics steps and
nothing is pushed. What differs from the released generator is said where it does.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.camera_motion import displace_camera, look_at_point
from simtoreal.envs.config import load_fields
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, closest
from simtoreal.envs.predicates import SceneView
from simtoreal.envs.scene import ObjectIndex
from simtoreal.envs.scene_layout import DRAWER_FRONT_M, DRAWER_HANDLE_HALF_M, DRAWER_HANDLE_X_M
from simtoreal.envs.task import ObjectSpec, TaskSpec

# Keeps the motion's random numbers apart from those of the initial condition, which stays the same with and without.
_STREAM = 0x4D4F5645
# A target begins to move when both fingers have held the object for this long.
HELD_S = 0.3
# Free space that a moving thing keeps to the other objects, and at which it stops before the gripper.
CLEARANCE_M = 0.02
MARGIN_M = 0.03
# Cameras keep this distance from the axis they turn about, and from the table.
NEAREST_M = 0.1
# Smallest and largest value of each field. Nobody follows what is faster (the arm itself does 0.4 m/s and 115 deg/s),
# and cameras have to see the table.
_BOUNDS: dict[str, tuple[float, float]] = {
    "object_speed_m_s": (0.0, 1.0), "object_turn_deg_s": (0.0, 180.0), "target_speed_m_s": (0.0, 1.0),
    "camera_turn_deg_s": (0.0, 180.0), "camera_slide_m_s": (0.0, 1.0),
    "object_moves_s": (0.0, 3600.0), "target_moves_s": (0.0, 3600.0),
    "camera_azimuth_deg": (-180.0, 180.0), "camera_distance_m": (-2.0, 2.0), "camera_height_m": (-2.0, 2.0),
    "turn_limit_deg": (0.0, 3600.0), "speed_beta": (0.01, 100.0),
}  # fmt: skip


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SceneMotion:
    """How a scene moves. Speeds are caps: an episode's speed is its speed factor u times the cap.

    Nothing moves before the arm is driven. The object stops ``MARGIN_M`` before the gripper, the target ``MARGIN_M``
    before the held object.

    Attributes:
        object_speed_m_s: cap of the manipulated object's velocity per axis, before it is first touched.
        object_turn_deg_s: cap of its rotation about z.
        target_speed_m_s: cap of the target's velocity per axis, once the object is held, or while it is pushed.
        camera_turn_deg_s: cap of the azimuth rate of cameras fixed to the world.
        camera_slide_m_s: cap of the rate of their distance and height.
        object_moves_s, target_moves_s: the object and the target move for at most this long per episode, counted from
            the first motion that is commanded.
        camera_azimuth_deg, camera_distance_m, camera_height_m: ranges around the nominal camera pose, in cylindrical
            coordinates about the point it looks at; the episode starts anywhere in them. Zero ranges leave the
            cameras alone.
        turn_limit_deg: the object turns back when it is this far from its initial yaw.
        speed_beta: parameters of the Beta distribution of u.
        correlated: one u and directions of any length for all channels, as released; otherwise every channel draws
            its own u and directions have length 1.

    Raises:
        ConfigError: a value is of another kind, or beyond what can be followed, or seen.
    """

    object_speed_m_s: float = 0.0
    object_turn_deg_s: float = 0.0
    target_speed_m_s: float = 0.0
    camera_turn_deg_s: float = 0.0
    camera_slide_m_s: float = 0.0
    object_moves_s: float = 8.0
    target_moves_s: float = 8.0
    camera_azimuth_deg: tuple[float, float] = (0.0, 0.0)
    camera_distance_m: tuple[float, float] = (0.0, 0.0)
    camera_height_m: tuple[float, float] = (0.0, 0.0)
    turn_limit_deg: float = 60.0
    speed_beta: tuple[float, float] = (2.0, 5.0)
    correlated: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.correlated, bool):
            raise ConfigError(f"scene motion 'correlated' is {self.correlated!r}; expected true or false")
        for name, (low, high) in _BOUNDS.items():
            value, two = getattr(self, name), isinstance(getattr(type(self), name), tuple)
            given = value if two and isinstance(value, tuple) else (value,)
            usable = len(given) == 1 + two and all(map(_is_real, given))
            # Written so that NaN, of which every comparison is false, is refused too.
            if not (usable and all(low <= number <= high for number in given)):
                what = "two numbers" if two else "a number"
                raise ConfigError(f"scene motion '{name}' is {value!r}; expected {what} from {low:g} to {high:g}")
            if two and name != "speed_beta" and value[0] > value[1]:
                raise ConfigError(f"scene motion '{name}' is {value}; expected (low, high), low <= high")

    @property
    def moves_objects(self) -> bool:
        """Whether anything but cameras moves."""
        return max(self.object_speed_m_s, self.object_turn_deg_s, self.target_speed_m_s) > 0

    @property
    def places_cameras(self) -> bool:
        """Whether camera poses differ between episodes or within one."""
        return any(low != 0 or high != 0 for low, high in self._camera_ranges)

    @property
    def active(self) -> bool:
        """Whether anything moves within an episode."""
        turning = self.camera_turn_deg_s > 0 and np.ptp(self.camera_azimuth_deg) > 0
        sliding = self.camera_slide_m_s > 0 and max(np.ptp(self.camera_distance_m), np.ptp(self.camera_height_m)) > 0
        return bool(self.moves_objects or turning or sliding)

    @property
    def _camera_ranges(self) -> tuple[tuple[float, float], ...]:
        return self.camera_azimuth_deg, self.camera_distance_m, self.camera_height_m

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-compatible dictionary."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


_VIEWS: dict[str, Any] = {
    "camera_azimuth_deg": (-30.0, 30.0), "camera_distance_m": (-0.1, 0.1), "camera_height_m": (-0.1, 0.1),
}  # fmt: skip
# At twice these speeds the expert lags behind at every turn, and policies learn less than from a scene at rest
# (benchmarks/move.py).
_OBJECTS: dict[str, Any] = {"object_speed_m_s": 0.3, "object_turn_deg_s": 20.0, "target_speed_m_s": 0.3}
_CAMERAS: dict[str, Any] = {"camera_turn_deg_s": 60.0, "camera_slide_m_s": 0.2}
# "views" is the static counterpart of "move_views": cameras anywhere in the same ranges, at rest.
SCENE_MOTIONS: dict[str, SceneMotion] = {
    "none": SceneMotion(),
    "move": SceneMotion(**_OBJECTS),
    "views": SceneMotion(**_VIEWS),
    "move_views": SceneMotion(**_OBJECTS, **_VIEWS, **_CAMERAS),
}


def load_motion(value: str | SceneMotion | Mapping[str, Any] | None) -> SceneMotion:
    """Return a scene motion by name, from a yaml file, or from its fields; None is ``none``.

    Raises:
        ConfigError: unknown name or field, an unreadable file, or a value that :class:`SceneMotion` refuses.
    """
    if isinstance(value, SceneMotion):
        return value
    if isinstance(value, Mapping):
        known = {field.name for field in dataclasses.fields(SceneMotion)}
        for key in value:
            if key not in known:
                raise ConfigError(f"scene motion has no '{key}'. {closest(str(key), known)}")
        return SceneMotion(**{key: tuple(v) if isinstance(v, list) else v for key, v in value.items()})
    name = value or "none"
    if name.endswith((".yaml", ".yml")):
        fields = load_fields(SceneMotion, Path(name))
        try:
            return SceneMotion(**fields)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    if name not in SCENE_MOTIONS:
        raise ConfigError(f"unknown scene motion '{name}'. {closest(name, SCENE_MOTIONS)}")
    return SCENE_MOTIONS[name]


@dataclass
class PlanarMotion:
    """New poses that a :class:`SceneMover` asks for: rows of the named object.

    Attributes:
        name: object.
        rows: simulations ``(K,)`` in which it moves.
        positions: ``(K, 2)`` metres, base frame.
        yaws: ``(K,)`` change of the yaw in radians.
    """

    name: str
    rows: np.ndarray
    positions: np.ndarray
    yaws: np.ndarray


class SceneMover:
    """Moves the scenes of N simulations.

    Args:
        motion: how.
        task: what; ``task.moving_object`` and ``task.moving_target`` name the things.
        embodiment: gives the world cameras.
        count: number of simulations.

    Raises:
        ConfigError: objects should move but the task marks none, or only cameras should and none is fixed to the world.
    """

    def __init__(self, motion: SceneMotion, task: TaskSpec, embodiment: Embodiment, count: int) -> None:
        self.motion, self.task = motion, task
        self.cameras = [camera for camera in embodiment.cameras if camera.mount == "world"]
        self.moving = [task.object(name) for name in (task.moving_object, task.moving_target) if name]
        if motion.moves_objects and not self.moving:
            raise ConfigError(
                f"task '{task.name}' marks nothing that may move. Add 'moving: {{object: NAME, target: NAME}}' to "
                f"{task.source or 'its yaml file'}, or collect it without scene motion."
            )
        if not motion.moves_objects and not self.cameras:
            given = ", ".join(camera.name for camera in embodiment.cameras) or "none"
            raise ConfigError(
                f"the scene motion moves cameras that are fixed to the world, and there is none (cameras: {given}). "
                "Use one, such as 'front', a motion that moves objects, or 'none'."
            )
        for camera in self.cameras:
            position = np.array(camera.position_m)
            arm = position - look_at_point(position, rotation.to_matrix(np.array(camera.quaternion_wxyz)))
            nearest = float(np.hypot(*arm[:2])) + motion.camera_distance_m[0]
            if motion.places_cameras and (nearest < NEAREST_M or position[2] + motion.camera_height_m[0] < NEAREST_M):
                raise ConfigError(
                    f"scene motion: camera_distance_m {motion.camera_distance_m} and camera_height_m "
                    f"{motion.camera_height_m} bring camera '{camera.name}' within {NEAREST_M} m of the axis or the "
                    f"table; it is {np.hypot(*arm[:2]):.2f} m from the axis and {position[2]:.2f} m high"
                )
        self.factors = np.zeros((count, 3))
        self.directions = np.zeros((count, 2, 2))
        self.turn_signs = np.ones(count)
        self.turned = np.zeros(count)
        self.velocities = np.zeros((count, 2, 2))
        self.turn_rates = np.zeros(count)
        self.moved_s = np.zeros((count, 2))
        self.touched = np.zeros(count, dtype=bool)
        self.held_s = np.zeros(count)
        self.camera_signs = np.ones((count, 3))
        self.camera_offsets = np.zeros((count, 3))
        # Of the latest pictures, like the poses: the cameras have moved on when the step that they led to is logged.
        self.drawn_offsets = np.zeros((count, 3))
        self.camera_positions = np.zeros((count, len(self.cameras), 3))
        self.camera_quaternions = np.zeros((count, len(self.cameras), 4))

    def begin(self, slot: int, seed: int) -> None:
        """Draw the motion of a new episode; it depends on the episode's seed only."""
        rng = np.random.default_rng([_STREAM, seed])
        factors = rng.beta(*self.motion.speed_beta, size=3)
        self.factors[slot] = factors[0] if self.motion.correlated else factors
        directions = rng.uniform(-1.0, 1.0, (2, 2))
        if not self.motion.correlated:
            directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        self.directions[slot] = directions
        self.turn_signs[slot] = rng.choice((-1.0, 1.0))
        self.camera_signs[slot] = rng.choice((-1.0, 1.0), size=3)
        low, high = np.transpose(self.motion._camera_ranges)
        self.camera_offsets[slot] = self.drawn_offsets[slot] = rng.uniform(low, high)
        self.turned[slot] = self.turn_rates[slot] = 0.0
        self.velocities[slot], self.moved_s[slot], self.touched[slot], self.held_s[slot] = 0.0, 0.0, False, 0.0

    def advance(self, scene: SceneView, rows: np.ndarray, period_s: float) -> list[PlanarMotion]:
        """Move by ``period_s`` in the simulations ``rows`` and return what to overwrite."""
        self.velocities[rows], self.turn_rates[rows] = 0.0, 0.0
        self._move_cameras(rows, period_s)
        if not self.motion.moves_objects:
            return []
        touching = scene.touches[self.moving[0].name]
        self.touched[rows] |= touching.any(axis=-1)[rows]
        # One finger may brush by, and closing takes a moment in which nobody looks at the target yet.
        self.held_s[rows] = np.where(touching.all(axis=-1), self.held_s + period_s, 0.0)[rows]
        moved = [self._move_object(scene, rows[~self.touched[rows]], period_s)]
        if len(self.moving) > 1:
            moved.append(self._move_target(scene, rows[self.held_s[rows] > HELD_S], period_s))
        return [motion for motion in moved if len(motion.rows)]

    def _move_object(self, scene: SceneView, rows: np.ndarray, period_s: float) -> PlanarMotion:
        item, motion = self.moving[0], self.motion
        gap = free_gap(scene.positions["tcp"], 0.0, 0.0, scene.positions[item.name], item)
        rows = rows[(self.moved_s[rows, 0] < motion.object_moves_s) & (gap[rows] > MARGIN_M)]
        positions = self._bounce(scene, rows, 0, motion.object_speed_m_s * self.factors[rows, 0], period_s)
        yaws = self.turn_signs[rows] * np.deg2rad(motion.object_turn_deg_s) * self.factors[rows, 0] * period_s
        self.turned[rows] += yaws
        beyond = np.abs(self.turned[rows]) > np.deg2rad(motion.turn_limit_deg)
        self.turn_signs[rows[beyond]] = -np.sign(self.turned[rows[beyond]])
        self.turn_rates[rows] = yaws / period_s
        return PlanarMotion(item.name, rows, positions, yaws)

    def _move_target(self, scene: SceneView, rows: np.ndarray, period_s: float) -> PlanarMotion:
        (held, item), motion = self.moving, self.motion
        centre = scene.positions[held.name]
        gap = free_gap(centre, held.outer_radius_m, held.half_height_m, scene.positions[item.name], item)
        rows = rows[(self.moved_s[rows, 1] < motion.target_moves_s) & (gap[rows] > MARGIN_M)]
        positions = self._bounce(scene, rows, 1, motion.target_speed_m_s * self.factors[rows, 1], period_s)
        return PlanarMotion(item.name, rows, positions, np.zeros(len(rows)))

    def _bounce(self, scene: SceneView, rows: np.ndarray, which: int, speed: np.ndarray, period_s: float) -> np.ndarray:
        """Billiard motion in the box of the initial placements (card: d_a <- -d_a at a wall, position clipped)."""
        item = self.moving[which]
        spec = self.task.initial[item.name]
        low, high = np.array([spec.x_m[0], spec.y_m[0]]), np.array([spec.x_m[1], spec.y_m[1]])
        before = scene.positions[item.name][rows, :2]
        # What was knocked out of its box finds back at its own speed, if it goes that way, and not in one jump.
        low, high = np.minimum(low, before), np.maximum(high, before)
        proposed = before + (speed * period_s)[:, None] * self.directions[rows, which]
        outside = (proposed < low) | (proposed > high)
        self.directions[rows, which] *= np.where(outside, -1.0, 1.0)
        proposed = np.clip(proposed, low, high)
        for other in self.task.objects:
            if other.name == item.name or (which == 1 and other.name == self.moving[0].name):
                continue
            # Not in the released generator, which has nothing to run into: turn back before another object.
            middle, radius = footprint(scene, other)
            apart = item.outer_radius_m + radius[rows] + CLEARANCE_M
            near = np.linalg.norm(proposed - middle[rows], axis=-1)
            was = np.linalg.norm(before - middle[rows], axis=-1)
            blocked = (near < apart) & (near < was)
            self.directions[rows[blocked], which] *= -1.0
            proposed[blocked] = before[blocked]
        self.velocities[rows, which] = (proposed - before) / period_s
        self.moved_s[rows, which] += period_s
        return proposed

    def _move_cameras(self, rows: np.ndarray, period_s: float) -> None:
        motion = self.motion
        if not motion.places_cameras or not self.cameras:
            return
        caps = np.array([motion.camera_turn_deg_s, motion.camera_slide_m_s, motion.camera_slide_m_s])
        low, high = np.transpose(motion._camera_ranges)
        offsets = self.camera_offsets[rows] + self.camera_signs[rows] * self.factors[rows, 2, None] * caps * period_s
        self.camera_signs[rows] *= np.where((offsets < low) | (offsets > high), -1.0, 1.0)
        self.camera_offsets[rows] = np.clip(offsets, low, high)

    def displace_cameras(
        self, fields: Mapping[str, np.ndarray], camera_ids: Mapping[str, int], slots: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return camera poses with those of the world cameras displaced, for drawing.

        Args:
            fields: live ``cam_xpos`` ``(N, C, 3)`` and ``cam_xmat`` ``(N, C, 9)`` of the batch, left alone.
            camera_ids: camera name -> index in these arrays.
            slots: simulations to draw.
        """
        if not self.motion.places_cameras or not self.cameras:
            return {}
        self.drawn_offsets[slots] = self.camera_offsets[slots]
        positions, matrices = fields["cam_xpos"].copy(), fields["cam_xmat"].copy()
        for camera in self.cameras:
            index = camera_ids[camera.name]
            for slot in slots:
                pose = displace_camera(
                    positions[slot, index], matrices[slot, index].reshape(3, 3), self.camera_offsets[slot]
                )
                positions[slot, index], matrices[slot, index] = pose[0], pose[1].ravel()
                self.camera_positions[slot, self.cameras.index(camera)] = pose[0]
                self.camera_quaternions[slot, self.cameras.index(camera)] = rotation.from_matrix(pose[1])
        return {"cam_xpos": positions, "cam_xmat": matrices}

    def log(self) -> dict[str, np.ndarray]:
        """Parameters and speeds of the last step by name, each ``(N,)`` float64; see ``info["scene_motion"]``.

        Offsets and poses of cameras are those of the pictures before the step, which its action answered; without
        pictures the offsets are those at the beginning of the episode. Without cameras in the world there are none.
        """
        names = ("object", "target", "camera") if self.cameras else ("object", "target")
        entries = {f"speed_factor_{name}": self.factors[:, index].copy() for index, name in enumerate(names)}
        for which, item in enumerate(self.moving):
            for axis, letter in enumerate("xy"):
                entries[f"{item.name}_v{letter}_m_s"] = self.velocities[:, which, axis].copy()
        if self.moving:
            entries[f"{self.moving[0].name}_turn_rad_s"] = self.turn_rates.copy()
        for index, name in enumerate(("azimuth_deg", "distance_m", "height_m") if self.cameras else ()):
            entries[f"camera_{name}"] = self.drawn_offsets[:, index].copy()
        for index, camera in enumerate(self.cameras if self.motion.places_cameras else ()):
            for axis, letter in enumerate("xyz"):
                entries[f"{camera.name}_{letter}_m"] = self.camera_positions[:, index, axis].copy()
            for axis, letter in enumerate("wxyz"):
                entries[f"{camera.name}_q{letter}"] = self.camera_quaternions[:, index, axis].copy()
        return entries


def put_planar(fields: Mapping[str, np.ndarray], where: ObjectIndex, moved: PlanarMotion) -> None:
    """Overwrite the pose of an object in the live arrays of a batch; a free body comes to rest there."""
    turn = np.zeros((len(moved.rows), 4))
    turn[:, 0], turn[:, 3] = np.cos(moved.yaws / 2), np.sin(moved.yaws / 2)
    if where.mocap >= 0:
        fields["mocap_pos"][moved.rows, where.mocap, :2] = moved.positions
        before = fields["mocap_quat"][moved.rows, where.mocap]
        fields["mocap_quat"][moved.rows, where.mocap] = rotation.quaternion_multiply(turn, before)
        return
    qpos, qvel = fields["qpos"], fields["qvel"]
    qpos[moved.rows, where.qpos : where.qpos + 2] = moved.positions
    orientation = slice(where.qpos + 3, where.qpos + 7)
    qpos[moved.rows, orientation] = rotation.quaternion_multiply(turn, qpos[moved.rows, orientation])
    qvel[moved.rows, where.qvel : where.qvel + 6] = 0.0


def footprint(scene: SceneView, item: ObjectSpec) -> tuple[np.ndarray, np.ndarray]:
    """Middle ``(N, 2)`` and radius ``(N,)`` (m, base frame) of the circle on the table that holds all of an object."""
    middle = scene.positions[item.name][:, :2]
    if not item.articulated:
        return middle, np.full(len(middle), item.outer_radius_m)
    # The origin of a drawer is the middle of its front, out of which comes the tray with the handle.
    depth, width, _ = item.size_m
    ahead = rotation.to_matrix(scene.quaternions[item.name])[:, :2, 0]
    front = depth + scene.openings[item.name]
    tray = np.hypot(front + DRAWER_FRONT_M, width)
    handle = np.hypot(front - DRAWER_HANDLE_X_M + DRAWER_HANDLE_HALF_M[0], DRAWER_HANDLE_HALF_M[1])
    return middle + depth * ahead, np.maximum(tray, handle)


def free_gap(
    point: np.ndarray, half_width_m: float, half_height_m: float, position: np.ndarray, item: ObjectSpec
) -> np.ndarray:
    """Free distance ``(N,)`` between a cylinder around ``point`` and an object: the larger of across and up.

    A point in the air cannot be touched: it is infinitely far, and may move on until it is reached.
    """
    across = np.linalg.norm((point - position)[:, :2], axis=-1) - half_width_m - item.outer_radius_m
    up = point[:, 2] - half_height_m - (position[:, 2] + item.top_m)
    return np.full(len(across), np.inf) if item.shape == "point" else np.maximum(across, up)
