"""Physics violations of imagined videos: objects that vanish, appear twice, or move although nothing touches them.

Evidence is in the picture. The pixels of an object are those of its colour: which colours that are is learned from
real first frames, as those that are frequent around where the object is and rare elsewhere. Where it is in a picture is
learned too, by a linear map from position to pixel for cameras that stand still. Only objects and cameras are judged in
which this works on real videos.

Every rule has a limit that real videos of the same data keep, and the rate at which held-out real videos violate the
rule is reported beside that of imagined ones: it is the rate of false alarms.

``vanishes``    for PERSISTENCE frames its pixels are fewer than half of what real videos ever fall to
``duplicates``  for PERSISTENCE frames there is a second, separate spot of its colour that is at least half as large as
                the object was at first
``moves``       within WINDOW frames its spot and the position that the probe sees both move, though the gripper was
                nowhere near, neither in the window nor shortly before
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simtoreal.envs.task import TaskSpec
from simtoreal.world_models.clips import Clips
from simtoreal.world_models.pixel_weights import LEVELS
from simtoreal.world_models.positions import TCP, Positions

PERSISTENCE, WINDOW, BEFORE = 5, 10, 10
# A colour belongs to an object if it is this many times as frequent near it as far from it.
CONTRAST = 8.0
# Pixels around an object that are looked at to learn its colour, per 64 pixels of image width.
NEAR_PX = 5.0
SMALLEST_AREA_PX = 4.0
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
        view: camera.
        colours: ``(LEVELS^3,)`` bool: cells of colour space that are the object's.
        least_share: share of its first area that real videos keep.
        reach_m: distance to the gripper below which it may be touched.
    """

    name: str
    column: int
    view: int
    colours: np.ndarray
    least_share: float
    reach_m: float


def _cells(images: np.ndarray) -> np.ndarray:
    levels = images // (256 // LEVELS)
    return (levels[..., 0].astype(np.int64) * LEVELS + levels[..., 1]) * LEVELS + levels[..., 2]


def _spots(evidence: ObjectEvidence, images: np.ndarray) -> np.ndarray:
    """``(M, H, W)`` bool: pixels of the object's colour in pictures ``(M, H, W, 3)``."""
    return evidence.colours[_cells(images)]


def learn_evidence(real: Clips, positions: Positions, fixed_views: list[int]) -> tuple[list[ObjectEvidence], list[str]]:
    """Learn from real videos how to recognise the objects.

    Args:
        real: real videos.
        positions: truth of all data.
        fixed_views: cameras that do not move.

    Returns:
        What can be judged, at most one camera per object, and why objects are left out.
    """
    found: list[ObjectEvidence] = []
    notes: list[str] = []
    if positions.task is None or positions.names[:1] != (TCP,):
        return found, ["without the positions of gripper and objects no physics is judged"]
    for column, name in enumerate(positions.names[1:], start=1):
        candidates = [_learn(real, positions, positions.task, name, column, view) for view in fixed_views]
        good = [one for one in candidates if one is not None]
        if good:
            found.append(good[0])
        else:
            notes.append(f"{name} cannot be told from the rest of the picture by its colour: its physics is not judged")
    return found, notes


def _learn(
    real: Clips, positions: Positions, task: TaskSpec, name: str, column: int, view: int
) -> ObjectEvidence | None:
    first = real.images[real.starts, view]
    height, width = first.shape[1:3]
    places = positions.values[real.frames[real.starts], column].astype(np.float64)
    inputs = np.concatenate([places, np.ones((len(places), 1))], 1)
    cells = _cells(first)
    radius = NEAR_PX * width / 64
    rows, columns = np.mgrid[:height, :width]
    # Where is it? First guess: the pixels that differ most from the other episodes; then alternate between place and
    # colour, as neither is known alone.
    usual = np.median(first, axis=0)
    weight = np.abs(first - usual).max(-1).astype(np.float64) ** 2
    colours = None
    for _ in range(4):
        total = weight.sum((1, 2))
        seen = total > 0
        if seen.mean() < SEEN_SHARE or len(places) < 4:
            return None
        centre = np.stack([(weight * rows).sum((1, 2)), (weight * columns).sum((1, 2))], 1)[seen] / total[seen, None]
        fitted = inputs @ np.linalg.lstsq(inputs[seen], centre, rcond=None)[0]
        near = np.hypot(rows - fitted[:, 0, None, None], columns - fitted[:, 1, None, None]) < radius
        inside = np.bincount(cells[near], minlength=LEVELS**3) / max(1, near.sum())
        outside = np.bincount(cells[~near], minlength=LEVELS**3) / max(1, (~near).sum())
        colours = (inside > 1.0 / max(1, near.sum())) & (inside > CONTRAST * (outside + 1e-5))
        weight = (colours[cells] & (np.hypot(rows - fitted[:, 0, None, None], columns - fitted[:, 1, None, None])
                                    < 2 * radius)).astype(np.float64)  # fmt: skip
    assert colours is not None
    size = task.object(name)
    reach = TOUCH_M + float(np.hypot(size.half_extent_m, size.half_extent_m))
    evidence = ObjectEvidence(name=name, column=column, view=view, colours=colours, least_share=0.0, reach_m=reach)
    area = _spots(evidence, real.images[:, view]).sum((1, 2)).astype(np.float64)
    if np.quantile(area[real.starts], 1 - SEEN_SHARE) < SMALLEST_AREA_PX:
        return None
    lowest = [_persistent_least(area[a:b] / area[a]) for a, b in zip(real.starts, real.ends, strict=True)]
    return ObjectEvidence(
        name=name, column=column, view=view, colours=colours, least_share=float(np.quantile(lowest, 0.02)),
        reach_m=reach,
    )  # fmt: skip


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
            found["vanishes"][row, index] = _persists(area[start:end] / initial < 0.5 * one.least_share)
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
