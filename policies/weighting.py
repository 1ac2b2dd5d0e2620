"""Which episodes of mixed quality to learn from more often (Hong et al. 2023, "Harnessing mixed offline datasets").

A policy that imitates everything imitates mostly what is bad when most of the data is. Each window inherits a weight
from its episode, and training draws windows with probability softmax(weight / temperature) instead of evenly:

* ``return``: the episode's return, scaled to [0, 1];
* ``advantage``: what the return exceeds the return to be expected from the episode's beginning by, scaled to [0, 1], so
  that an easy start is not taken for a good demonstration. The expectation is a linear least-squares fit on the first
  observation's vectors;
* ``top``: the best tenth of the episodes, evenly.

The return of an episode is the discounted sum of its stored rewards. For tasks rewarded once, on success, it is
``0.99^(T - 1)`` for a success in T steps and 0 for a failure: fast successes are best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo, open_episode
from simtoreal.envs.errors import ConfigError, DatasetError

Method = Literal["uniform", "return", "advantage", "top"]

DISCOUNT = 0.99
TOP_SHARE = 0.1
# A fit through fewer episodes per coefficient explains the noise, and nothing is left to be an advantage.
EPISODES_PER_COEFFICIENT = 2


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How windows are weighted.

    Attributes:
        method: see the module.
        temperature: of the softmax over weights in [0, 1]; the best episode is drawn up to exp(1 / temperature) times
            as often as the worst. The paper's scripts use 0.1 and 0.2.

    Raises:
        ConfigError: unknown method, or a temperature that is not positive.
    """

    method: Method = "uniform"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in ("uniform", "return", "advantage", "top"):
            raise ConfigError(f"weighting is '{self.method}'; expected uniform, return, advantage or top")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"weighting temperature is {self.temperature}; expected a positive number, e.g. 0.1")


def discounted_return(rewards: np.ndarray) -> float:
    """Sum of ``DISCOUNT ** t * rewards[t]`` for rewards ``(T,)``."""
    rewards = np.asarray(rewards, np.float64)
    return float(rewards @ DISCOUNT ** np.arange(len(rewards)))


def episode_weights(method: Method, returns: np.ndarray, beginnings: np.ndarray) -> np.ndarray:
    """Weights ``(E,)`` in [0, 1] of ``return`` or ``advantage``; all 0 if the episodes do not differ.

    Args:
        method: ``return`` or ``advantage``.
        returns: ``(E,)``.
        beginnings: ``(E, D)`` first observations, read by ``advantage`` only.

    Raises:
        ConfigError: ``advantage`` with too few episodes to fit the expected return.
    """
    values = np.asarray(returns, np.float64)
    if method == "advantage":
        values = values - expected_returns(values, beginnings)
    span = np.ptp(values)
    # Below this, differences are rounding errors of the fit.
    return (
        np.zeros(len(values))
        if span < 1e-9 * max(1.0, float(np.abs(returns).max()))
        else (values - values.min()) / span
    )


def expected_returns(returns: np.ndarray, beginnings: np.ndarray) -> np.ndarray:
    """Linear least-squares prediction ``(E,)`` of the returns from the first observations ``(E, D)``.

    Raises:
        ConfigError: fewer than two episodes per coefficient.
    """
    spread = beginnings.std(axis=0)
    varying = beginnings[:, spread > 1e-6 * np.maximum(1.0, np.abs(beginnings).max(axis=0))]
    scaled = (varying - varying.mean(axis=0)) / varying.std(axis=0) if varying.shape[1] else varying
    design = np.hstack([np.ones((len(returns), 1)), scaled])
    # Directions that hardly vary (what the joints say is said by the pose again) carry no information.
    solution, _, rank, _ = np.linalg.lstsq(design, returns, rcond=1e-3)
    if len(returns) < EPISODES_PER_COEFFICIENT * rank:
        raise ConfigError(
            f"weighting by advantage fits {rank} coefficients to {len(returns)} episodes; it needs at least "
            f"{EPISODES_PER_COEFFICIENT * rank}. Collect more episodes, or weight by return."
        )
    return np.asarray(design @ solution)


def window_probabilities(
    weighting: Weighting, returns: np.ndarray, beginnings: np.ndarray, episode: np.ndarray
) -> np.ndarray | None:
    """Probability ``(W,)`` of drawing each window, None if all are alike.

    The softmax runs over windows, so longer episodes of the same weight are drawn more often, as they are without
    weighting.

    Args:
        weighting: how.
        returns, beginnings: per episode, see :func:`episode_weights`.
        episode: ``(W,)`` index of the episode of every window.

    Raises:
        ConfigError: see :func:`episode_weights`; or ``top`` selects no window.
    """
    if weighting.method == "uniform":
        return None
    if weighting.method == "top":
        values = np.asarray(returns)
        if not np.ptp(values):
            return None
        chosen = np.argsort(-values, kind="stable")[: math.ceil(TOP_SHARE * len(values))]
        # Where fewer succeed, the rest of the tenth would be failures, in the order of their files.
        chosen = chosen[values[chosen] > values.min()]
        unnormalized = np.isin(episode, chosen).astype(np.float64)
    else:
        weights = episode_weights(weighting.method, returns, beginnings)
        unnormalized = np.exp((weights[episode] - weights.max()) / weighting.temperature)
    if not unnormalized.sum():
        raise ConfigError(f"weighting '{weighting.method}' leaves no window to learn from; use another filter or mask")
    return np.asarray(unnormalized / unnormalized.sum())


def read_returns(dataset: Dataset, episodes: Sequence[EpisodeInfo]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``(E,)`` and first vector observations ``(E, D)`` (everything but images) of episodes.

    Raises:
        DatasetError: an episode is damaged, or their observations differ in size.
    """
    returns, beginnings = [], []
    for episode in episodes:
        if episode.path is None:
            raise DatasetError("this episode was not read from a file; take it from Dataset.episodes.")
        with open_episode(episode.path) as file:
            returns.append(discounted_return(file["rewards"][:]))
            vectors = [key for key in sorted(file["obs"]) if file["obs"][key].ndim == 2]
            beginnings.append(np.concatenate([file["obs"][key][0].astype(np.float64) for key in vectors]))
    if len({row.shape for row in beginnings}) > 1:
        raise DatasetError(f"{dataset.path}: the vector observations of its episodes differ in size")
    return np.array(returns), np.stack(beginnings)


def effective_share(probabilities: np.ndarray | None) -> float:
    """Kish's effective sample size as a fraction of all windows: 1 when all are alike."""
    return 1.0 if probabilities is None else float(1 / np.square(probabilities).sum() / len(probabilities))
