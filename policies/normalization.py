"""Scaling vectors and actions to [-1, 1] by percentiles, inside the policy.

Per-dimension 2nd and 98th percentile, clipped at 1.5 (LBM, Barreiros et al. 2025, §normalisation): a few outliers
decide neither the scale nor the loss. Rotation-matrix entries are left as they are, and a rare motion that is much
larger than all others keeps its range. Between the two, commanded actions can be cut: a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from simtoreal.envs.embodiment import TARGET_NAMES, Embodiment
from simtoreal.envs.errors import CheckpointError, DatasetError

LOW_PERCENTILE, HIGH_PERCENTILE = 2.0, 98.0
CLIP = 1.5
# Half-ranges below this (1 cm, 0.01 rad, 1 % of an opening) are noise or constants: they are not magnified. Where units
# are not known, 0.01 may be all the motion there is, and only constants are not magnified.
MINIMUM_HALF_RANGE = 0.01
# When the percentiles span less than this part of the full range they hide a rare but intended motion (a gripper
# that closes in 1 % of the frames, a late rotation), and the full range is used ...
RARE_MOTION_FRACTION = 0.1
# ... unless there is a range to work in and fewer frames than these lie that far out: a glitch of a sensor. Actions
# keep theirs, however rare: they were commanded.
RARE_MOTION_FRAMES = 0.001
# Commanded actions that are cut by more than this part of their range are noted: of -1 to 1 or, where units are not
# known, of what was commanded.
NOTED_CUT = 0.05
# A range of this many float32 steps is rounding.
ROUNDING_STEPS = 8
# The largest magnitude whose float32 bounds can still be added and subtracted.
LARGEST_VALUE = float(np.finfo(np.float32).max) / 4

ACTIONS = "actions"
_ROTATION_ENTRY = re.compile(r"(^|_)r[123][123]$")


@dataclass(frozen=True)
class Statistics:
    """Values of one key that are mapped to -1 and 1.

    Attributes:
        low, high: float32 ``(D,)`` in the units of the key, ``low < high`` everywhere.
        notes: what the fit found odd in the data, one line each; not part of a checkpoint.
    """

    low: np.ndarray
    high: np.ndarray
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        valid = self.low.ndim == 1 and self.low.shape == self.high.shape
        if not (
            valid and np.isfinite(self.low).all() and np.isfinite(self.high).all() and (self.low < self.high).all()
        ):
            raise ValueError("normalisation bounds must be finite vectors with low < high")


def fit_statistics(
    values: np.ndarray, names: Sequence[str] | None = None, key: str = "values", *, known_units: bool = True
) -> Statistics:
    """Return exact percentile statistics.

    Args:
        values: ``(N, D)``, N >= 1.
        names: of the dimensions; entries of rotation matrices (``..._r11``) keep their scale.
        key: for messages.
        known_units: whether ``values`` are in metres, radians or parts of a range, so that 0.01 is little; see
            :func:`has_known_units`.

    Raises:
        DatasetError: no values, or some are not finite or too large.
    """
    if values.ndim != 2 or not len(values):
        raise DatasetError(f"'{key}' has shape {values.shape}; expected (frames, dimensions) with at least one frame")
    if not np.isfinite(values).all():
        frame, dimension = np.argwhere(~np.isfinite(values))[0]
        raise DatasetError(f"'{key}' is not finite at frame {frame}, dimension {dimension}; repair or drop the episode")
    smallest, largest = values.min(axis=0), values.max(axis=0)
    magnitude = np.maximum(np.abs(smallest.astype(np.float64)), np.abs(largest.astype(np.float64)))
    if (magnitude > LARGEST_VALUE).any():
        dimension = int(np.argmax(magnitude))
        raise DatasetError(
            f"'{key}' reaches {magnitude[dimension]:.3g} in dimension {_name(names, dimension)}, more than float32 can "
            "scale; repair the episode, or record the data in larger units"
        )
    low, high = np.percentile(values.astype(np.float64), [LOW_PERCENTILE, HIGH_PERCENTILE], axis=0)
    rounding = ROUNDING_STEPS / 2 * np.spacing(magnitude.astype(np.float32)).astype(np.float64)
    least = np.full_like(low, MINIMUM_HALF_RANGE) if known_units else _rounding_of_key(rounding)
    rotation = np.array([bool(_ROTATION_ENTRY.search(name)) for name in names or [""] * len(low)])
    rare = (high - low) < RARE_MOTION_FRACTION * (largest - smallest)
    working = ((high - low) / 2 > least) & ~rotation
    glitches = rare & working & (_share_far_out(values, low, high) < RARE_MOTION_FRAMES) & (key != ACTIONS)
    notes = tuple(
        f"'{key}' reaches {smallest[index]:.3g} … {largest[index]:.3g} in dimension {_name(names, index)}, but in "
        f"fewer than {100 * RARE_MOTION_FRAMES:g} % of the frames, which are clipped; the scale is that of the "
        f"others, {low[index]:.3g} … {high[index]:.3g}"
        for index in np.flatnonzero(glitches)
    )
    rare &= ~glitches
    low, high = np.where(rare, smallest, low), np.where(rare, largest, high)
    centre, half = (low + high) / 2, (high - low) / 2
    if not known_units:
        # A constant that is not quite the same on the robot must not become large, nor an action that was never used.
        moving = half > least
        least = np.where(moving, least, min(MINIMUM_HALF_RANGE, half[moving].min(initial=np.inf)))
    half = np.maximum(half, np.maximum(least, rounding))
    centre, half = np.where(rotation, 0.0, centre), np.where(rotation, 1.0, half)
    if key == ACTIONS:
        full = np.full_like(half, 2.0) if known_units else largest.astype(np.float64) - smallest
        notes += _cut_notes(values, centre - CLIP * half, centre + CLIP * half, NOTED_CUT * full, names)
    return Statistics(low=(centre - half).astype(np.float32), high=(centre + half).astype(np.float32), notes=notes)


def _cut_notes(
    values: np.ndarray, lowest: np.ndarray, highest: np.ndarray, allowed: np.ndarray, names: Sequence[str] | None
) -> tuple[str, ...]:
    """Return a line about the dimensions of actions ``values`` in which ``lowest`` … ``highest`` cuts too much."""
    cut = np.maximum(values - highest, lowest - values)
    found = [
        f"dimension {_name(names, index)} to {lowest[index]:.3g} … {highest[index]:.3g} (by more than "
        f"{allowed[index]:.2g} in {100 * (cut[:, index] > allowed[index]).mean():.2g} % of the frames, by up to "
        f"{cut[:, index].max():.2g})"
        for index in np.flatnonzero((cut > allowed).any(axis=0))
    ]
    return (f"'{ACTIONS}' far outside of what is usual are cut: {', '.join(found)}",) if found else ()


def _name(names: Sequence[str] | None, dimension: int) -> str:
    return f"{dimension} ({names[dimension]})" if names is not None and names[dimension] else str(dimension)


def _rounding_of_key(rounding: np.ndarray) -> np.ndarray:
    """Half-ranges that are rounding: of the dimension itself, or what its computation from larger ones leaves."""
    return np.maximum(rounding, min(MINIMUM_HALF_RANGE, float(rounding.max(initial=0.0))))


def _share_far_out(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Part ``(D,)`` of the frames that are farther from the percentiles' centre than what makes a motion rare."""
    farthest = (high - low) / 2 / RARE_MOTION_FRACTION
    return np.asarray((np.abs(values - (low + high) / 2) > farthest).mean(axis=0))


