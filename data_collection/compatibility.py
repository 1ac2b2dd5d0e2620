"""Which samples of a demonstration agree with a base policy: scores, thresholds, filters.

Gandhi et al. 2022, "Eliciting Compatible Demonstrations for Multi-Human Imitation Learning" (arXiv 2210.08073). Every
sample has two numbers, which a scorer (:mod:`simtoreal.policies.compatibility_scorer`) computes:

* ``likelihood``: squared error of the action under the base policy. The paper's name; *small* means likely.
* ``novelty``: disagreement of the ensemble about the state. *Large* means unfamiliar.

A sample is bad where something unlikely was done in a familiar state. Nothing here reads files or needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simtoreal.envs.errors import ConfigError, DatasetError, closest

LIKELIHOOD_PERCENTILE, NOVELTY_PERCENTILE = 95.0, 90.0
MOST_FLAGGED = 0.05
METHODS = ("box", "random", "good", "bad", "weighted", "line", "topbox", "leftbox", "rightbox")
STATIC, MOVING = "static", "move"


@dataclass(frozen=True)
class Scores:
    """Scores of the T samples of one episode (or of many, end to end).

    Attributes:
        likelihood: ``(T,)`` squared action error, smaller is likelier.
        novelty: ``(T,)`` disagreement of the ensemble, larger is less familiar.
    """

    likelihood: np.ndarray
    novelty: np.ndarray

    def __len__(self) -> int:
        return len(self.likelihood)

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """Scores of all parts, end to end."""
        return Scores(
            np.concatenate([part.likelihood for part in parts]), np.concatenate([part.novelty for part in parts])
        )


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What counts as unlikely and as familiar, in the units of the scores; depends on action space and scorer.

    Attributes:
        likelihood: lambda; a larger squared error is unlikely.
        novelty: eta; a smaller disagreement is familiar.
        tolerance: bad steps of a demonstration that is still accepted, however short it is.
        tolerance_share: bad steps per step of a demonstration that is still accepted, so that it may be slow.
        flagged: share of held-out base samples that these thresholds call bad.
        episodes: held-out base episodes they were calibrated on; 0 if they were given.
    """

    likelihood: float
    novelty: float
    tolerance: int = 0
    flagged: float = 0.0
    episodes: int = 0
    tolerance_share: float = 0.0

    def __post_init__(self) -> None:
        if not (self.likelihood > 0 and self.novelty >= 0 and self.tolerance >= 0 and 0 <= self.tolerance_share <= 1):
            raise ConfigError(
                f"lambda is {self.likelihood}, eta {self.novelty}, tolerance {self.tolerance} or "
                f"{self.tolerance_share} of the steps; expected lambda > 0, eta >= 0, tolerance >= 0, share in [0, 1]"
            )

    def bad(self, scores: Scores) -> np.ndarray:
        """``(T,)`` bool: unlikely and familiar (the decision box of the paper)."""
        return (scores.likelihood > self.likelihood) & (scores.novelty < self.novelty)

    def tolerated(self, steps: int) -> int:
        """Bad steps that a demonstration of ``steps`` steps may have.

        The share counts for those that are longer than the base episodes: whoever does the same more slowly is as
        often at odds with the base per step, hence more often per episode.
        """
        return max(self.tolerance, int(self.tolerance_share * steps))

    @property
    def warning(self) -> str:
        """Why calibrated thresholds should not be relied on; empty if there is no reason."""
        if self.flagged <= MOST_FLAGGED:
            return ""
        return (
            f"{100 * self.flagged:.1f} % of the base demonstrator's own held-out steps are called bad, more than "
            f"{100 * MOST_FLAGGED:.0f} %: the {self.episodes} base episodes differ too much to tell what conflicts "
            "with them. Add base episodes of one operator, or give lambda and eta"
        )

    def compatibility(self, scores: Scores) -> np.ndarray:
        """``(T,)`` in [0, 1]: ``1 - min(likelihood / lambda, 1)`` where the state is familiar, 1 elsewhere."""
        familiar = scores.novelty < self.novelty
        return np.where(familiar, 1.0 - np.minimum(scores.likelihood / self.likelihood, 1.0), 1.0)


