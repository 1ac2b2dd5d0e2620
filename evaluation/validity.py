"""Does another world rank policies as the real one does? Agreement of two sets of success rates.

Rank violation after SIMPLER (Li et al. 2024, arXiv 2405.05941, §III): a pair of policies that is ranked wrongly counts
by how much they really differ.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from simtoreal.envs.errors import ConfigError
from simtoreal.evaluation.bootstrap import FEWEST_VALUES, interval, resample_counts

# A correlation of two points is always perfect.
FEWEST_POLICIES = 3


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's r of two vectors, NaN if one of them does not vary."""
    a, b = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 1e-12 else math.nan


def mean_maximum_rank_violation(real: np.ndarray, model: np.ndarray) -> float:
    """Return MMRV of success rates ``(K,)``: per policy the largest real difference to one that it is misranked with.

    0 is a perfect ranking.
    """
    wrong = (model[:, None] < model[None]) != (real[:, None] < real[None])
    return float(np.where(wrong, np.abs(real[:, None] - real[None]), 0.0).max(1).mean())


def policy_validity(real: np.ndarray, model: np.ndarray) -> dict[str, Any]:
    """Compare outcomes of the same policies on the same initial conditions in two worlds.

    Args:
        real: bool ``(K, N)``, success of policy k from condition n.
        model: the same in the world whose validity is asked for.

    Returns:
        ``pearson_r`` (None below three policies, or if all rates are equal), ``mean_bias`` (model minus real),
        ``mmrv``, ``agreement`` (share of single outcomes that are equal), each with a 95 % interval
        (``<name>_interval``, bootstrap over initial conditions, the same ones for all policies; None for a single
        one), ``policies`` K and ``n`` N.

    Raises:
        ConfigError: the shapes differ, or there is nothing to compare.
    """
    real, model = np.asarray(real, dtype=bool), np.asarray(model, dtype=bool)
    if real.shape != model.shape or real.ndim != 2 or not real.size:
        raise ConfigError(f"outcomes {real.shape} and {model.shape} do not fit; expected two of (policies, conditions)")
    count = real.shape[1]
    weights = resample_counts(count) / count
    rates = weights @ real.T, weights @ model.T
    same = weights @ (real == model).T
    found = {
        "pearson_r": np.array([pearson(a, b) for a, b in zip(*rates, strict=True)]),
        "mean_bias": (rates[1] - rates[0]).mean(1),
        "mmrv": np.array([mean_maximum_rank_violation(a, b) for a, b in zip(*rates, strict=True)]),
        "agreement": same.mean(1),
    }
    if len(real) < FEWEST_POLICIES:
        found["pearson_r"] = np.full(len(weights), np.nan)
    result: dict[str, Any] = {"policies": len(real), "n": count}
    for name, draws in found.items():
        result[name] = float(draws[0]) if np.isfinite(draws[0]) else None
        known = result[name] is not None and count >= FEWEST_VALUES
        result[f"{name}_interval"] = interval(draws[1:]) if known else None
    return result
