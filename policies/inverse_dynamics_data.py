"""Pairs of frames of recorded episodes with the action between them, to train an inverse-dynamics model on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simtoreal.data_collection.compatibility import STATIC, collection_mode
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.windows import WindowSampler
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, DatasetError, closest
from simtoreal.policies.frame_windows import FrameWindows
from simtoreal.policies.inverse_dynamics import gap_steps, mean_actions, pair_starts
from simtoreal.policies.inverse_dynamics_config import InverseDynamicsConfig
from simtoreal.policies.normalization import ACTIONS, fit_statistics, has_known_units
from simtoreal.policies.training_data import TrainingData

# Every tenth episode of a folder is held out, as for world models.
HELD_OUT_EVERY = 10
# Lags tried, in control steps (300 ms at 20 Hz).
LARGEST_LAG = 6
TCP = ("tcp_x", "tcp_y", "tcp_z")


def open_frame_pairs(
    paths: Sequence[str | Path], config: InverseDynamicsConfig
) -> tuple[TrainingData, InverseDynamicsConfig]:
    """Open datasets for an inverse-dynamics model; failures are as good as successes.

    Episodes whose scene moved by itself (MOVE) are left out: what changed there was not done by the robot.

    Returns:
        The pairs, and ``config`` with its lag.

    Raises:
        ConfigError: no folder.
        DatasetError: a folder is damaged or lacks a camera, or the episodes are too few or too short.
        EmbodimentMismatchError: the folders are of different embodiments.
    """
    if not paths:
        raise ConfigError("give at least one dataset folder to learn an inverse-dynamics model from")
    datasets = [Dataset.open(path) for path in paths]
    embodiment = datasets[0].embodiment
    for dataset in datasets[1:]:
        dataset.embodiment.require_equal(embodiment, f"dataset {dataset.path}", f"dataset {datasets[0].path}")
    for key in config.image_keys:
        if key not in embodiment.image_keys:
            raise DatasetError(f"{paths[0]}: has no camera '{key}'. {closest(key, embodiment.image_keys)}")
    chosen, notes = [], []
    for dataset in datasets:
        still = [episode for episode in dataset.episodes if collection_mode(episode.extra) == STATIC]
        if moved := len(dataset.episodes) - len(still):
            notes.append(f"{moved} episodes of {dataset.path} are left out: their scene moved by itself (MOVE)")
        chosen.append(still)
    if sum(map(len, chosen)) < 2:
        raise DatasetError(
            f"{', '.join(map(str, paths))}: {sum(map(len, chosen))} usable episodes; an inverse-dynamics model needs "
            f"at least two, one of them to validate with. {' '.join(notes)}"
        )
    held_out = np.concatenate([np.arange(len(some)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for some in chosen])
    if not held_out.any():
        held_out[-1] = True
    keys = (*config.image_keys, "proprio")
    samplers = [WindowSampler(dataset, some, keys=keys) for dataset, some in zip(datasets, chosen, strict=True) if some]
    observations = {
        key: samplers[0].observations[key]
        if len(samplers) == 1
        else np.concatenate([sampler.observations[key] for sampler in samplers])
        for key in keys
    }
    actions = np.concatenate([sampler.actions for sampler in samplers])
    lengths = np.array([episode.steps for some in chosen for episode in some])
    ends = np.cumsum(lengths)
    starts, gap = ends - lengths, gap_steps(config, embodiment)
    proprio = observations.pop("proprio")
    if config.lag_steps is None:
        lag = estimate_lag(actions, proprio, embodiment, starts, ends, gap)
        config = dataclasses.replace(config, lag_steps=lag)
    lag = int(config.lag_steps or 0)
    first, episode = pair_starts(starts, ends, gap, lag)
    wanted = mean_actions(actions, first, gap, lag)
    frames = first[:, None] + np.array([0, gap])

    def windows(rows: np.ndarray) -> FrameWindows:
        if not rows.any():
            raise DatasetError(
                f"{', '.join(map(str, paths))}: the episodes are too short for frames {gap} steps apart; collect "
                "longer ones, or raise pair_hz"
            )
        return FrameWindows(observations, frames[rows], wanted[rows], episode[rows])

    apart = held_out[episode]
    train = windows(~apart)
    tasks = {name: task for dataset in datasets for name, task in dataset.tasks.items()}
    fitted = fit_statistics(
        train.actions, embodiment.action.names, ACTIONS, known_units=has_known_units(embodiment, ACTIONS)
    )
    data = TrainingData(
        embodiment=embodiment,
        task=next(iter(tasks.values())) if len(tasks) == 1 else {},
        train=train,
        valid=windows(apart),
        statistics={ACTIONS: fitted},
        source=", ".join(map(str, paths)),
        seeds=tuple(one.seed for some in chosen for one in some),
        notes=(*notes, *fitted.notes),
    )
    return data, config


def estimate_lag(
    actions: np.ndarray, proprio: np.ndarray, embodiment: Embodiment, starts: np.ndarray, ends: np.ndarray, gap: int
) -> int:
    """Return the lag at which displacements of the end effector explain the mean actions best (largest R^2).

    Args:
        actions: ``(N, A)``, proprio: ``(N, P)`` of all episodes end to end.
        embodiment: names the entries; without a measured end-effector position there is nothing to compare, lag 0.
        starts, ends: ``(E,)`` ranges of the episodes.
        gap: control steps between compared frames.
    """
    names = embodiment.proprio.names
    longest = int((ends - starts).max()) if len(starts) else 0
    if not set(TCP) <= set(names) or embodiment.action.mode == "env":
        return 0
    columns = [names.index(name) for name in TCP]
    largest = min(LARGEST_LAG, longest - gap - 1)
    # The same frames for every lag, so that the scores compare.
    first, _ = pair_starts(starts, ends, gap, max(0, largest))
    if len(first) < 10:
        return 0
    moved = proprio[first + gap][:, columns] - proprio[first][:, columns]
    inputs = np.concatenate([moved, np.ones((len(moved), 1))], 1).astype(np.float64)
    scores = []
    for lag in range(largest + 1):
        wanted = mean_actions(actions, first, gap, lag)[:, :3].astype(np.float64)
        fitted = inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]
        scores.append(float(np.square(wanted - fitted).sum() / max(np.square(wanted - wanted.mean(0)).sum(), 1e-12)))
    return int(np.argmin(scores))