def has_known_units(embodiment: Embodiment, key: str) -> bool:
    """Whether ``actions`` or a vector observation are known to be in metres, radians and parts of a range."""
    return embodiment.action.mode != "env" and key in (ACTIONS, "proprio", "object_state")


def dimension_names(embodiment: Embodiment, key: str) -> tuple[str, ...] | None:
    """Return the names of the dimensions of ``proprio`` or ``actions``, None for keys the embodiment does not know."""
    if key == ACTIONS:
        return TARGET_NAMES if embodiment.action.mode == "ee_abs" else embodiment.action.names
    return embodiment.proprio.names if key == "proprio" else None


class Normalizer(nn.Module):
    """Maps keys to [-1, 1] and back. The bounds live in ``stats.safetensors``, not in the weights."""

    def __init__(self, statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        self.statistics = dict(statistics)
        for key, value in statistics.items():
            centre = torch.from_numpy((value.high + value.low) / 2)
            half = torch.from_numpy((value.high - value.low) / 2)
            self.register_buffer(f"{key}_centre", centre, persistent=False)
            self.register_buffer(f"{key}_half", half, persistent=False)

    def dim(self, key: str) -> int:
        """Number of dimensions of ``key``.

        Raises:
            CheckpointError: there are no statistics for it.
        """
        if key not in self.statistics:
            raise CheckpointError(f"no normalisation statistics for '{key}'; found {sorted(self.statistics)}")
        return len(self.statistics[key].low)

    def normalize(self, key: str, value: Tensor, *, clip: float | None = CLIP) -> Tensor:
        """Return float32 ``value`` scaled to [-1, 1] and clipped at ``clip`` (None: not at all)."""
        centre, half = getattr(self, f"{key}_centre"), getattr(self, f"{key}_half")
        scaled = (value.float() - centre) / half
        return scaled if clip is None else scaled.clamp(-clip, clip)

    def denormalize(self, key: str, value: Tensor) -> Tensor:
        """Inverse of :meth:`normalize` (up to the clipping)."""
        return value.float() * getattr(self, f"{key}_half") + getattr(self, f"{key}_centre")
