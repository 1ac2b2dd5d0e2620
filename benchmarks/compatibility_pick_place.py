"""Are conflicting demonstrations of pick_place found, and what does leaving them out do to policies?

    python benchmarks/compatibility_pick_place.py         # about two hours on one core; resumable

Base: one operator who approaches the cube from above, on the right half of the table. Candidates: the same operator
there (compatible), another who approaches from the side there (conflicting), and the first one on the left half (new
regions). Policies are evaluated on the whole table, on state observations.

Every candidate step has a label that no scorer knows: the base operator is asked, at the very state, what he would do.
A step conflicts if the mean squared difference of the two actions exceeds 0.1 (as 0.8 in one dimension does), and is
compatible below 0.01; steps in between belong to neither. The filter is meant to keep what is new, conflict or not, so
the area under the ROC curve is given for the steps that it judges (novelty below eta) and for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from compatibility_study import (
    STATE_KEYS,
    Outcomes,
    demonstrate,
    join,
    make_filters,
    run_arms,
    run_study,
    scorer_of,
    state_env,
)

from simtoreal.data_collection.compatibility import Scores, detection_auc
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.operator_style import STYLES, OperatorStyle
from simtoreal.envs.files import write_json
from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import load_task, parse_task
from simtoreal.policies.compatibility_scorer import Scorer
from simtoreal.policies.config import BCConfig, DiffusionConfig, PolicyConfig

BASE, COMPATIBLE, CONFLICTING, NEW = 60, 20, 40, 40
ROLLOUTS, SEEDS, STEPS = 200, 3, 2000
CONFLICT, AGREEMENT = 0.1, 0.01
RIGHT_Y_M, LEFT_Y_M = (-0.15, 0.0), (0.0, 0.15)
ABOVE = STYLES["expert"]
FROM_SIDE = OperatorStyle(name="from_side", approach_height_m=0.03, approach_offset_m=(0.0, 0.15))
# What decides a detection.
LABELS = {"conflict": CONFLICT, "agreement": AGREEMENT, "base": ABOVE, "conflicting": FROM_SIDE}
POLICIES: dict[str, PolicyConfig] = {
    "bc": BCConfig(
        observation_steps=1, horizon=1, execute_steps=1, image_keys=(), state_keys=STATE_KEYS, hidden=256, layers=2,
        loss="l2",
    ),
    "diffusion": DiffusionConfig(
        observation_steps=1, horizon=8, execute_steps=4, image_keys=(), state_keys=STATE_KEYS, unet_widths=(32, 64),
        condition_width=128, noise_samples=2,
    ),
}  # fmt: skip


def half_table(name: str, y_m: tuple[float, float]) -> TaskSpec:
    """pick_place with the cube in a strip of the table."""
    content = load_task("pick_place").to_dict()
    content["name"] = name
    content["initial"]["cube"]["y_m"] = list(y_m)
    return parse_task(content, name)


def differences(dataset: Dataset, task: TaskSpec) -> list[np.ndarray]:
    """Per episode ``(T,)``: mean squared difference between what was done and what the base operator would do there.

    The base operator follows the recorded episode, so what he remembers (grasped, released) fits it.
    """
    env = state_env(task, 1)
    expert = ScriptedExpert(task, env.embodiment, style=ABOVE)
    slots, found = np.array([0]), []
    for episode in dataset.episodes:
        arrays = dataset.read(episode, ["actions", "obs/proprio", "obs/object_state"])
        expert.reset(slots, [episode.seed])
        rows = []
        for step in range(episode.steps):
            observation = {key: arrays[f"obs/{key}"][step][None, None] for key in STATE_KEYS}
            rows.append(expert.act(observation, [""], slots)[0, 0])
        found.append(((np.array(rows) - arrays["actions"]) ** 2).mean(-1))
    return found


def detection(scorer: Scorer, candidates: dict[str, tuple[Dataset, TaskSpec]]) -> dict[str, Any]:
    """How well the scorer tells conflicting from compatible candidate steps."""
    limits = scorer.thresholds["static"]
    scores, labels = [], []
    for dataset, task in candidates.values():
        names = ["actions", *[f"obs/{key}" for key in scorer.features.keys]]
        scores += [scorer.score(dataset.read(episode, names)) for episode in dataset.episodes]
        labels += differences(dataset, task)
    joined, label = Scores.join(scores), np.concatenate(labels)
    conflict, used = label > CONFLICT, (label > CONFLICT) | (label < AGREEMENT)
    familiar, bad = joined.novelty < limits.novelty, limits.bad(joined)
    judged = used & familiar
    return {
        "auc_judged": detection_auc(joined.likelihood[judged], conflict[judged]),
        "auc_all": detection_auc(joined.likelihood[used], conflict[used]),
        "conflicting": int(conflict.sum()),
        "compatible": int((used & ~conflict).sum()),
        "neither": int((~used).sum()),
        "judged_share_of_conflicting": float(familiar[conflict].mean()),
        "flagged_share_of_judged_conflicting": float(bad[conflict & familiar].mean()),
        "flagged_share_of_compatible": float(bad[used & ~conflict].mean()),
        "base_flagged": limits.flagged,
    }


def run_seed(folder: Path, seed: int) -> tuple[Outcomes, dict[str, Any]]:
    """Data, filters, detection and arms of one seed."""
    first = 100_000_000 + 100_000 * seed
    right, left = half_table("pick_place_right", RIGHT_Y_M), half_table("pick_place_left", LEFT_Y_M)
    base = demonstrate(folder / "base", right, ABOVE, BASE, first)
    pool = {
        "compatible": (demonstrate(folder / "compatible", right, ABOVE, COMPATIBLE, first + 1000), right),
        "conflicting": (demonstrate(folder / "conflicting", right, FROM_SIDE, CONFLICTING, first + 2000), right),
        "new": (demonstrate(folder / "new", left, ABOVE, NEW, first + 3000), left),
    }
    everything = join(folder / "everything", base, *(path for path, _ in pool.values()))
    report: dict[str, Any] = {}
    for kind in ("mlp", "diffusion"):
        stored = folder / f"detection_{kind}.json"
        if not stored.is_file():
            scorer = scorer_of(base, kind, seed)
            found = detection(scorer, {name: (Dataset.open(path), task) for name, (path, task) in pool.items()})
            kept = make_filters(everything, scorer, ("box", "random"), kind, seed)
            write_json(stored, {"detection": found, "kept": kept})
        report[kind] = json.loads(stored.read_text())
        print(f"seed {seed}, {kind}: {report[kind]['detection']}", flush=True)
    outcomes = run_arms(
        folder, base, everything, POLICIES, seed=seed, steps=STEPS, episodes=ROLLOUTS, task="pick_place"
    )  # fmt: skip
    return outcomes, report


def detection_rows(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Area under the ROC curve of each kind of scorer: mean and range over seeds."""
    rows = []
    for kind in ("mlp", "diffusion"):
        for area in ("auc_judged", "auc_all"):
            values = [report[kind]["detection"][area] for report in reports]
            rows.append(
                {"name": f"{kind} scorer, {area}", "value": float(np.mean(values)), "n": len(values),
                 "interval": [min(values), max(values)]}
            )  # fmt: skip
    return rows


def notes(reports: list[dict[str, Any]]) -> str:
    """How it was measured, and the detection of each seed."""
    return (
        f"scorers, training and {ROLLOUTS} rollouts; policies trained for {STEPS} steps. Rows with a difference: "
        "interval from resampling seeds, then rollouts; exact paired p-value over all rollouts. AUC: mean and range "
        f"over seeds. Detection by seed: {[report['mlp']['detection'] for report in reports]}."
    )


if __name__ == "__main__":
    run_study(
        "compatibility_pick_place",
        "Are conflicting demonstrations of pick_place found, and what does leaving them out do to policies?",
        __doc__,
        run_seed,
        POLICIES,
        settings={
            **LABELS,
            "episodes": [BASE, COMPATIBLE, CONFLICTING, NEW],
            "rollouts": ROLLOUTS,
            "steps": STEPS,
            "task": load_task("pick_place"),
            "strips": [RIGHT_Y_M, LEFT_Y_M],
        },
        seeds=SEEDS,
        notes=notes,
        more_rows=detection_rows,
    )
