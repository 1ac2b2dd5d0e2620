"""Behavioural diversity (D3IL, Jia et al. 2024): which of the ways to do a task were taken, and how evenly.

A task lists its choices in ``behaviors``; a behaviour is one label per choice, read from the log of poses. The entropy
of the behaviours of successful episodes, to the base of their number, is 0 for a single way and 1 for all alike.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.predicates import SceneView
from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import parse_task

Behavior = tuple[str, ...]

# Share of the success rate in the score that selects models (D3IL, appendix); the rest is the entropy's.
SUCCESS_SHARE = {"avoid": 0.8}
DEFAULT_SUCCESS_SHARE = 0.5
_ROW_EPSILON = 1e-12


def behaviors(task: TaskSpec) -> list[Behavior]:
    """All behaviours of a task: every combination of one label per choice.

    Raises:
        ConfigError: the task has no choices.
    """
    if not getattr(task, "behaviors", None):  # Tasks of foreign environments have none at all.
        raise ConfigError(
            f"task '{task.name}' says nothing about behaviours; add 'behaviors' to its file, "
            "as in configs/tasks/avoid.yaml"
        )
    return list(itertools.product(*task.behaviors.values()))


def pose_log(task: TaskSpec, proprio: np.ndarray, object_state: np.ndarray) -> SceneView:
    """View logged observations as scenes, one per control step.

    Args:
        task: names the columns of ``object_state``.
        proprio: ``(T, 20)``, see docs/interface.md.
        object_state: ``(T, D)``.
    """
    proprio, object_state = np.asarray(proprio, np.float64), np.asarray(object_state, np.float64)
    positions, quaternions, openings, column = {"tcp": proprio[:, :3]}, {}, {}, 0
    for item in task.objects:
        positions[item.name] = object_state[:, column : column + 3]
        quaternions[item.name] = object_state[:, column + 3 : column + 7]
        column += 7
        if item.articulated:
            openings[item.name] = object_state[:, column]
            column += 1
    return SceneView(positions, quaternions, {}, openings, {}, proprio[:, 12])


def label_behavior(task: TaskSpec, proprio: np.ndarray, object_state: np.ndarray) -> Behavior | None:
    """Behaviour of an episode: per choice, the label whose predicate held first. None if a choice was never made.

    Args:
        task: with ``behaviors``.
        proprio, object_state: as for :func:`pose_log`.
    """
    scene, labels = pose_log(task, proprio, object_state), []
    for predicates in task.behavior_predicates.values():
        held = {label: np.flatnonzero(predicate(scene)) for label, predicate in predicates.items()}
        first = {label: int(steps[0]) for label, steps in held.items() if len(steps)}
        if not first:
            return None
        labels.append(min(first, key=lambda label: first[label]))
    return tuple(labels)


def unconditional_entropy(counts: Sequence[int] | np.ndarray, *, miller_madow: bool = False) -> float:
    """Entropy of the behaviours of all successes, in [0, 1].

    Args:
        counts: ``(B,)`` successes per behaviour; 0 successes give 0.
        miller_madow: add (m - 1) / 2n for m behaviours seen in n successes, the first-order correction of the bias
            that small samples have (Miller 1955); at most 1.
    """
    total = int(np.sum(counts))
    return _entropy(np.asarray(counts, float) / max(total, 1), total if miller_madow else 0)


def conditional_entropy(counts: np.ndarray, rollouts: int, *, miller_madow: bool = False) -> float:
    """Mean over contexts of the entropy of the behaviours from that context, in [0, 1].

    In D3IL's order: counts are divided by the number of rollouts, then rows are normalised. A context without
    successes contributes 0, so failures lower the result.

    Args:
        counts: ``(S, B)`` successes per context and behaviour.
        rollouts: per context, successful or not.
        miller_madow: as for :func:`unconditional_entropy`, per context.
    """
    counts = np.asarray(counts, float)
    rates = counts / rollouts
    rows = rates / (rates.sum(axis=1, keepdims=True) + _ROW_EPSILON)
    totals = counts.sum(axis=1).astype(int) if miller_madow else np.zeros(len(counts), int)
    return float(np.mean([_entropy(row, int(total)) for row, total in zip(rows, totals, strict=True)]))


def _entropy(shares: np.ndarray, successes: int) -> float:
    seen = shares[shares > 0]
    nats = -float((seen * np.log(seen)).sum())
    if successes:
        nats += (len(seen) - 1) / (2 * successes)
    return min(1.0, max(0.0, nats / math.log(len(shares))))


def composite_score(task: str, success_rate: float, entropy: float) -> float:
    """D3IL's score for selecting models: 0.8 success + 0.2 entropy for ``avoid``, half of each otherwise."""
    share = SUCCESS_SHARE.get(task, DEFAULT_SUCCESS_SHARE)
    return share * success_rate + (1 - share) * entropy


def count_behaviors(task: TaskSpec, found: Sequence[Behavior | None]) -> np.ndarray:
    """``(B,)`` how often each of :func:`behaviors` occurs; None is not counted."""
    counter = Counter(found)
    return np.array([counter[behavior] for behavior in behaviors(task)])


def dataset_diversity(dataset: Dataset, mask: str | None = None) -> dict[str, Any]:
    """Entropy of the behaviours of a dataset's successful episodes.

    Args:
        dataset: of one task.
        mask: which episodes, e.g. the name of a filter; None for all.

    Returns:
        ``entropy``, ``entropy_miller_madow``, ``episodes``, ``successes``, ``unlabelled`` (successes that made no
        choice), ``behaviors`` (number), ``seen`` (number), ``counts`` ("left/middle/..." -> successes).

    Raises:
        ConfigError: the task names no behaviours.
        DatasetError: several tasks, or episodes without proprio and object_state.
    """
    task = parse_task(dataset.task, source=str(dataset.path))
    names = [join(behavior) for behavior in behaviors(task)]
    chosen = dataset.filter(mask)
    found = []
    for episode in chosen:
        if not episode.success:
            continue
        arrays = dataset.read(episode, ["obs/proprio", "obs/object_state"])
        if len(task.object_state_names) != arrays["obs/object_state"].shape[1]:
            raise DatasetError(
                f"{episode.path}: obs/object_state has {arrays['obs/object_state'].shape[1]} columns, task "
                f"'{task.name}' has {len(task.object_state_names)}; the episode belongs to another version of the task"
            )
        found.append(label_behavior(task, arrays["obs/proprio"], arrays["obs/object_state"]))
    counts = count_behaviors(task, found)
    return {
        "entropy": unconditional_entropy(counts),
        "entropy_miller_madow": unconditional_entropy(counts, miller_madow=True),
        "episodes": len(chosen),
        "successes": len(found),
        "unlabelled": found.count(None),
        "behaviors": len(counts),
        "seen": int((counts > 0).sum()),
        "counts": {name: int(count) for name, count in zip(names, counts, strict=True) if count},
    }


def join(behavior: Behavior) -> str:
    """Behaviour as text, ``"left/middle/far_right"``."""
    return "/".join(behavior)
