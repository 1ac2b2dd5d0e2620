"""Does a world model rank rollouts from the same start as reality does?

Group-relative reinforcement learns from nothing else: a model may know very well which scenes are hard, and still not
know which actions are good.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simtoreal.envs.errors import SimtorealError
from simtoreal.world_models.classifier import highest_threshold
from simtoreal.world_models.clips import Clips, imagine_clips
from simtoreal.world_models.vector_env import closeness
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel


def rank_rollouts(
    model: WorldModel, data: VideoData, *, most_steps: int | None = None, graded: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Imagine real rollouts under their own actions, and compare which of them succeed.

    A rollout is imagined as far as it was recorded: a success to the last of its few frames that show it, a failure to
    the end. So a model in which success comes later than it really did is judged too hard.

    Args:
        model: in evaluation mode.
        data: real episodes, several from each start; ``data.seeds`` says which belong together.
        most_steps: where a rollout of the reinforcement is cut off: success that comes later does not count, neither
            the real nor the imagined one.
        graded: whether the reinforcement rewards what comes close to success, too.
        seed: of the noise of a ``flow`` model.

    Returns:
        See :func:`compare_ranks`; and ``dropped``, the rollouts left out because their imagination was not finite.

    Raises:
        EmbodimentMismatchError: model and data are of different embodiments.
        SimtorealError: all of them were.
    """
    clips = imagine_clips(model, data, np.arange(len(data.ends)), seed=seed)
    reached = reached_probability(clips, model.config.classifier.consecutive, most_steps)
    success = data.success if most_steps is None else data.success & (data.ends - data.starts <= most_steps)
    # What the reinforcement would drop does not count here either.
    finite = np.isfinite(reached)
    if not finite.any():
        raise SimtorealError(f"none of {len(finite)} rollouts could be imagined without values that are not finite")
    found = compare_ranks(
        reached[finite], float(model.classifier.threshold), success[finite], np.array(data.seeds)[finite],
        graded=graded,
    )  # fmt: skip
    return {**found, "dropped": int((~finite).sum())}


def compare_ranks(
    reached: np.ndarray, threshold: float, success: np.ndarray, starts: np.ndarray, *, graded: bool = False
) -> dict[str, Any]:
    """Compare imagined with real outcomes of E rollouts.

    Args:
        reached: ``(E,)`` how sure the classifier gets of success, see :func:`reached_probability`.
        threshold: from which on that counts as success.
        success: ``(E,)`` bool: what really happened.
        starts: ``(E,)`` equal numbers for equal starts.
        graded: an imagined rollout that fails is worth how close to success it came.

    Returns:
        ``starts``, ``rollouts``, ``real_success`` and ``imagined_success`` (shares); ``same_start`` and
        ``other_start``: share of the pairs of a real success and a real failure in which the success reaches more (half
        where both reach the same; 0.5 is chance), with their numbers ``same_start_pairs`` and ``other_start_pairs``;
        ``advantage_correlation``: of what a rollout is worth in imagination, and of real success, both less their mean
        over the start. What cannot be computed,
        for want of successes or failures, is None.
    """
    said = reached >= threshold
    worth = closeness(reached, threshold) if graded else said
    _, start = np.unique(starts, return_inverse=True)
    same, same_pairs = _ordered(reached, success, start, same=True)
    other, other_pairs = _ordered(reached, success, start, same=False)
    return {
        "starts": int(start.max()) + 1, "rollouts": len(start),
        "real_success": float(success.mean()), "imagined_success": float(said.mean()),
        "same_start": same, "same_start_pairs": same_pairs, "other_start": other, "other_start_pairs": other_pairs,
        "advantage_correlation": _advantage_correlation(worth, success, start),
    }  # fmt: skip


def reached_probability(clips: Clips, consecutive: int, most_steps: int | None = None) -> np.ndarray:
    """Return ``(E,)``: the highest threshold at which each episode would count as a success, 0 if it is too short.

    NaN where the imagination is not finite.

    Args:
        clips: imagined episodes.
        consecutive: frames in a row that must show success.
        most_steps: later frames do not count.
    """
    found = np.zeros(len(clips.episodes))
    for row, (start, end) in enumerate(zip(clips.starts, clips.ends, strict=True)):
        # The first frame is real.
        last = end if most_steps is None else min(end, start + 1 + most_steps)
        found[row] = highest_threshold(clips.success_probability[start + 1 : last], consecutive)
    return found


def _ordered(score: np.ndarray, success: np.ndarray, start: np.ndarray, *, same: bool) -> tuple[float | None, int]:
    """Share of the pairs of a success and a failure in which the success scores higher, and how many pairs."""
    good, bad = np.flatnonzero(success), np.flatnonzero(~success)
    counted = (start[good][:, None] == start[bad][None]) == same
    if not counted.any():
        return None, 0
    difference = score[good][:, None] - score[bad][None]
    return float(((difference > 0) + 0.5 * (difference == 0))[counted].mean()), int(counted.sum())


def _advantage_correlation(worth: np.ndarray, success: np.ndarray, start: np.ndarray) -> float | None:
    rollouts = np.bincount(start)
    imagined, real = (
        values - (np.bincount(start, weights=values) / rollouts)[start] for values in (worth.astype(float), success)
    )
    if not imagined.any() or not real.any():
        return None
    return float(np.corrcoef(imagined, real)[0, 1])
