"""Coaching a demonstrator: what a coach says, and which moments of a demonstration it shows again.

After a rejected demonstration the worst moments are shown beside what an accepted demonstration did there (Gandhi et
al. 2022, "Eliciting Compatible Demonstrations", §4): the snippet is aligned with every accepted demonstration by
multivariate dynamic time warping on observations, and the closest stretch of any of them is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simtoreal.data_collection.episode import Arrays
from simtoreal.envs.errors import ConfigError

SNIPPETS = 3
MARGIN_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A bad moment of a demonstration, and the closest moment of an accepted one.

    Attributes:
        start, stop: control steps of the demonstration, half open.
        compatibility: mean over these steps, in [0, 1].
        reference_episode: name of the accepted episode in its dataset (``"000012"``).
        reference_start, reference_stop: control steps of that episode, half open.
    """

    start: int
    stop: int
    compatibility: float
    reference_episode: str
    reference_start: int
    reference_stop: int


@dataclass(frozen=True, kw_only=True)
class Review:
    """Verdict on a finished demonstration.

    Attributes:
        accepted: at most ``tolerance`` steps were bad.
        compatibility: mean over the demonstration, in [0, 1].
        bad_steps: familiar situations in which something unlikely was done.
        tolerance: how many of those are accepted.
        snippets: the worst moments, worst first; empty when accepted.
    """

    accepted: bool
    compatibility: float
    bad_steps: int
    tolerance: int
    snippets: tuple[Snippet, ...] = ()


class Coach(Protocol):
    """Judges a demonstration while it is made, and when it is finished."""

    def reset(self) -> None:
        """A new demonstration begins; a coach may look at earlier observations of the same one only."""

    def step(self, observation: Arrays, action: np.ndarray) -> float:
        """Return the compatibility of one action, in [0, 1].

        Args:
            observation: before the action, by key without ``obs/`` (``"proprio"``, …), no batch axis.
            action: ``(A,)`` as it is recorded.
        """

    def review(self, arrays: Arrays) -> Review:
        """Judge a finished demonstration.

        Args:
            arrays: as in an episode file: ``"actions"`` and ``"obs/<key>"``, T rows each.
        """


def worst_moments(
    compatibility: np.ndarray, count: int = SNIPPETS, margin: int = MARGIN_STEPS
) -> list[tuple[int, int]]:
    """Return the ranges ``(start, stop)`` around the least compatible steps, worst first, which do not overlap.

    Args:
        compatibility: ``(T,)`` per step; steps of 1 are never shown.
        count: most ranges.
        margin: steps before and after the worst one (card: 10 in simulation at 20 Hz).

    Raises:
        ConfigError: ``count`` or ``margin`` is negative.
    """
    if count < 0 or margin < 0:
        raise ConfigError(f"count is {count} and margin {margin}; expected at least 0")
    steps = len(compatibility)
    left = np.array(compatibility, dtype=float)
    ranges: list[tuple[int, int]] = []
    while len(ranges) < count and steps and left.min() < 1:
        worst = int(left.argmin())
        # Ends of a run of equally bad steps say less than its middle.
        stop = worst + int(np.argmax(np.append(left[worst:] > left[worst], True)))
        middle = (worst + stop - 1) // 2
        low = max([0, middle - margin, *(b for _, b in ranges if b <= middle)])
        high = min([steps, middle + margin + 1, *(a for a, _ in ranges if a > middle)])
        ranges.append((low, high))
        left[low:high] = np.inf
    return ranges


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Closest stretch of several references to a query.

    Attributes:
        reference: index of the reference.
        start, stop: its rows, half open.
        distance: sum of the distances along the warping path, divided by the length of the query.
    """

    reference: int
    start: int
    stop: int
    distance: float


def closest_stretch(query: np.ndarray, references: Sequence[np.ndarray]) -> Alignment:
    """Find the stretch of any reference that is closest to ``query`` under dynamic time warping.

    Subsequence DTW (Müller 2007, "Information Retrieval for Music and Motion", §4.4): the path may begin and end
    anywhere in the reference. All references are aligned together, one anti-diagonal at a time, because within an
    anti-diagonal nothing depends on anything; 50 references of 140 steps take milliseconds.

    Args:
        query: ``(m, D)``, dimensions scaled so that Euclidean distances between rows mean something.
        references: each ``(n, D)``.

    Raises:
        ConfigError: the query or a reference is empty, or their dimensions differ.
    """
    if query.ndim != 2 or not len(query) or not references:
        raise ConfigError(
            f"aligning needs a query of shape (m, D) and references; got {query.shape}, {len(references)}"
        )
    for index, reference in enumerate(references):
        if reference.ndim != 2 or not len(reference) or reference.shape[1] != query.shape[1]:
            raise ConfigError(f"reference {index} has shape {reference.shape}; expected (n, {query.shape[1]}), n >= 1")
    rows, longest = len(query), max(len(reference) for reference in references)
    # Skewed so that an anti-diagonal is one slice: cost[k, :, i] is the distance of query row i and row k - i.
    cost = np.full((rows + longest - 1, len(references), rows), np.inf)
    i = np.arange(rows)
    for index, reference in enumerate(references):
        squared = (query**2).sum(1)[:, None] + (reference**2).sum(1) - 2 * query @ reference.T
        j = np.arange(len(reference))
        cost[i[:, None] + j, index, i[:, None]] = np.sqrt(np.maximum(squared, 0.0))
    shape = (len(references), rows)
    before, previous = np.full(shape, np.inf), np.full(shape, np.inf)
    began_before, began = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    best, best_start, best_stop = np.full(shape[0], np.inf), np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
    for k in range(len(cost)):
        total, start = previous.copy(), began.copy()  # From the same query row, one reference row earlier.
        for earlier, origin in ((previous, began), (before, began_before)):
            better = earlier[:, :-1] < total[:, 1:]
            np.copyto(total[:, 1:], earlier[:, :-1], where=better)
            np.copyto(start[:, 1:], origin[:, :-1], where=better)
        total[:, 0], start[:, 0] = 0.0, k  # A path begins at any reference row.
        total += cost[k]
        before, previous, began_before, began = previous, total, began, start
        ended = total[:, -1] < best
        best = np.where(ended, total[:, -1], best)
        best_start = np.where(ended, start[:, -1], best_start)
        best_stop = np.where(ended, k - rows + 2, best_stop)
    winner = int(best.argmin())
    return Alignment(
        reference=winner,
        start=int(best_start[winner]),
        stop=int(best_stop[winner]),
        distance=float(best[winner] / rows),
    )
