"""What a policy is trained on: windows, held-out windows, normalisation statistics, and which batch comes when."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo
from simtoreal.data_collection.filters import kept_steps
from simtoreal.data_collection.scene_frame import scene_displacements
from simtoreal.data_collection.windows import WindowSampler
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError, closest
from simtoreal.policies.available_memory import available_memory
from simtoreal.policies.config import PolicyConfig
from simtoreal.policies.normalization import ACTIONS, Statistics, dimension_names, fit_statistics, has_known_units
from simtoreal.policies.training_episodes import choose_episodes
from simtoreal.policies.weighting import Weighting, read_returns, window_probabilities

# Above this part of the available memory the joined arrays are mapped from files instead of held.
MEMORY_PART = 0.5
# Keeps the draws of weighted batches apart from those of epoch orders.
_WEIGHTED = 1


class Windows(Protocol):
    """Windows by index; :class:`simtoreal.data_collection.windows.WindowSampler` is one.

    Attributes:
        actions: ``(N, A)`` float32, one row per control step of all episodes.
        observations: key -> ``(N, ...)``.
    """

    actions: np.ndarray
    observations: Mapping[str, np.ndarray]

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Return the window batch of ``indices`` as numpy arrays; see :meth:`Policy.loss`."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Everything that a training takes from its data.

    Attributes:
        embodiment: of every episode.
        task: specification of the task (empty if there are several).
        train: windows to learn from.
        valid: held-out windows, or None.
        statistics: normalisation bounds, from the training windows.
        source: where the data come from, for messages.
        seeds: initial conditions of the episodes, which an evaluation must not reuse.
        probabilities: ``(len(train),)`` of drawing each window; None draws all of them evenly.
        notes: which episodes of the mask were left out and why, and what is odd about their values, one line each.
    """

    embodiment: Embodiment
    task: dict[str, Any]
    train: Windows
    valid: Windows | None
    statistics: dict[str, Statistics]
    source: str
    seeds: tuple[int, ...] = ()
    probabilities: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a digest of the embodiment and of the vectors and actions, which changes when the data change."""
        digest = hashlib.sha256(repr(sorted(self.embodiment.to_dict().items())).encode())
        for windows in (self.train, self.valid):
            if windows is not None:
                digest.update(np.ascontiguousarray(windows.actions).tobytes())
                for key in sorted(self.statistics):
                    if key != ACTIONS:
                        digest.update(np.ascontiguousarray(windows.observations[key]).tobytes())
                keep = getattr(windows, "keep", None)
                if keep is not None and not keep.all():
                    digest.update(keep.tobytes())
        if self.probabilities is not None:
            digest.update(self.probabilities.tobytes())
        return digest.hexdigest()[:32]


def fit_all(windows: Windows, embodiment: Embodiment, config: PolicyConfig) -> dict[str, Statistics]:
    """Return the statistics of the actions and of every vector key of ``config``.

    Raises:
        DatasetError: a key is missing, is not a vector, or holds values that are not finite.
    """
    # What a filter drops must not decide the scale either.
    keep = getattr(windows, "keep", slice(None))
    values = {ACTIONS: windows.actions[keep]}
    for key in config.state_keys:
        if key not in windows.observations:
            raise DatasetError(f"the data have no observation '{key}'. {closest(key, windows.observations)}")
        values[key] = windows.observations[key][keep]
    return {
        key: fit_statistics(value, dimension_names(embodiment, key), key, known_units=has_known_units(embodiment, key))
        for key, value in values.items()
    }


def fit_notes(statistics: Mapping[str, Statistics]) -> tuple[str, ...]:
    """Return what the fits of all keys found odd in the data, one line each."""
    return tuple(note for one in statistics.values() for note in one.notes)


def open_training_data(
    path: str | Path,
    config: PolicyConfig,
    *,
    mask: str = "train",
    filter: str | None = None,
    weighting: Weighting | None = None,
    scene_frame: bool = True,
    embodiment: Embodiment | None = None,
    hold_out: bool = True,
) -> TrainingData:
    """Open a dataset folder for a policy.

    Args:
        path: dataset folder.
        config: gives keys and window sizes.
        mask: episodes to learn from, without those of ``valid`` and, mostly, failures; see
            :func:`~simtoreal.policies.training_episodes.choose_episodes`.
        filter: learn only from the steps that this filter of the dataset keeps (``simtoreal data filter``).
        weighting: draw some episodes more often; by default all windows alike.
        scene_frame: relate the actions of demonstrations in a moving scene to the scene; see
            :mod:`simtoreal.data_collection.scene_frame`.
        embodiment: required of the data, if given.
        hold_out: False learns from every episode of the mask, also from those of ``valid``.

    Raises:
        ConfigError: the weighting does not suit the data, or the filter keeps no step of the episodes to learn from.
        DatasetError: missing, damaged, or without a key that the policy reads, the filter, or how the scene moved.
        EmbodimentMismatchError: the data are of another embodiment.
    """
    dataset = Dataset.open(path, embodiment=embodiment)
    for key in config.image_keys:
        if key not in dataset.embodiment.image_keys:
            raise DatasetError(
                f"{path}: the policy reads '{key}', but the data have no such camera. "
                f"{closest(key, dataset.embodiment.image_keys)} Set image_keys of the policy."
            )
    weighted = weighting is not None and weighting.method != "uniform"
    choice = choose_episodes(dataset, mask, hold_out=hold_out, weighted=weighted)
    chosen, held_out = choice.train, choice.valid
    kept: dict[str, np.ndarray] | None = None
    if filter is not None:
        covered = (*chosen, *held_out)
        kept = dict(zip([e.name for e in covered], kept_steps(dataset.path, filter, covered), strict=True))
        held_out = [episode for episode in held_out if kept[episode.name].any()]
    steps = sum(episode.steps for episode in (*chosen, *held_out))
    per_step = sum(
        camera.height * camera.width * 3
        for camera in dataset.embodiment.cameras
        if f"{camera.name}_image" in config.image_keys
    )
    sizes: dict[str, Any] = {
        "observation_steps": config.observation_steps,
        "horizon": config.horizon,
        "keys": config.keys,
        "memory_map": steps * per_step > MEMORY_PART * available_memory(),
    }

    def windows(episodes: list[EpisodeInfo]) -> WindowSampler:
        keep = None if kept is None else [kept[episode.name] for episode in episodes]
        displacement = scene_displacements(episodes, dataset.embodiment) if scene_frame else None
        return WindowSampler(dataset, episodes, keep=keep, displacement=displacement, **sizes)

    train = windows(chosen)
    probabilities = None
    if weighting is not None and weighted:
        probabilities = window_probabilities(weighting, *read_returns(dataset, chosen), train.episode_of_window)
    statistics = fit_all(train, dataset.embodiment, config)
    return TrainingData(
        embodiment=dataset.embodiment,
        task=dataset.task if len(dataset.tasks) == 1 else {},
        train=train,
        valid=windows(held_out) if held_out else None,
        statistics=statistics,
        source=str(path),
        seeds=tuple(episode.seed for episode in (*chosen, *held_out)),
        probabilities=probabilities,
        notes=(*choice.notes, *fit_notes(statistics)),
    )


def batch_indices(
    windows: int, batch_size: int, seed: int, step: int, cumulative: np.ndarray | None = None
) -> np.ndarray:
    """Return the window indices ``(batch_size,)`` of one training step.

    Epochs follow one another without a break, each in an order of its own that depends on ``seed`` and the epoch
    only. With ``cumulative`` ``(windows,)``, the cumulative probabilities of the windows, they are drawn with
    replacement, depending on ``seed`` and ``step`` only. The step is the whole state of the sampler, so a resumed
    training continues with exactly the right batch.
    """
    if cumulative is not None:
        drawn = np.random.default_rng([seed, step, _WEIGHTED]).random(batch_size) * cumulative[-1]
        return np.searchsorted(cumulative, drawn, side="right")
    position = step * batch_size + np.arange(batch_size)
    epochs, places = np.divmod(position, windows)
    result = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        result[inside] = _epoch_order(windows, seed, int(epoch))[places[inside]]
    return result


@functools.lru_cache(maxsize=2)
def _epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def to_tensors(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a numpy window batch as torch tensors on ``device``."""

    def convert(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return {
        "observation": {key: convert(value) for key, value in batch["observation"].items()},
        "actions": convert(batch["actions"]),
        "action_mask": convert(batch["action_mask"]),
        "instruction": batch["instruction"],
    }


def training_batches(
    windows: Windows,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    probabilities: np.ndarray | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the batches of steps ``first_step`` … ``last_step - 1``, gathering the next one in the background.

    Args:
        windows: to draw from.
        batch_size: over all processes; process ``rank`` of ``world`` gets every ``world``-th window.
        seed: decides the order.
        first_step, last_step: range of steps.
        device: where the tensors are put.
        rank, world: this process.
        probabilities: see :class:`TrainingData`.
    """
    cumulative = None if probabilities is None else np.cumsum(probabilities)

    def gather(step: int) -> dict[str, Any]:
        indices = batch_indices(len(windows), batch_size, seed, step, cumulative)[rank::world]
        return to_tensors(windows.batch(indices), device)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending = pool.submit(gather, first_step) if first_step < last_step else None
        for step in range(first_step, last_step):
            batch = pending.result()  # type: ignore[union-attr]
            pending = pool.submit(gather, step + 1) if step + 1 < last_step else None
            yield batch
