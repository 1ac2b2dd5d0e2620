"""How many different ways a dataset shows, where nobody said what the ways are: foreign data, tasks without labels.

Episodes are compared by their motion: vector observations and actions at evenly spaced moments. Two numbers follow.
The *modes* are clusters, if there are clear ones, and their entropy is read like that of labelled behaviours. The
*effective number of episodes* needs no clusters (Vendi score, Friedman & Dieng, TMLR 2023): the exponential of the
entropy of the eigenvalues of the similarity matrix; n episodes count as n if none resembles another and as 1 if all
are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.diversity import unconditional_entropy
from simtoreal.data_collection.inspect_motion import MotionScale
from simtoreal.envs.errors import DatasetError

PROFILE_STEPS = 32
MOST_MODES = 8
# Rousseeuw 1987: below this mean silhouette there is no substantial structure.
CLEAR_SILHOUETTE = 0.25
_PRINCIPAL_VARIANCE = 0.95


def unlabelled_diversity(dataset: Dataset, masks: Sequence[str | None] = (None,)) -> list[dict[str, Any]]:
    """Return the diversity of the successful episodes, one entry per mask (None: all), on one common scale.

    Returns:
        ``episodes``, ``successes``, ``modes`` (1 if there are no clear clusters), ``silhouette`` (of the clusters, in
        [-1, 1]), ``counts`` (successes per mode), ``entropy`` (of the modes, in [0, 1]), ``effective_episodes``.

    Raises:
        DatasetError: no episode succeeded, or a mask does not exist.
    """
    from scipy.spatial.distance import cdist

    successes = [episode for episode in dataset.episodes if episode.success]
    if not successes:
        raise DatasetError(f"{dataset.path}: holds no successful episode; diversity is that of successes.")
    scale = MotionScale.of(dataset, successes)
    names = (*scale.keys, "actions")
    profiles = np.stack([_profile(dataset.read(episode, names), names) for episode in successes])
    points = _principal(profiles)
    distances = cdist(points, points)
    labels, silhouette = _modes(points, distances)
    between = distances[np.triu_indices(len(points), 1)]
    width = float(np.median(between)) if len(between) and np.median(between) > 0 else 1.0
    similarity = np.exp(-np.square(distances / width) / 2)
    row = {episode.name: index for index, episode in enumerate(successes)}
    results = []
    for mask in masks:
        chosen = dataset.filter(mask)
        rows = np.array([row[episode.name] for episode in chosen if episode.name in row], dtype=int)
        modes = int(labels.max()) + 1
        counts = np.bincount(labels[rows], minlength=modes)
        results.append(
            {
                "episodes": len(chosen),
                "successes": len(rows),
                "modes": modes,
                "silhouette": silhouette,
                "counts": counts.tolist(),
                "entropy": unconditional_entropy(counts.tolist()) if modes > 1 else 0.0,
                "effective_episodes": vendi_score(similarity[np.ix_(rows, rows)]),
            }
        )
    return results


def vendi_score(similarity: np.ndarray) -> float:
    """Return the effective number of different items of a similarity matrix ``(n, n)`` with ones on its diagonal."""
    if not len(similarity):
        return 0.0
    values = np.linalg.eigvalsh(similarity / len(similarity))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def _profile(arrays: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    rows = np.concatenate([arrays[name].astype(np.float64) for name in names], axis=1)
    moments = np.linspace(0, len(rows) - 1, PROFILE_STEPS)
    return np.concatenate([np.interp(moments, np.arange(len(rows)), column) for column in rows.T])


def _principal(profiles: np.ndarray) -> np.ndarray:
    """Profiles ``(N, F)`` on the components that hold most of their variance, every quantity in its own spread."""
    centred = profiles - profiles.mean(axis=0)
    quantities = centred.reshape(len(centred), -1, PROFILE_STEPS)
    spread = quantities.std(axis=(0, 2), keepdims=True)
    scaled = np.where(spread > 1e-9, quantities / np.where(spread > 1e-9, spread, 1.0), 0.0).reshape(len(centred), -1)
    u, values, _ = np.linalg.svd(scaled, full_matrices=False)
    total = float(np.square(values).sum())
    if total <= 0:
        return np.zeros((len(profiles), 1))
    kept = int(np.searchsorted(np.cumsum(np.square(values)) / total, _PRINCIPAL_VARIANCE)) + 1
    result: np.ndarray = u[:, :kept] * values[:kept]
    return result


def _modes(points: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, float]:
    """Labels ``(N,)`` of the clearest clustering, all 0 if none is clear, and its mean silhouette."""
    from scipy.cluster.hierarchy import fcluster, linkage

    best, silhouette = np.zeros(len(points), dtype=int), 0.0
    if len(points) < 4:
        return best, silhouette
    tree = linkage(points, "ward")
    for count in range(2, min(MOST_MODES, len(points) // 2) + 1):
        labels = fcluster(tree, count, "maxclust") - 1
        found = _silhouette(distances, labels)
        if found > max(silhouette, CLEAR_SILHOUETTE):
            best, silhouette = labels, found
    return best, silhouette


def _silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw 1987); members of clusters of one count as 0."""
    clusters = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    to_cluster = np.stack([distances[:, members].sum(axis=1) for members in clusters], axis=1)
    sizes = np.array([len(members) for members in clusters])
    rows = np.arange(len(labels))
    inside = to_cluster[rows, labels] / np.maximum(sizes[labels] - 1, 1)
    outside = to_cluster / sizes
    outside[rows, labels] = np.inf
    nearest = outside.min(axis=1)
    scores = (nearest - inside) / np.maximum(np.maximum(nearest, inside), 1e-12)
    return float(np.where(sizes[labels] > 1, scores, 0.0).mean())