def collection_mode(extra: dict[str, Any]) -> str:
    """Return ``"move"`` for an episode whose scene moved (``EpisodeInfo.extra``), else ``"static"``."""
    return MOVING if "motion" in extra else STATIC


def calibrate(episodes: Sequence[Scores], *, most_flagged: float = MOST_FLAGGED) -> Thresholds:
    """Thresholds from the scores of base episodes that the scorer was not trained on.

    eta is the 90th percentile of the novelty, lambda the 95th of the likelihood: what the base demonstrator disagrees
    with himself. Percentiles of few samples are optimistic, so every episode is also judged by thresholds from the
    other episodes, and lambda is raised until at most ``most_flagged`` of all samples are flagged that way. The
    tolerance is the 95th percentile of the bad steps per base episode, rounded up, or of their share if that is more.

    With few and diverse base episodes even the largest likelihood may leave more than ``most_flagged`` flagged;
    ``flagged`` says so, and :attr:`Thresholds.warning`.

    Args:
        episodes: scores of held-out base episodes of one collection mode, at least two.
        most_flagged: largest share of base samples that may be called bad.

    Raises:
        DatasetError: fewer than two episodes, or scores that are not finite.
    """
    if len(episodes) < 2 or min(len(scores) for scores in episodes) == 0:
        raise DatasetError(
            f"calibrating needs at least two base episodes with steps, got {len(episodes)}; collect more base data, or "
            "give lambda and eta"
        )
    everything = Scores.join(episodes)
    if not (np.isfinite(everything.likelihood).all() and np.isfinite(everything.novelty).all()):
        raise DatasetError("scores of the base data are not finite; the scorer diverged")
    novelty = max(float(np.percentile(everything.novelty, NOVELTY_PERCENTILE)), 1e-9)
    for percentile in (LIKELIHOOD_PERCENTILE, 97.0, 98.0, 99.0, 99.5, 100.0):
        counts = []
        for index, left_out in enumerate(episodes):
            others = Scores.join([scores for other, scores in enumerate(episodes) if other != index])
            limits = Thresholds(
                likelihood=max(float(np.percentile(others.likelihood, percentile)), 1e-9),
                novelty=max(float(np.percentile(others.novelty, NOVELTY_PERCENTILE)), 1e-9),
            )
            counts.append(int(limits.bad(left_out).sum()))
        if sum(counts) <= most_flagged * len(everything):
            break
    return Thresholds(
        likelihood=max(float(np.percentile(everything.likelihood, percentile)), 1e-9),
        novelty=novelty,
        tolerance=int(np.ceil(np.percentile(counts, 95))),
        flagged=sum(counts) / len(everything),
        episodes=len(episodes),
        tolerance_share=float(np.percentile([n / len(own) for n, own in zip(counts, episodes, strict=True)], 95)),
    )


