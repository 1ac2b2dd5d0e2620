"""Physics violations of imagined videos: objects that vanish, appear twice, or move although nothing touches them.

Evidence is in the picture. The pixels of an object are those of its colour: which colours that are is learned from
real first frames, as those that are frequent where the object is and rare elsewhere. Only objects and cameras are
judged in which this works on real videos, and only cameras that stand still.

Every rule has a limit that real videos of the same data keep, and the rate at which held-out real videos violate the
rule is reported beside that of imagined ones: it is the rate of false alarms.

``vanishes``    for PERSISTENCE frames its pixels are fewer than half of what real videos ever fall to, and the gripper
                is not in front of it
``duplicates``  for PERSISTENCE frames there is a second, separate spot of its colour that is at least half as large as
                the object was at first
``moves``       within WINDOW frames its spot and the position that the probe sees both move, though the gripper was
                nowhere near, neither in the window nor shortly before
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simtoreal.envs import rotation
from simtoreal.envs.embodiment import CameraSpec
from simtoreal.envs.task import TaskSpec
from simtoreal.world_models.clips import Clips
from simtoreal.world_models.pixel_weights import LEVELS
from simtoreal.world_models.positions import TCP, Positions

PERSISTENCE, WINDOW, BEFORE = 5, 10, 10
# A colour belongs to an object if it is this many times as frequent on it as elsewhere, and no rarer on it than RAREST.
CONTRAST, RAREST, ELSEWHERE = 8.0, 0.01, 2e-4
# What is on the object and what is not, in multiples of its half extent.
INSIDE, OUTSIDE = 0.7, 2.0
SMALLEST_AREA_PX = 4.0
# The gripper may hide an object that it is closer to in the picture (per 64 pixels of width).
HIDING_PX = 14.0
# Share of real first frames in which the object must be seen for a camera to be used.
SEEN_SHARE = 0.9
# What counts as moving, beyond what the probe's noise explains, and as touching.
MOVED_M, MOVED_PX, TOUCH_M = 0.02, 2.0, 0.09


@dataclass(frozen=True, kw_only=True)
class ObjectEvidence:
    """How an object is recognised in the pictures of one camera.

    Attributes:
        name: of the object.
        column: in :class:`~simtoreal.world_models.positions.Positions`.
        view, camera: number and description of the camera.
        colours: ``(LEVELS^3,)`` bool: cells of colour space that are the object's.
        least_share: share of its first area that stays visible in real videos, unless the gripper is in front of it.
        reach_m: distance to the gripper below which it may be touched.
    """

    name: str
    column: int
    view: int
    camera: CameraSpec
    colours: np.ndarray
    least_share: float
    reach_m: float


def _cells(images: np.ndarray) -> np.ndarray:
    levels = images // (256 // LEVELS)
    return (levels[..., 0].astype(np.int64) * LEVELS + levels[..., 1]) * LEVELS + levels[..., 2]


def _spots(evidence: ObjectEvidence, images: np.ndarray) -> np.ndarray:
    """``(M, H, W)`` bool: pixels of the object's colour in pictures ``(M, H, W, 3)``."""
    return evidence.colours[_cells(images)]


def learn_evidence(
    real: Clips, positions: Positions, cameras: Sequence[CameraSpec]
) -> tuple[list[ObjectEvidence], list[str]]:
    """Learn from real videos how to recognise the objects.

    Args:
        real: real videos.
        positions: truth of all data.
        cameras: of the embodiment; those that stand still and whose field of view is known are used.

    Returns:
        What can be judged, at most one camera per object, and why objects are left out.
    """
    found: list[ObjectEvidence] = []
    notes: list[str] = []
    if positions.task is None or positions.names[:1] != (TCP,):
        return found, ["without the positions of gripper and objects no physics is judged"]
    for column, name in enumerate(positions.names[1:], start=1):
        candidates = [
            _learn(real, positions, positions.task, column, cameras, view)
            for view, camera in enumerate(cameras)
            if camera.mount == "world" and camera.fov_y_deg > 0
        ]
        good = [one for one in candidates if one is not None]
        if good:
            found.append(good[0])
        else:
            notes.append(f"{name} cannot be told from the rest of the picture by its colour: its physics is not judged")
    return found, notes


