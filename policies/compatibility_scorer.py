"""Scores samples of demonstrations by an ensemble that was trained on base data (arXiv 2210.08073, §4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simtoreal.data_collection.compatibility import Scores, Thresholds, calibrate, collection_mode
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo
from simtoreal.data_collection.filters import action_digest
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError
from simtoreal.policies.compatibility_config import ScorerConfig
from simtoreal.policies.compatibility_features import (
    Features,
    action_names,
    episode_windows,
    scale_names,
    scale_units_known,
)
from simtoreal.policies.compatibility_networks import ENSEMBLES, Ensemble, train_ensembles
from simtoreal.policies.normalization import ACTIONS, Statistics, fit_statistics, has_known_units

# Scaled states this far outside of the base data are all equally unfamiliar.
LARGEST_STATE = 5.0
# Errors of an action dimension are measured in units of what the base data disagree with themselves, at least this.
SMALLEST_NOISE = 0.05


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A base episode.

    Attributes:
        name, operator, mode: of the episode.
        digest: of its actions; tells whether a candidate is this very episode.
        states: float32 ``(T, F)``, scaled.
    """

    name: str
    operator: str
    mode: str
    digest: str
    states: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A trained scorer.

    Attributes:
        config: how it was made.
        features: what it sees.
        embodiment: of base data and candidates.
        ensemble: the networks.
        state_statistics, action_statistics: scales; None for actions in [-1, 1].
        weights: float32 ``(A,)`` of the dimensions in the likelihood, mean 1.
        thresholds: collection mode -> thresholds.
        references: the base episodes.
        base: path of the base data, for messages.
    """

    config: ScorerConfig
    features: Features
    embodiment: Embodiment
    ensemble: Ensemble
    state_statistics: Statistics
    action_statistics: Statistics | None
    weights: np.ndarray
    thresholds: dict[str, Thresholds]
    references: tuple[Reference, ...]
    base: str

    def states(self, windows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Scaled states float32 ``(B, F)`` of observation windows ``(B, history, ...)``."""
        return scale_states(self.features.extract(windows), self.state_statistics)

    def score_states(self, states: np.ndarray, actions: np.ndarray) -> Scores:
        """Scores of scaled states ``(B, F)`` and recorded actions ``(B, A)``."""
        errors, novelty = self.errors(states, actions)
        return Scores((errors * self.weights).mean(-1), novelty)

    def errors(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squared action errors ``(B, A)`` and novelty ``(B,)``."""
        device = self.ensemble.network.weights[0].device
        with torch.inference_mode():
            tensors = (torch.from_numpy(states), torch.from_numpy(scale_actions(actions, self.action_statistics)))
            errors, novelty = self.ensemble.scores(*(tensor.to(device) for tensor in tensors))
        return errors.cpu().numpy(), novelty.cpu().numpy()

    def score(self, arrays: Mapping[str, np.ndarray]) -> Scores:
        """Scores of an episode with arrays ``actions`` and ``obs/<key>``."""
        return self.score_states(self.states(episode_windows(arrays, self.features)), arrays["actions"])

    def limits(self, mode: str, where: str) -> Thresholds:
        """Thresholds of a collection mode.

        Raises:
            DatasetError: the base data have too few episodes of this mode.
        """
        if mode not in self.thresholds:
            raise DatasetError(
                f"{where} was collected in the mode '{mode}', but the base data {self.base} hold fewer than two such "
                f"episodes (modes with thresholds: {', '.join(sorted(self.thresholds)) or 'none'}). Moving scenes "
                "look novel to a scorer of still ones, whose thresholds then accept much that conflicts. Add "
                f"'{mode}' episodes of the base operator to the base data, or give --lambda and --eta."
            )
        return self.thresholds[mode]


def scale_states(states: np.ndarray, statistics: Statistics) -> np.ndarray:
    """Percentiles of the base data to [-1, 1]; what is far outside stays outside."""
    centre, half = (statistics.high + statistics.low) / 2, (statistics.high - statistics.low) / 2
    return np.clip((states - centre) / half, -LARGEST_STATE, LARGEST_STATE).astype(np.float32)


def scale_actions(actions: np.ndarray, statistics: Statistics | None) -> np.ndarray:
    """Actions in [-1, 1], clipped."""
    if statistics is not None:
        centre, half = (statistics.high + statistics.low) / 2, (statistics.high - statistics.low) / 2
        actions = (actions - centre) / half
    return np.clip(actions, -1.0, 1.0).astype(np.float32)


def require_same_task(base: Dataset, tasks: Iterable[str], name: str) -> None:
    """Refuse to compare demonstrations of different tasks.

    Args:
        base: base data.
        tasks: names of the tasks of what is compared with them.
        name: of what is compared, for the message.

    Raises:
        DatasetError: the base data are of several tasks, or not of these.
    """
    known = {episode.task for episode in base.episodes}
    if len(known) > 1:
        raise DatasetError(
            f"{base.path}: holds several tasks ({', '.join(sorted(known))}); what fits can be told for one task only. "
            "Give base data of one task."
        )
    if known and (other := set(tasks) - known):  # no episodes at all are refused by what learns from them
        raise DatasetError(
            f"{name}: is of task {', '.join(sorted(other))}, and the base data {base.path} of {', '.join(known)}"
        )


def base_episodes(dataset: Dataset) -> list[EpisodeInfo]:
    """The episodes that a scorer learns from: the successful ones.

    Raises:
        DatasetError: fewer than two.
    """
    chosen = [episode for episode in dataset.episodes if episode.success and episode.steps > 0]
    if len(chosen) < 2:
        raise DatasetError(f"{dataset.path}: base data need at least two successful episodes, found {len(chosen)}")
    return chosen


def fit_scorer(
    dataset: Dataset, features: Features, config: ScorerConfig | None = None, *, device: str | torch.device = "cpu"
) -> Scorer:
    """Train a scorer on base data and calibrate its thresholds on data held out from it.

    The episodes are dealt into ``config.folds`` parts. One ensemble learns from everything and is the scorer; one per
    part learns from the other parts, and what it says of its part is what the thresholds of :func:`calibrate` follow
    from, separately per collection mode. All of them are trained at once.

    Raises:
        DatasetError: too few base episodes, or an episode is damaged.
    """
    config = config or ScorerConfig()
    episodes = base_episodes(dataset)
    states, actions, references = [], [], []
    for episode in episodes:
        arrays = dataset.read(episode, ["actions", *[f"obs/{key}" for key in features.keys]])
        states.append(features.extract(episode_windows(arrays, features)))
        actions.append(arrays["actions"])
    joined_states, joined_actions = np.concatenate(states), np.concatenate(actions)
    names = scale_names(features, dataset.embodiment, joined_states.shape[1])
    known = scale_units_known(features, dataset.embodiment)
    state_statistics = fit_statistics(joined_states, names, "features", known_units=known)
    action_statistics = None
    if dataset.embodiment.action.mode != "ee_delta":
        action_statistics = fit_statistics(
            joined_actions, action_names(dataset.embodiment), ACTIONS,
            known_units=has_known_units(dataset.embodiment, ACTIONS),
        )  # fmt: skip
    states = [scale_states(part, state_statistics) for part in states]
    for episode, part, own in zip(episodes, states, actions, strict=True):
        references.append(
            Reference(
                name=episode.name, operator=episode.operator, mode=collection_mode(episode.extra),
                digest=action_digest(own), states=part,
            )
        )  # fmt: skip
    fold = _deal([reference.mode for reference in references], config.folds, config.seed)
    owner = np.repeat(np.arange(len(episodes)), [len(part) for part in states])
    parts = range(int(fold.max()) + 1)
    rows = [np.arange(len(owner)), *[np.flatnonzero(fold[owner] != part) for part in parts]]
    tensors = (
        torch.from_numpy(np.concatenate(states)),
        torch.from_numpy(scale_actions(joined_actions, action_statistics)),
    )
    trained = train_ensembles(config, *tensors, rows, torch.device(device))
    ensembles = []
    for index in range(len(rows)):
        one = ENSEMBLES[config.kind](config, config.members, tensors[0].shape[1], tensors[1].shape[1])
        one.load_state_dict(trained.members(range(index * config.members, (index + 1) * config.members)))
        ensembles.append(one.to(device).eval().requires_grad_(False))
    scorer = Scorer(
        config=config, features=features, embodiment=dataset.embodiment, ensemble=ensembles[0],
        state_statistics=state_statistics, action_statistics=action_statistics,
        weights=np.ones(joined_actions.shape[1], np.float32), thresholds={},
        references=tuple(references), base=str(dataset.path),
    )  # fmt: skip
    held_out = [
        dataclasses.replace(scorer, ensemble=ensembles[1 + fold[index]]).errors(states[index], actions[index])
        for index in range(len(episodes))
    ]
    # When a gripper closes, or how fast a wrist turns, is less certain than where the hand goes.
    noise = np.concatenate([errors for errors, _ in held_out]).mean(0)
    weights = 1 / (noise + SMALLEST_NOISE**2)
    weights = (weights / weights.mean()).astype(np.float32)
    scores = [Scores((errors * weights).mean(-1), novelty) for errors, novelty in held_out]
    thresholds = {}
    for mode in sorted({reference.mode for reference in references}):
        own_scores = [one for one, reference in zip(scores, references, strict=True) if reference.mode == mode]
        if len(own_scores) >= 2:
            thresholds[mode] = calibrate(own_scores)
    return dataclasses.replace(scorer, weights=weights, thresholds=thresholds)


def _deal(modes: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Part of every episode, ``(E,)``: shuffled, then dealt out mode by mode, so that parts are alike."""
    order = np.random.default_rng(seed).permutation(len(modes))
    order = order[np.argsort(np.asarray(modes)[order], kind="stable")]
    fold = np.empty(len(modes), dtype=int)
    fold[order] = np.arange(len(modes)) % min(folds, len(modes))
    return fold
