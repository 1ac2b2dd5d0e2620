"""Filters a dataset by its compatibility with base data; writes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from simtoreal.data_collection.compatibility import Scores, Thresholds, collection_mode, keep_samples
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.filters import Filter, FilteredEpisode, action_digest, check_name
from simtoreal.policies.compatibility_scorer import Scorer


def override(
    thresholds: Thresholds | None, likelihood: float | None, novelty: float | None, tolerance: int | None
) -> Thresholds | None:
    """Return the thresholds with the given values instead; None if some remain unknown.

    Raises:
        ConfigError: a value is out of range.
    """
    given = {"likelihood": likelihood, "novelty": novelty, "tolerance": tolerance}
    given = {key: value for key, value in given.items() if value is not None}
    # Who names a number means it, for long demonstrations as well.
    share = {} if tolerance is None else {"tolerance_share": 0.0}
    if thresholds is not None:
        # The flagged share belongs to the calibrated values only.
        changed = {"flagged": 0.0, "episodes": 0} if given.keys() - {"tolerance"} else {}
        return dataclasses.replace(thresholds, **given, **share, **changed)  # type: ignore[arg-type]
    if likelihood is None or novelty is None:
        return None
    return Thresholds(**given)  # type: ignore[arg-type]


def filter_dataset(
    dataset: Dataset,
    scorer: Scorer,
    *,
    name: str,
    method: str = "box",
    likelihood: float | None = None,
    novelty: float | None = None,
    tolerance: int | None = None,
    seed: int = 0,
) -> Filter:
    """Score every episode and decide which of its steps to learn from.

    Episodes that are base data themselves (merged into the dataset, say) are kept whole. A success is accepted
    when no more of its steps are bad than :meth:`Thresholds.tolerated`, whatever the method; a failure never is. A
    method with a budget has one for successes and one for failures.

    Args:
        dataset: to be filtered; only read.
        scorer: trained on the base data.
        name: of the filter.
        method: one of :data:`~simtoreal.data_collection.compatibility.METHODS`.
        likelihood, novelty, tolerance: lambda, eta and bad steps tolerated, instead of the calibrated ones.
        seed: of the methods that draw.

    Raises:
        ConfigError: wrong name, method or threshold.
        DatasetError: an episode is damaged, lacks an observation, or was collected in a mode without thresholds.
        EmbodimentMismatchError: the dataset is of another robot than the base data.
    """
    check_name(name)
    dataset.embodiment.require_equal(scorer.embodiment, f"dataset {dataset.path}", f"base data {scorer.base}")
    base = {reference.digest for reference in scorer.references}
    names = ["actions", *[f"obs/{key}" for key in scorer.features.keys]]
    scores: dict[str, Scores] = {}
    limits: dict[str, Thresholds] = {}
    own: dict[str, bool] = {}
    for episode in dataset.episodes:
        mode = collection_mode(episode.extra)
        chosen = override(scorer.thresholds.get(mode), likelihood, novelty, tolerance)
        limits[episode.name] = chosen or scorer.limits(mode, f"{dataset.path}: episode {episode.name}")
        arrays = dataset.read(episode, names)
        scores[episode.name] = scorer.score(arrays)
        own[episode.name] = action_digest(arrays["actions"]) in base
    keep: dict[str, np.ndarray] = {}
    # Apart, so that failures, which training leaves out, use up nothing of the budget of what it learns from.
    for success in (True, False):
        group = [one.name for one in dataset.episodes if one.success == success and not own[one.name]]
        kept = keep_samples(method, [scores[key] for key in group], [limits[key] for key in group], seed=seed)
        keep |= zip(group, kept, strict=True)
    episodes = {}
    for episode in dataset.episodes:
        key = episode.name
        keep.setdefault(key, np.ones(episode.steps, dtype=bool))
        bad = int(limits[key].bad(scores[key]).sum())
        episodes[key] = FilteredEpisode(
            steps=episode.steps,
            seed=episode.seed,
            operator=episode.operator,
            mode=collection_mode(episode.extra),
            base=own[key],
            compatibility=float(limits[key].compatibility(scores[key]).mean()),
            bad_steps=bad,
            kept_steps=int(keep[key].sum()),
            accepted=own[key] or (episode.success and bad <= limits[key].tolerated(episode.steps)),
        )
    settings: dict[str, Any] = {
        "method": method, "against": scorer.base, "scorer": dataclasses.asdict(scorer.config),
        "features": scorer.features.describe(), "seed": seed, "base_episodes": sorted(base),
        "given": {"lambda": likelihood, "eta": novelty, "tolerance": tolerance},
    }  # fmt: skip
    modes = {episode.mode: limits[key] for key, episode in episodes.items()}
    return Filter(
        name=name, settings=settings, thresholds={mode: dataclasses.asdict(value) for mode, value in modes.items()},
        episodes=episodes, keep=keep, scores=scores,
    )  # fmt: skip
