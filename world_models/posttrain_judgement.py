"""Did post-training help, or did the generator learn to please the model that gave the reward?

Whole episodes that nothing was trained on are imagined before and after. What counts are judges that had no say in the
training: another inverse-dynamics model, and the true displacement that a probe sees. If only the rewarding model is
pleased, that is reward hacking, and it is said.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simtoreal.evaluation.bootstrap import mean_with_interval
from simtoreal.policies.inverse_dynamics import predict_windows
from simtoreal.world_models import measure
from simtoreal.world_models.action_following import clip_pairs
from simtoreal.world_models.clips import Clips
from simtoreal.world_models.evaluate import Judges
from simtoreal.world_models.inverse_reward import InverseReward
from simtoreal.world_models.positions import decode_positions

# Measure -> whether more of it is better.
BETTER = {"training_reward": True, "held_out_reward": True, "psnr_db": True}
HELD_OUT = "held_out_reward"
# A bootstrap of fewer episodes calls two equal signs a certain difference.
FEWEST_EPISODES = 10


def score_clips(real: Clips, videos: Clips, judges: Judges, rewards: dict[str, InverseReward]) -> dict[str, np.ndarray]:
    """Return one value ``(E,)`` per episode for every measure.

    Args:
        real, videos: of the same episodes.
        judges: probe and truth.
        rewards: ``training_reward`` and ``held_out_reward``.
    """
    found: dict[str, np.ndarray] = {}
    for name, reward in rewards.items():
        pairs = clip_pairs(reward.model, videos)
        read = predict_windows(reward.model, pairs)
        found[name] = reward.of_clips(videos, read, pairs.actions, pairs.episode_of_window)
    found["psnr_db"] = _per_episode(real, measure.psnr_db(real.images, videos.images))
    if judges.probe is not None:
        seen, truth = decode_positions(judges.probe, videos), judges.positions.values[real.frames]
        for column, name in enumerate(judges.positions.names):
            error = np.linalg.norm(seen[:, column] - truth[:, column], axis=-1)
            moved = measure.moved_episodes(real, truth[:, column])
            # An object that stays where it is says nothing about obedience.
            found[f"{name}_error_m"] = np.where(moved, _per_episode(real, error), np.nan)
    return found


def _per_episode(clips: Clips, values: np.ndarray) -> np.ndarray:
    """Mean over the imagined frames of every episode."""
    table = clips.table(values)[:, 1:]
    counted = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        return np.where(counted.any(1), np.nansum(table, 1) / counted.sum(1), np.nan)


def judge_change(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compare scores of the same episodes before and after.

    Returns:
        ``measures``: name -> ``before``, ``after``, ``change`` (each ``mean``, ``interval``, ``n``; paired bootstrap
        over episodes) and ``verdict`` (``better``, ``worse`` or ``not distinguishable``, the latter always with fewer
        than :data:`FEWEST_EPISODES`); ``reward_hacking``: the rewarding model is pleased more and nobody else is;
        ``verdict``: one sentence.
    """
    measures: dict[str, Any] = {}
    for name in before:
        known = np.isfinite(before[name]) & np.isfinite(after[name])
        change = mean_with_interval((after[name] - before[name])[known])
        measures[name] = {
            "before": mean_with_interval(before[name][known]), "after": mean_with_interval(after[name][known]),
            "change": change, "verdict": _verdict(change, BETTER.get(name, False)),
        }  # fmt: skip
    independent = [name for name in measures if name not in ("training_reward", "psnr_db")]
    pleased = measures["training_reward"]["verdict"] == "better"
    better = [name for name in independent if measures[name]["verdict"] == "better"]
    worse = [name for name in independent if measures[name]["verdict"] == "worse"]
    hacking = pleased and HELD_OUT not in better and not [name for name in better if name.endswith("_error_m")]
    known = measures["training_reward"]["change"]["n"]
    if known < FEWEST_EPISODES:
        text = f"{known} episodes are too few to tell; {FEWEST_EPISODES} at least are needed"
    elif hacking:
        text = "only the inverse-dynamics model that gave the reward finds the videos better: reward hacking"
    elif not better:
        text = "no judge that had no say in the training finds the videos better"
    else:
        text = f"better by {', '.join(better)}"
    if worse:
        text += f"; worse by {', '.join(worse)}"
    return {"measures": measures, "reward_hacking": bool(hacking), "verdict": text}


def _verdict(change: dict[str, Any], more_is_better: bool) -> str:
    if not change["interval"] or change["n"] < FEWEST_EPISODES:
        return "not distinguishable"
    low, high = change["interval"] if more_is_better else [-value for value in reversed(change["interval"])]
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
