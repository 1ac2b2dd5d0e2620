"""Matches the observation of a foreign environment to the observation keys of data recorded in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from simtoreal.envs.errors import ConfigError

RENDER = "render"
# Name of the only entry of an observation space that is not a dictionary.
WHOLE = "observation"


class ObservationMap:
    """Turns an environment's observation into ``{key: array}`` as in the data.

    Every key is looked up by its name; else the only entry of its shape is taken; else, for a vector, all vectors of
    the environment in their order if together they have the right length.

    Args:
        space: observation space of the environment; dictionaries may be nested (``a/b``).
        keys: key of the data -> shape of one step.
        sources: key -> entries joined by ``+``, or ``render``; overrules the search.
        environment: for messages.
        drawable: whether ``render`` is possible.

    Raises:
        ConfigError: a key cannot be matched; the message lists the entries and how to name one.
    """

    def __init__(
        self,
        space: gym.Space[Any],
        keys: Mapping[str, tuple[int, ...]],
        sources: Mapping[str, str],
        environment: str,
        *,
        drawable: bool,
    ) -> None:
        self.entries = _leaf_spaces(space, environment)
        self.environment, self.shapes = environment, dict(keys)
        unknown = sorted(set(sources) - set(keys))
        if unknown:
            raise ConfigError(f"--observations: the policy reads no '{unknown[0]}'; it reads {', '.join(keys)}")
        self.sources: dict[str, tuple[str, ...]] = {}
        for key, shape in keys.items():
            self.sources[key] = self._named(key, sources[key]) if key in sources else self._search(key, shape)
        self.draws = any(names == (RENDER,) for names in self.sources.values())
        if self.draws and not drawable:
            raise ConfigError(f"'{environment}' draws no pictures (render mode 'rgb_array')")

    def __call__(self, observation: Any, picture: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the arrays of one observation; vectors float32, images uint8.

        Args:
            observation: of the environment.
            picture: uint8 ``(H, W, 3)``, if a key is taken from the environment's renderer.
        """
        leaves = _leaves(observation)
        result = {}
        for key, names in self.sources.items():
            shape = self.shapes[key]
            if names == (RENDER,) and picture is not None:
                result[key] = _resize(picture, shape)
            elif len(shape) == 3:
                result[key] = np.asarray(leaves[names[0]], dtype=np.uint8)
            else:
                result[key] = np.concatenate([np.ravel(leaves[name]) for name in names]).astype(np.float32)
        return result

    def _named(self, key: str, source: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in source.split("+"))
        if names == (RENDER,):
            if len(self.shapes[key]) == 3:
                return names
            raise ConfigError(f"--observations: '{key}' is a vector; only an image can be rendered")
        for name in names:
            if name not in self.entries:
                raise ConfigError(f"--observations: '{self.environment}' has no '{name}'. {self._listed()}")
        if not self._fits(names, self.shapes[key]):
            raise ConfigError(
                f"--observations: '{source}' does not have the shape {self.shapes[key]} of '{key}'. {self._listed()}"
            )
        return names

    def _search(self, key: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        if key in self.entries and self._fits((key,), shape):
            return (key,)
        fitting = [name for name in self.entries if self._fits((name,), shape)]
        if len(fitting) == 1:
            return (fitting[0],)
        vectors = tuple(name for name in self.entries if not _is_image(self.entries[name]))
        if not fitting and len(shape) == 1 and self._fits(vectors, shape):
            return vectors
        found = f"{len(fitting)} entries have" if fitting else "nothing has"
        raise ConfigError(
            f"'{key}' of the data has the shape {shape}, and in '{self.environment}' {found} it. {self._listed()} "
            f"Say what it is made of with --observations {key}=ENTRY or {key}=ENTRY+ENTRY"
            + (f" or {key}={RENDER}." if len(shape) == 3 else ".")
        )

    def _fits(self, names: tuple[str, ...], shape: tuple[int, ...]) -> bool:
        boxes = [self.entries[name] for name in names]
        if len(shape) == 3:
            return len(boxes) == 1 and _is_image(boxes[0]) and boxes[0].shape == shape
        if any(_is_image(box) for box in boxes):
            return False
        return sum(int(np.prod(box.shape, dtype=int)) for box in boxes) == shape[0]

    def _listed(self) -> str:
        return "It gives " + ", ".join(f"{name} {box.shape}" for name, box in self.entries.items()) + "."


def _is_image(box: gym.spaces.Box) -> bool:
    return box.dtype == np.uint8 and len(box.shape) == 3


def _leaf_spaces(space: gym.Space[Any], environment: str, prefix: str = "") -> dict[str, gym.spaces.Box]:
    if isinstance(space, gym.spaces.Dict):
        return {
            name: leaf
            for key, child in space.items()
            for name, leaf in _leaf_spaces(child, environment, f"{prefix}{key}/").items()
        }
    if not isinstance(space, gym.spaces.Box):
        raise ConfigError(f"'{environment}' observes {space} ({prefix}); expected arrays, or a dictionary of arrays")
    return {prefix.rstrip("/") or WHOLE: space}


def _leaves(observation: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(observation, Mapping):
        return {
            name: leaf for key, child in observation.items() for name, leaf in _leaves(child, f"{prefix}{key}/").items()
        }
    return {prefix.rstrip("/") or WHOLE: observation}


def _resize(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if picture.shape == shape:
        return picture
    import cv2

    return np.asarray(cv2.resize(picture, (shape[1], shape[0]), interpolation=cv2.INTER_AREA))
