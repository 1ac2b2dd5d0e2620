"""Which episodes a world model learned from, over all trainings that made it: whoever judges it must not use these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from simtoreal.world_models.checkpoint import LoadedWorldModel
    from simtoreal.world_models.video_data import VideoData


def describe_episodes(
    names: Sequence[str], seeds: Sequence[int], learned: np.ndarray, before: Mapping[str, Any] | None = None
) -> dict[str, list[Any]]:
    """Describe the data of a training, with those of the model that it began with.

    Args:
        names: folder and number of every episode.
        seeds: their initial conditions.
        learned: ``(E,)`` bool: episodes that were learned from; the others are held out.
        before: the same description of the model that the training began with.

    Returns:
        ``episodes`` (absolute paths), ``seeds`` and ``held_out``: those that no training learned from.
    """
    known: dict[str, tuple[int, bool]] = {}
    for name, seed, used in (*_described(before or {}), *zip(names, seeds, learned, strict=True)):
        # Absolute: who asks later may work in another folder.
        place = str(Path(name).resolve())
        _, already = known.get(place, (0, False))
        known[place] = (int(seed), bool(used) or already)
    return {
        "episodes": list(known),
        "seeds": [seed for seed, _ in known.values()],
        "held_out": [place for place, (_, used) in known.items() if not used],
    }


def learned_seeds(described: Mapping[str, Any]) -> set[int]:
    """Initial conditions of the episodes that were learned from, as far as they have a number."""
    return {seed for _, seed, used in _described(described) if used and seed >= 0}


def fresh_episodes(loaded: LoadedWorldModel, data: VideoData) -> np.ndarray:
    """Return ``(E,)`` bool: episodes of ``data`` that the model did not learn from."""
    tasks = {content.get("name") for content in (loaded.task, data.task) if content}
    # Equal seeds of different tasks are different initial conditions. The task of an earlier training is not known.
    apart = len(tasks) == 2 and not loaded.training.get("initial")
    seeds = [-1] * len(data.seeds) if apart else data.seeds
    return unseen(loaded.training.get("data") or {}, data.names, seeds)


def unseen(described: Mapping[str, Any], names: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Return ``(E,)`` bool: episodes that were not learned from, by name and by initial condition."""
    entries = [(str(Path(name).resolve()), seed, used) for name, seed, used in _described(described)]
    kept = {place for place, _, used in entries if not used}
    learned, avoided = {place for place, _, used in entries if used}, learned_seeds(described)
    places = [str(Path(name).resolve()) for name in names]
    return np.array(
        [place in kept or not (place in learned or seed in avoided) for place, seed in zip(places, seeds, strict=True)]
    )


def _described(content: Mapping[str, Any]) -> list[tuple[str, int, bool]]:
    """Name, seed and whether it was learned from, of every episode of a description."""
    held_out = set(content.get("held_out", ()))
    pairs = zip(content.get("episodes", ()), content.get("seeds", ()), strict=False)
    return [(name, seed, name not in held_out) for name, seed in pairs]
