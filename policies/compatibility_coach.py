"""Coaches a demonstrator by the compatibility with base data, live and after each demonstration."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from simtoreal.data_collection.coaching import Review, Snippet, closest_stretch, worst_moments
from simtoreal.data_collection.compatibility import STATIC, Scores, Thresholds
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays
from simtoreal.envs.errors import DatasetError
from simtoreal.policies.compatibility_config import ScorerConfig
from simtoreal.policies.compatibility_features import episode_windows, make_features
from simtoreal.policies.compatibility_scorer import Scorer
from simtoreal.policies.compatibility_store import open_scorer


class CompatibilityCoach:
    """Implements :class:`~simtoreal.data_collection.coaching.Coach`.

    The live value is that of the sample alone, so it costs one evaluation of the ensemble. The review counts bad
    steps; when there are too many it shows the worst moments beside the closest stretch of any base demonstration of
    the same collection mode, by dynamic time warping on the scaled features.

    Args:
        scorer: trained on the base data.
        mode: how the demonstrations are collected, ``static`` or ``move``.
        thresholds: instead of the calibrated ones.

    Raises:
        DatasetError: the base data have no thresholds for this mode.
    """

    def __init__(self, scorer: Scorer, *, mode: str = STATIC, thresholds: Thresholds | None = None) -> None:
        self.scorer = scorer
        self.thresholds = thresholds or scorer.limits(mode, "the demonstration")
        same = [reference for reference in scorer.references if reference.mode == mode]
        self.references = same or list(scorer.references)
        self._recent: deque[Arrays] = deque(maxlen=scorer.features.history)

    @classmethod
    def open(
        cls,
        base: str | Path,
        *,
        encoder: str | Path | None = None,
        keys: tuple[str, ...] = (),
        config: ScorerConfig | None = None,
        mode: str = STATIC,
    ) -> CompatibilityCoach:
        """Return a coach for base data, training its scorer if there is none yet (about a minute on one core).

        Raises:
            ConfigError, DatasetError, CheckpointError: see :func:`make_features` and :func:`open_scorer`.
        """
        dataset = Dataset.open(base)
        return cls(open_scorer(dataset, make_features(dataset, keys, encoder), config), mode=mode)

    def reset(self) -> None:
        """A new demonstration begins."""
        self._recent.clear()

    def step(self, observation: Mapping[str, np.ndarray], action: np.ndarray) -> float:
        """Compatibility of one action, in [0, 1]; see :class:`~simtoreal.data_collection.coaching.Coach`.

        Raises:
            DatasetError: the observation lacks a key.
        """
        keys = self.scorer.features.keys
        missing = [key for key in keys if key not in observation]
        if missing:
            raise DatasetError(f"the coach needs observation '{missing[0]}'; got {', '.join(sorted(observation))}")
        # Copied, because environments may reuse their buffers.
        self._recent.append({key: np.array(observation[key]) for key in keys})
        padding = [self._recent[0]] * (self.scorer.features.history - len(self._recent))
        windows = {key: np.stack([row[key] for row in (*padding, *self._recent)])[None] for key in keys}
        scores = self.scorer.score_states(self.scorer.states(windows), np.asarray(action)[None])
        return float(self.thresholds.compatibility(scores)[0])

    def review(self, arrays: Arrays) -> Review:
        """Judge a finished demonstration; see :class:`~simtoreal.data_collection.coaching.Coach`."""
        if not len(arrays["actions"]):
            raise DatasetError("the demonstration has no steps; nothing to review")
        states = self.scorer.states(episode_windows(arrays, self.scorer.features))
        scores: Scores = self.scorer.score_states(states, arrays["actions"])
        bad = self.thresholds.bad(scores)
        compatibility = self.thresholds.compatibility(scores)
        tolerated = self.thresholds.tolerated(len(bad))
        accepted = int(bad.sum()) <= tolerated
        snippets = []
        if not accepted:
            # Only what counts against the demonstration is shown, worst likelihood first.
            severity = np.where(bad, scores.likelihood, 0.0)
            for start, stop in worst_moments(np.where(bad, -severity, 1.0)):
                found = closest_stretch(states[start:stop], [reference.states for reference in self.references])
                snippets.append(
                    Snippet(
                        start=start,
                        stop=stop,
                        compatibility=float(compatibility[start:stop].mean()),
                        reference_episode=self.references[found.reference].name,
                        reference_start=found.start,
                        reference_stop=found.stop,
                    )
                )
        return Review(
            accepted=accepted,
            compatibility=float(compatibility.mean()),
            bad_steps=int(bad.sum()),
            tolerance=tolerated,
            snippets=tuple(snippets),
        )
