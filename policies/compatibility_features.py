"""What the scorer of demonstrations sees of an observation: vectors as they are, or a trained policy's encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import open_episode
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, DatasetError, closest
from simtoreal.envs.task_file import parse_task
from simtoreal.policies.checkpoint import MODEL, load_policy
from simtoreal.policies.normalization import dimension_names, has_known_units

# Windows encoded at once; images of more would not fit into a cache.
CHUNK = 256


class Features(Protocol):
    """Turns recent observations into one vector.

    Attributes:
        keys: observation keys read.
        history: most recent observations needed.
    """

    keys: tuple[str, ...]
    history: int

    def extract(self, windows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float32 ``(B, F)`` for ``(B, history, ...)`` per key, oldest first."""

    def dimension_names(self, embodiment: Embodiment) -> tuple[str, ...] | None:
        """Names of the F dimensions, which tell rotations from lengths; None if they have none."""

    def describe(self) -> dict[str, Any]:
        """What :func:`make_features` needs to build the same again, JSON-compatible."""


class StateFeatures:
    """Vector observations, joined; behind them the position of every object relative to the end effector.

    Relative positions are what actions depend on, and they stay familiar when a scene moves.

    Args:
        keys: such as ``("proprio", "object_state")``.
        end_effector: columns of the position of the end effector, 3.
        objects: columns of the position of each object, 3 each.
    """

    history = 1

    def __init__(
        self, keys: Sequence[str], end_effector: Sequence[int] = (), objects: Sequence[Sequence[int]] = ()
    ) -> None:
        self.keys, self.end_effector, self.objects = tuple(keys), list(end_effector), [list(one) for one in objects]

    def extract(self, windows: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :class:`Features`.

        Raises:
            DatasetError: a key holds something else than vectors.
        """
        for key in self.keys:
            if windows[key].ndim != 3:
                raise DatasetError(
                    f"observation '{key}' is not a vector; score images with --encoder RUN, on a policy's features"
                )
        state = np.concatenate([windows[key][:, -1] for key in self.keys], axis=-1)
        relative = [state[:, columns] - state[:, self.end_effector] for columns in self.objects]
        return np.concatenate([state, *relative], axis=-1).astype(np.float32)

    def dimension_names(self, embodiment: Embodiment) -> tuple[str, ...] | None:
        """See :class:`Features`."""
        if self.keys[0] != "proprio":
            return None
        # What follows the proprio vector holds no rotation matrices; any name will do.
        return embodiment.proprio.names

    def describe(self) -> dict[str, Any]:
        """See :class:`Features`."""
        return {"keys": list(self.keys), "end_effector": self.end_effector, "objects": self.objects}


class EncoderFeatures:
    """The observation vector that a trained policy computes from its images and vectors, frozen.

    Args:
        run: run or checkpoint folder of a policy with an ``encoder`` (``bc``, ``diffusion``).
        device: torch device.

    Raises:
        CheckpointError: see :func:`~simtoreal.policies.checkpoint.load_policy`.
        ConfigError: the policy has no encoder.
    """

    def __init__(self, run: str | Path, device: str | torch.device = "cpu") -> None:
        loaded = load_policy(run, device)
        self.policy, self.run, self.folder = loaded.policy, Path(run), loaded.folder
        if not isinstance(getattr(loaded.policy, "encoder", None), torch.nn.Module):
            raise ConfigError(
                f"{run}: policy type '{loaded.config.type}' has no encoder; give a run of 'bc' or 'diffusion'"
            )
        self.keys, self.history = loaded.config.keys, loaded.config.observation_steps

    def extract(self, windows: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :class:`Features`."""
        parts = []
        with torch.inference_mode():
            for start in range(0, len(next(iter(windows.values()))), CHUNK):
                batch = {
                    key: torch.from_numpy(np.ascontiguousarray(windows[key][start : start + CHUNK])).to(
                        self.policy.device
                    )
                    for key in self.keys
                }
                parts.append(self.policy.encoder(batch).float().cpu().numpy())  # type: ignore[operator]
        return np.concatenate(parts)

    def dimension_names(self, embodiment: Embodiment) -> tuple[str, ...] | None:
        """See :class:`Features`."""
        return None

    def describe(self) -> dict[str, Any]:
        """See :class:`Features`."""
        stat = (self.folder / MODEL).stat()
        return {"keys": list(self.keys), "encoder": str(self.folder.resolve()), "encoder_bytes": stat.st_size,
                "encoder_mtime_ns": stat.st_mtime_ns}  # fmt: skip


def make_features(
    dataset: Dataset, keys: Sequence[str] = (), encoder: str | Path | None = None, device: str = "cpu"
) -> Features:
    """Return the features for a dataset.

    By default the vectors ``proprio`` and ``object_state`` (the scene truth, which simulated episodes hold), as far as
    they are there. Where there are cameras but no scene truth, the vectors do not say where things are, and an encoder
    is required.

    Args:
        dataset: its first episode tells which observations there are.
        keys: vector observations to use instead.
        encoder: run folder of a policy whose encoding is used instead.
        device: where the encoder runs.

    Raises:
        ConfigError: both keys and encoder are given, or an encoder is needed.
        DatasetError: the data lack a key.
        EmbodimentMismatchError: the encoder was trained for another embodiment.
    """
    if keys and encoder is not None:
        raise ConfigError("give --keys or --encoder, not both")
    if not dataset.episodes:
        raise DatasetError(f"{dataset.path}: holds no episodes")
    with open_episode(Path(str(dataset.episodes[0].path))) as file:
        present = {key: len(file["obs"][key].shape) for key in file["obs"]}
    if encoder is not None:
        features: Features = EncoderFeatures(encoder, device)
        features.policy.embodiment.require_equal(  # type: ignore[attr-defined]
            dataset.embodiment, f"encoder {encoder}", f"dataset {dataset.path}"
        )
    elif keys:
        features = StateFeatures(keys)
    else:
        default = [key for key in ("proprio", "object_state") if key in present]
        if not default or ("object_state" not in present and dataset.embodiment.cameras):
            raise ConfigError(
                f"{dataset.path}: vectors alone do not say where things are (no 'object_state'). Give --encoder RUN, a "
                f"policy trained on the base data, or --keys if they do. It holds {', '.join(sorted(present))}."
            )
        features = StateFeatures(default, *_positions(dataset, default))
    for key in features.keys:
        if key not in present:
            raise DatasetError(f"{dataset.path}: has no observation '{key}'. {closest(key, present)}")
    return features


def _positions(dataset: Dataset, keys: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Columns of the end effector and of the objects in joined ``proprio`` and ``object_state``; none if unknown."""
    names, task = list(dataset.embodiment.proprio.names), next(iter(dataset.tasks.values()), {})
    if len(dataset.tasks) != 1 or list(keys) != ["proprio", "object_state"] or "plan" not in task:
        return [], []
    columns = parse_task(task, source=str(dataset.path)).object_state_names
    found = [len(names) + index for index, name in enumerate(columns) if name.endswith("_x")]
    if not all(f"tcp_{axis}" in names for axis in "xyz"):
        return [], []
    return [names.index(f"tcp_{axis}") for axis in "xyz"], [[start, start + 1, start + 2] for start in found]


def episode_windows(arrays: Mapping[str, np.ndarray], features: Features) -> dict[str, np.ndarray]:
    """Windows ``(T, history, ...)`` per key of an episode with arrays ``obs/<key>``; the first row is repeated."""
    steps = len(arrays[f"obs/{features.keys[0]}"])
    rows = np.maximum(np.arange(steps)[:, None] + np.arange(1 - features.history, 1), 0)
    return {key: arrays[f"obs/{key}"][rows] for key in features.keys}


def scale_names(features: Features, embodiment: Embodiment, size: int) -> tuple[str, ...] | None:
    """Names of all ``size`` dimensions for the fit of their scale, padded behind those that are known."""
    names = features.dimension_names(embodiment)
    return None if names is None else (*names, *[""] * (size - len(names)))


def scale_units_known(features: Features, embodiment: Embodiment) -> bool:
    """Whether a small range of the features is noise: of vectors in known units, and of what a network says."""
    return not isinstance(features, StateFeatures) or all(has_known_units(embodiment, key) for key in features.keys)


def action_names(embodiment: Embodiment) -> tuple[str, ...] | None:
    """Names of the action dimensions."""
    return dimension_names(embodiment, "actions")