def keep_samples(
    method: str, episodes: Sequence[Scores], thresholds: Sequence[Thresholds], *, seed: int = 0
) -> list[np.ndarray]:
    """Decide which samples of candidate episodes to keep.

    All but ``box`` are controls and ablations of the paper's code (its constants, which assume lambda = 0.4 and
    eta = 0.15, are expressed in units of the thresholds). Those with a budget keep as many samples as ``box`` does.

    * ``box``: all but the bad ones.
    * ``random``: a random sample, with box's budget (the control for the size of the data).
    * ``good``: whole episodes with the most good samples (likelihood < lambda/2 and novelty > 1.5 eta), within budget.
    * ``bad``: whole episodes with the fewest bad samples, ties by the most good ones, within budget.
    * ``weighted``: drawn within budget with probabilities w = 0.4 max(1.5 - l, 0) where n < 2/3, elsewhere
      w = 1.5 n max(2 - l, 0), with l = likelihood/lambda and n = novelty/eta.
    * ``line``: drops novelty/eta < 4/3 likelihood/lambda - 2/3.
    * ``topbox``: drops the unfamiliar (novelty > eta).
    * ``leftbox``: drops what the base does anyway (likely and familiar).
    * ``rightbox``: drops the unlikely, familiar or not.

    Args:
        method: one of ``METHODS``.
        episodes: scores of every candidate episode.
        thresholds: of every candidate episode (they depend on its collection mode).
        seed: of ``random`` and ``weighted``.

    Returns:
        One ``(T,)`` bool array per episode.

    Raises:
        ConfigError: unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown filter '{method}'. {closest(method, METHODS)}")
    if not episodes:
        return []
    pairs = list(zip(episodes, thresholds, strict=True))
    bad = [limits.bad(scores) for scores, limits in pairs]
    budget = sum(int((~flags).sum()) for flags in bad)
    # In units of the thresholds, which may differ between episodes.
    unlikely = [scores.likelihood / limits.likelihood for scores, limits in pairs]
    novel = [scores.novelty / max(limits.novelty, 1e-9) for scores, limits in pairs]
    if method == "box":
        return [~flags for flags in bad]
    if method in ("random", "weighted"):
        flat, strange = np.concatenate(unlikely), np.concatenate(novel)
        weight = np.ones(len(flat))
        if method == "weighted":
            inside = 0.4 * np.maximum(1.5 - flat, 0.0)
            weight = np.where(strange < 2 / 3, inside, 1.5 * strange * np.maximum(2.0 - flat, 0.0))
        return _draw(weight, budget, [len(scores) for scores in episodes], seed)
    if method in ("good", "bad"):
        good = [int(((u < 0.5) & (n > 1.5)).sum()) for u, n in zip(unlikely, novel, strict=True)]
        wrong = [int(flags.sum()) for flags in bad]
        order = sorted(range(len(episodes)), key=lambda i: (-good[i],) if method == "good" else (wrong[i], -good[i]))
        return _whole_episodes(order, budget, [len(scores) for scores in episodes])
    drop = {
        "line": lambda u, n: n < 4 / 3 * u - 2 / 3,
        "topbox": lambda u, n: n > 1,
        "leftbox": lambda u, n: (u <= 1) & (n < 1),
        "rightbox": lambda u, n: u > 1,
    }[method]
    return [~drop(u, n) for u, n in zip(unlikely, novel, strict=True)]


def _draw(weight: np.ndarray, budget: int, lengths: Sequence[int], seed: int) -> list[np.ndarray]:
    """Draw ``budget`` samples without replacement, with probabilities in proportion to ``weight``."""
    keep = np.zeros(len(weight), dtype=bool)
    count = min(budget, int((weight > 0).sum()))
    if count:
        chosen = np.random.default_rng(seed).choice(len(weight), count, replace=False, p=weight / weight.sum())
        keep[chosen] = True
    return np.split(keep, np.cumsum(lengths)[:-1])


def _whole_episodes(order: Sequence[int], budget: int, lengths: Sequence[int]) -> list[np.ndarray]:
    """Keep whole episodes in ``order`` while they fit into ``budget`` samples."""
    keep = [np.zeros(length, dtype=bool) for length in lengths]
    for index in order:
        if lengths[index] > budget:
            break
        budget -= lengths[index]
        keep[index][:] = True
    return keep


def detection_auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: chance that a positive sample scores above a negative one (ties count half).

    Args:
        score: ``(T,)``.
        positive: ``(T,)`` bool.

    Raises:
        ConfigError: one of the two classes is empty.
    """
    positive = np.asarray(positive, dtype=bool)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        raise ConfigError(f"AUC needs samples of both kinds, got {positives} positive and {negatives} negative")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank = (last - (counts - 1) / 2)[inverse]  # Average rank of equal scores, from 1.
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
