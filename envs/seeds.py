"""Initial conditions by number: what ``reset(seed=...)`` of a vector environment takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simtoreal.envs.errors import ConfigError


def one_seed_each(seed: int | Sequence[int | None] | None, count: int) -> list[int | None]:
    """Return a seed for each of ``count`` episodes.

    Args:
        seed: one per episode, or an integer s for s, s+1, ...
        count: number of episodes.

    Returns:
        Seeds; None where one is to be drawn.

    Raises:
        ConfigError: something else than integers of at least 0 and None, or another number of them.
    """
    if seed is None:
        return [None] * count
    if isinstance(seed, int | np.integer):
        given: list[int | None] = [int(seed) + index for index in range(count)]
    elif isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
        given = list(seed)
    else:
        raise ConfigError(f"seed is {seed!r}; expected an integer, or one per episode")
    if len(given) != count:
        raise ConfigError(f"got {len(given)} seeds for {count} episodes")
    for value in given:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0):
            raise ConfigError(f"seed is {value!r}; expected an integer of at least 0")
    return [None if value is None else int(value) for value in given]
