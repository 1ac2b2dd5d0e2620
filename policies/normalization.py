"""Scaling vectors and actions to [-1, 1] by percentiles, inside the policy.

Per-dimension 2nd and 98th percentile, clipped at 1.5 (LBM, Barreiros et al. 2025, §normalisation): a few outliers
decide neither the scale nor the loss. Rotation-matrix entries are left as they are.
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
# Half-ranges below this (1 cm, 0.01 rad, 1 % of an opening) are noise or constants: they are not magnified.
MINIMUM_HALF_RANGE = 0.01
# When the percentiles span less than this part of the full range they hide a rare but intended motion (a gripper
# that closes in 1 % of the frames, a late rotation), and the full range is used.
RARE_MOTION_FRACTION = 0.1

ACTIONS = "actions"
_ROTATION_ENTRY = re.compile(r"(^|_)r[123][123]$")


@dataclass(frozen=True)
class Statistics:
    """Values of one key that are mapped to -1 and 1.

    Attributes:
        low, high: float32 ``(D,)`` in the units of the key, ``low < high`` everywhere.
    """

    low: np.ndarray
    high: np.ndarray

    def __post_init__(self) -> None:
        valid = self.low.ndim == 1 and self.low.shape == self.high.shape
        if not (
            valid and np.isfinite(self.low).all() and np.isfinite(self.high).all() and (self.low < self.high).all()
        ):
            raise ValueError("normalisation bounds must be finite vectors with low < high")


def fit_statistics(values: np.ndarray, names: Sequence[str] | None = None, key: str = "values") -> Statistics:
    """Return exact percentile statistics.

    Args:
        values: ``(N, D)``, N >= 1.
        names: of the dimensions; entries of rotation matrices (``..._r11``) keep their scale.
        key: for messages.

    Raises:
        DatasetError: no values, or some are not finite.
    """
    if values.ndim != 2 or not len(values):
        raise DatasetError(f"'{key}' has shape {values.shape}; expected (frames, dimensions) with at least one frame")
    if not np.isfinite(values).all():
        frame, dimension = np.argwhere(~np.isfinite(values))[0]
        raise DatasetError(f"'{key}' is not finite at frame {frame}, dimension {dimension}; repair or drop the episode")
    low, high = np.percentile(values.astype(np.float64), [LOW_PERCENTILE, HIGH_PERCENTILE], axis=0)
    smallest, largest = values.min(axis=0), values.max(axis=0)
    rare = (high - low) < RARE_MOTION_FRACTION * (largest - smallest)
    low, high = np.where(rare, smallest, low), np.where(rare, largest, high)
    centre, half = (low + high) / 2, np.maximum((high - low) / 2, MINIMUM_HALF_RANGE)
    if names is not None:
        rotation = np.array([bool(_ROTATION_ENTRY.search(name)) for name in names])
        centre, half = np.where(rotation, 0.0, centre), np.where(rotation, 1.0, half)
    return Statistics(low=(centre - half).astype(np.float32), high=(centre + half).astype(np.float32))


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
