"""What a recording of the twin, or an export, says about the scene: arrays of an episode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from simtoreal.data_collection.episode import Arrays
from simtoreal.envs.errors import DatasetError


def truth_arrays(texts: Sequence[str], described: dict[str, Any] | None) -> Arrays:
    """Return ``obs/object_state`` ``(T, D)`` and ``step/scene_motion`` ``(T, K)``, as far as they are there.

    Args:
        texts: the message of each of T steps.
        described: what an export knew about the episode. Scene motion is only read from exports: in recordings of the
            twin it belongs to moments between the steps.

    Raises:
        DatasetError: the motion of the scene is not given in numbers.
    """
    truths = [json.loads(text) for text in texts]
    arrays: Arrays = {}
    if "object_state" in truths[0]:
        arrays["obs/object_state"] = np.array([truth["object_state"] for truth in truths], dtype=np.float32)
    columns = (described or {}).get("columns")
    names = columns.get("scene_motion") if isinstance(columns, dict) else None
    rows = [truth.get("scene_motion") for truth in truths]
    # Older exports describe the columns without their values.
    if isinstance(names, list) and names and any(isinstance(row, dict) for row in rows):
        try:
            values = [[float(row[name]) for name in names] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"its 'scene_motion' does not give a number for each of {names} ({error})") from error
        arrays["step/scene_motion"] = np.array(values, dtype=np.float64)
    return arrays
