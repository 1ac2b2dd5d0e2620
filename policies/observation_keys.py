"""Which observations a policy reads when nobody said so: its defaults, or what the data have instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import open_episode
from simtoreal.policies.config import PolicyConfig

C = TypeVar("C", bound=PolicyConfig)


def observation_shapes(dataset: Dataset) -> dict[str, tuple[int, ...]]:
    """Return observation key -> shape of one step, from the first episode.

    Raises:
        DatasetError: the episode is damaged.
    """
    if not dataset.episodes:
        return {}
    with open_episode(Path(str(dataset.episodes[0].path))) as file:
        return {key: tuple(array.shape[1:]) for key, array in file["obs"].items()}


def adapt_keys(config: C, shapes: Mapping[str, tuple[int, ...]]) -> C:
    """Return ``config`` with keys that the data have, where it holds defaults that they lack.

    Keys that were chosen are never changed: a wrong one stays an error. Defaults that the data lack are replaced by
    all images, or all vectors, of the data. Where there are no images instead of the default ones, the default vectors
    are replaced by all vectors, too: without them the policy would not see the objects. Choosing no images
    (``--diffusion.image-keys`` with nothing behind it) keeps the default vectors.

    Args:
        config: of any policy type.
        shapes: observation key -> shape of one step, as in the data.
    """
    found = {
        "image_keys": tuple(key for key, shape in shapes.items() if len(shape) == 3),
        "state_keys": tuple(key for key, shape in shapes.items() if len(shape) == 1),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    changes = {
        name: keys
        for name, keys in found.items()
        if getattr(config, name) == defaults[name] and not set(getattr(config, name)) <= set(keys)
    }
    if changes.get("image_keys") == () and config.state_keys == defaults["state_keys"]:
        changes["state_keys"] = found["state_keys"]
    return dataclasses.replace(config, **changes) if changes and any(found.values()) else config