def project(camera: CameraSpec, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (row, column) ``(N, 2)`` and pixels per metre ``(N,)`` of points ``(N, 3)`` in the base frame.

    Raises:
        ConfigError: the camera's field of view is not known.
    """
    focal, _, centre_x, centre_y = camera.intrinsics
    axes = rotation.to_matrix(np.asarray(camera.quaternion_wxyz))
    local = (points - np.asarray(camera.position_m)) @ axes
    # It looks along its -z, and +y is up.
    depth = np.maximum(-local[:, 2], 1e-6)
    pixels = np.stack([centre_y - focal * local[:, 1] / depth, centre_x + focal * local[:, 0] / depth], 1)
    return pixels - 0.5, focal / depth


def _learn(
    real: Clips, positions: Positions, task: TaskSpec, column: int, cameras: Sequence[CameraSpec], view: int
) -> ObjectEvidence | None:
    first, item = real.images[real.starts, view], task.object(positions.names[column])
    height, width = first.shape[1:3]
    centre, scale = project(cameras[view], positions.values[real.frames[real.starts], column].astype(np.float64))
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - centre[:, 0, None, None], columns - centre[:, 1, None, None])
    radius = (item.half_extent_m * scale)[:, None, None]
    near, far = distance < np.maximum(INSIDE * radius, 1.0), distance > np.maximum(OUTSIDE * radius, 3.0)
    seen = near.any((1, 2))
    if seen.mean() < SEEN_SHARE:
        return None
    cells = _cells(first)
    inside = np.bincount(cells[near], minlength=LEVELS**3) / near.sum()
    outside = np.bincount(cells[far], minlength=LEVELS**3) / far.sum()
    colours = (inside > RAREST) & (inside > CONTRAST * outside)
    # Imagined shades are a little off; neighbouring colours are the object's as well, unless something else has them.
    colours |= _neighbours(colours) & (outside < ELSEWHERE)
    evidence = ObjectEvidence(
        name=item.name, column=column, view=view, camera=cameras[view], colours=colours, least_share=0.0,
        reach_m=TOUCH_M + float(np.hypot(item.half_extent_m, item.half_extent_m)),
    )  # fmt: skip
    spots = _spots(evidence, real.images[:, view])
    area = spots.sum((1, 2)).astype(np.float64)
    if np.quantile(area[real.starts], 1 - SEEN_SHARE) < SMALLEST_AREA_PX:
        return None
    shares = [
        _visible_share(spots[a:b], _gripper_pixels(evidence, positions.values[real.frames[a:b], 0]))
        for a, b in zip(real.starts, real.ends, strict=True)
    ]
    return dataclasses.replace(evidence, least_share=float(np.quantile(list(map(_persistent_least, shares)), 0.02)))


def _gripper_pixels(evidence: ObjectEvidence, gripper: np.ndarray) -> np.ndarray:
    """Pixels ``(T, 2)`` of the end effector at positions ``(T, 3)``."""
    return project(evidence.camera, gripper.astype(np.float64))[0]


def _visible_share(spots: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """Area of the spots ``(T, H, W)`` relative to the first frame; 1 where the gripper may hide the object.

    That is where it is, in the picture, close to where the object was last seen.
    """
    area = spots.sum((1, 2)).astype(np.float64)
    initial = max(area[0], SMALLEST_AREA_PX)
    limit = HIDING_PX * spots.shape[2] / 64
    share, last = np.ones(len(spots)), None
    for step, spot in enumerate(spots):
        if area[step] >= 0.5 * initial:
            last = np.argwhere(spot).mean(0)
        if last is not None and np.linalg.norm(gripper[step] - last) > limit:
            share[step] = area[step] / initial
    return share


def _neighbours(colours: np.ndarray) -> np.ndarray:
    """``(LEVELS^3,)`` bool: cells that touch one of ``colours`` in colour space."""
    padded = np.pad(colours.reshape((LEVELS,) * 3), 1)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3)).any((3, 4, 5)).ravel()


def _persistent_least(share: np.ndarray) -> float:
    """Least value that a series does not exceed for PERSISTENCE frames in a row."""
    if len(share) < PERSISTENCE:
        return float(share.max())
    return float(np.lib.stride_tricks.sliding_window_view(share, PERSISTENCE).max(-1).min())


def _persists(flags: np.ndarray) -> bool:
    if len(flags) < PERSISTENCE:
        return False
    return bool(np.lib.stride_tricks.sliding_window_view(flags, PERSISTENCE).all(-1).any())


def find_violations(
    clips: Clips, evidence: list[ObjectEvidence], seen: np.ndarray, probe_error_m: np.ndarray
) -> dict[str, np.ndarray]:
    """Return rule -> ``(E, objects)`` bool.

    Args:
        clips: videos.
        evidence: of the objects.
        seen: ``(M, K, 3)`` positions that the probe sees.
        probe_error_m: ``(K,)`` its median error on real frames.
    """
    shape = (len(clips.episodes), len(evidence))
    found = {rule: np.zeros(shape, bool) for rule in ("vanishes", "duplicates", "moves")}
    for index, one in enumerate(evidence):
        spots = _spots(one, clips.images[:, one.view])
        area = spots.sum((1, 2)).astype(np.float64)
        for row, (start, end) in enumerate(zip(clips.starts, clips.ends, strict=True)):
            initial = max(area[start], SMALLEST_AREA_PX)
            share = _visible_share(spots[start:end], _gripper_pixels(one, seen[start:end, 0]))
            found["vanishes"][row, index] = _persists(share < 0.5 * one.least_share)
            second = np.array([_second_spot(spot) for spot in spots[start:end]])
            found["duplicates"][row, index] = _persists(second >= max(0.5 * initial, SMALLEST_AREA_PX))
            found["moves"][row, index] = _moves_untouched(
                spots[start:end], seen[start:end], one, float(probe_error_m[one.column])
            )
    return found


def _second_spot(spot: np.ndarray) -> int:
    """Area of the second largest connected spot."""
    import cv2

    count, _, statistics, _ = cv2.connectedComponentsWithStats(spot.astype(np.uint8), connectivity=8)
    areas = np.sort(statistics[1:count, cv2.CC_STAT_AREA])
    return int(areas[-2]) if len(areas) > 1 else 0


def _moves_untouched(spots: np.ndarray, seen: np.ndarray, evidence: ObjectEvidence, error_m: float) -> bool:
    if len(spots) <= WINDOW:
        return False
    smooth = _median_filter(seen)
    place, gripper = smooth[:, evidence.column], smooth[:, 0]
    near = np.linalg.norm(place - gripper, axis=-1) < evidence.reach_m
    area = spots.sum((1, 2))
    rows, columns = np.mgrid[: spots.shape[1], : spots.shape[2]]
    with np.errstate(invalid="ignore"):
        centre = np.stack([(spots * rows).sum((1, 2)), (spots * columns).sum((1, 2))], 1) / area[:, None]
    centre = _median_filter(np.where(area[:, None] >= SMALLEST_AREA_PX, centre, np.nan))
    limit = max(MOVED_M, 4 * error_m)
    limit_px = MOVED_PX * spots.shape[2] / 64
    for step in range(len(spots) - WINDOW):
        touched = near[max(0, step - BEFORE) : step + WINDOW + 1].any()
        moved = np.linalg.norm(place[step + WINDOW] - place[step]) > limit
        shifted = np.linalg.norm(centre[step + WINDOW] - centre[step]) > limit_px
        if moved and shifted and not touched:
            return True
    return False


def _median_filter(values: np.ndarray) -> np.ndarray:
    """Running median over PERSISTENCE frames along the first axis."""
    half = PERSISTENCE // 2
    padded = np.concatenate([values[:1].repeat(half, 0), values, values[-1:].repeat(half, 0)])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, PERSISTENCE, axis=0), axis=-1)
