"""Are these policies different? Paired and unpaired comparison of finished evaluations."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.evaluation.results import Evaluation, EvaluationError, load_evaluation
from simtoreal.evaluation.statistics import (
    bonferroni,
    e_process,
    letter_display,
    paired_test,
    unpaired_p_value,
)

NOT_DISTINGUISHABLE = "not distinguishable"
# Entries of results that make another world of one that is called alike, and how they are called. Earlier versions did
# not note all of them.
WORLD_KEYS = {
    "world_model_checkpoint": "world models",
    "success_key": "--success-key",
    "observations": "--observations",
}
_DRAWS = 20_000


def load_arms(folders: Sequence[Path | str], labels: Sequence[str] = ()) -> list[Evaluation]:
    """Read the evaluations to compare and give them distinct labels.

    Raises:
        EvaluationError: fewer than two folders, a folder twice, the wrong number of labels, or labels that repeat.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise EvaluationError(f"a comparison needs at least two evaluation folders, got {len(paths)}")
    repeated = [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if repeated:
        raise EvaluationError(f"evaluation folder {repeated[0]} is given twice")
    if labels and len(labels) != len(paths):
        raise EvaluationError(f"{len(labels)} labels for {len(paths)} evaluation folders; give one each, or none")
    if labels:
        arms = [load_evaluation(path, label) for path, label in zip(paths, labels, strict=True)]
    else:
        arms = [load_evaluation(path) for path in paths]
        if len({arm.label for arm in arms}) < len(arms):
            arms = [load_evaluation(path, label) for path, label in zip(paths, _distinct_names(paths), strict=True)]
    names = Counter(arm.label for arm in arms)
    if max(names.values()) > 1:
        raise EvaluationError(f"label '{names.most_common(1)[0][0]}' is used twice; give distinct --labels")
    return arms


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Shortest endings of the paths that tell them apart, e.g. ``runA/evaluation`` and ``runB/evaluation``."""
    resolved = [path.resolve().parts for path in paths]
    for length in range(1, max(len(parts) for parts in resolved) + 1):
        names = ["/".join(parts[-length:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def compare(arms: Sequence[Evaluation], *, paired: bool = True, alpha: float = 0.05) -> dict[str, Any]:
    """Compare every pair of evaluations; the probability of *any* false claim of a difference is at most ``alpha``.

    Args:
        arms: evaluations of one task, with distinct labels.
        paired: compare on equal initial conditions (exact test on discordant pairs, e-process); otherwise Barnard's
            test, which needs more episodes for the same difference.
        alpha: error probability over all pairs together (Bonferroni).

    Returns:
        ``arms`` (world, rate, interval, letters), ``pairs`` (difference, p-values, e-value, verdict), ``notes``. No
        policy is called better than one that was evaluated elsewhere.

    Raises:
        EvaluationError: labels that are alike, different tasks or horizons, or initial conditions that cannot be
            paired.
    """
    notes = _check_comparable(arms, paired)
    couples = list(itertools.combinations(arms, 2))
    pairs = [_pair(first, second, paired) for first, second in couples]
    adjusted = bonferroni([pair["p_value"] for pair in pairs])
    for (first, second), pair, p_value in zip(couples, pairs, adjusted, strict=True):
        pair["p_adjusted"] = p_value
        better = pair["second"] if pair["difference"] > 0 else pair["first"]
        claim = "has the higher rate" if elsewhere(first, second) else "is better"
        pair["verdict"] = f"{better} {claim}" if p_value <= alpha else NOT_DISTINGUISHABLE
        if paired:
            pair["e_decided_after"] = _first_crossing(pair.pop("e_path"), len(pairs) / alpha)
    different = [(pair["first"], pair["second"]) for pair in pairs if pair["verdict"] != NOT_DISTINGUISHABLE]
    letters = letter_display({arm.label: arm.results["success_rate"] for arm in arms}, different)
    return {
        "kind": "comparison",
        "task": arms[0].task,
        "paired": paired,
        "alpha": alpha,
        "test": "exact binomial on discordant pairs" if paired else "Barnard exact",
        "arms": [
            {
                "label": arm.label,
                "folder": str(arm.folder),
                "backend": arm.backend,
                "world": arm.world,
                "letters": letters[arm.label],
                **{key: arm.results[key] for key in ("success_rate", "successes", "n", "interval")},
                "time_to_success_s": arm.results.get("time_to_success_s"),
            }
            for arm in arms
        ],
        "pairs": pairs,
        "notes": notes,
    }


def _check_comparable(arms: Sequence[Evaluation], paired: bool) -> list[str]:
    reference, notes = arms[0], []
    labels = [arm.label for arm in arms]
    if len(set(labels)) < len(labels):
        raise EvaluationError(f"the evaluations are called {labels}; give each a label of its own to compare them")
    for arm in arms[1:]:
        both = f"{reference.label} ({reference.folder}) and {arm.label} ({arm.folder})"
        if arm.task != reference.task:
            raise EvaluationError(
                f"{both} are evaluations of different tasks, '{reference.task}' and '{arm.task}'; "
                "their success rates cannot be compared"
            )
        horizons = reference.results.get("horizon"), arm.results.get("horizon")
        if None not in horizons and horizons[0] != horizons[1]:
            raise EvaluationError(f"{both} allow {horizons[0]} and {horizons[1]} steps; evaluate with the same horizon")
        if paired and arm.seeds != reference.seeds:
            common = len(set(arm.seeds) & set(reference.seeds))
            raise EvaluationError(
                f"{both} cannot be paired: of {len(reference.seeds)} and {len(arm.seeds)} initial conditions only "
                f"{common} are common. Evaluate both with the same --seed and --episodes, or compare with --unpaired"
            )
        if apart := elsewhere(reference, arm):
            notes.append(f"{both}: {apart}; the difference is not one of policies alone")
    if not paired and set(reference.seeds).intersection(*(arm.seeds for arm in arms[1:])):
        notes.append("some initial conditions are common; the paired test would be sharper")
    return notes


def elsewhere(first: Evaluation, second: Evaluation) -> str:
    """Return what differs besides the policies, worlds or the task itself, or an empty text.

    World models are told apart by what they learned: their names, which are relative to a folder, may well be alike.
    """
    worlds = f"different worlds ({first.world}, {second.world})" if first.world != second.world else ""
    details = [_another(first, second, key, name) for key, name in WORLD_KEYS.items()]
    return " and ".join(text for text in (worlds, *details, changed_task(first, second)) if text)


def _another(first: Evaluation, second: Evaluation, key: str, name: str) -> str:
    if not all(key in arm.results for arm in (first, second)) or first.results[key] == second.results[key]:
        return ""

    def shown(arm: Evaluation) -> str:
        if key == "world_model_checkpoint":
            return f"{arm.results.get('world_model', 'checkpoint')} {str(arm.results[key])[:8]}"
        return str(arm.results[key]) if arm.results[key] else "default"

    return f"different {name} ({shown(first)}, {shown(second)})"


def changed_task(first: Evaluation, second: Evaluation) -> str:
    """Return that a task of one name is not the same in both, or an empty text."""
    digests = {arm.results.get("task_digest") for arm in (first, second)}
    # Earlier versions did not note it.
    return f"different files of task '{first.task}'" if len(digests - {None}) > 1 else ""


def _pair(first: Evaluation, second: Evaluation, paired: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "first": first.label,
        "second": second.label,
        "difference": second.results["success_rate"] - first.results["success_rate"],
    }
    rng = np.random.default_rng(0)
    if paired:
        test = paired_test(first.outcomes, second.outcomes)
        path = e_process(first.outcomes, second.outcomes)
        cells = [test.both, test.neither, test.only_first, test.only_second]
        # Dirichlet(1/2, ...) over the four outcomes of a pair gives each policy the uniform prior on its own rate.
        draws = rng.dirichlet(0.5 + np.asarray(cells, dtype=np.float64), size=_DRAWS)
        differences = draws[:, 3] - draws[:, 2]
        result |= {
            "both": test.both,
            "neither": test.neither,
            "only_first": test.only_first,
            "only_second": test.only_second,
            "p_value": test.p_value,
            "e_value": float(path[-1]),
            "e_path": path,
        }
    else:
        counts = [(arm.results["successes"], arm.results["n"]) for arm in (first, second)]
        samples = [rng.beta(1 + k, 1 + n - k, size=_DRAWS) for k, n in counts]
        differences = samples[1] - samples[0]
        result["p_value"] = unpaired_p_value(*counts[0], *counts[1])
    result["difference_interval"] = [float(value) for value in np.quantile(differences, [0.025, 0.975])]
    return result


def _first_crossing(path: np.ndarray, threshold: float) -> int | None:
    """Pairs after which the e-process had decided, or None."""
    crossed = np.flatnonzero(path >= threshold)
    return int(crossed[0]) + 1 if len(crossed) else None
