"""What does compatibility filtering make of demonstrations in moving scenes (MOVE)?

    python benchmarks/compatibility_move.py               # about ten minutes on one core; resumable

Episodes in moving scenes, by the base operator (compatible) and by one who approaches from the side (conflicting), are
scored by a scorer of still base data with its thresholds, and by one whose base data also hold moving episodes, with
the thresholds of each mode. Conflict is labelled as in compatibility_pick_place.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from compatibility_pick_place import (
    ABOVE,
    AGREEMENT,
    BASE,
    CONFLICT,
    FROM_SIDE,
    LABELS,
    RIGHT_Y_M,
    differences,
    half_table,
)
from compatibility_study import demonstrate, join, scorer_of
from interleaved import write_benchmark
from parts import part

from simtoreal.data_collection.compatibility import Scores, Thresholds, detection_auc
from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs.files import write_json
from simtoreal.envs.scene_motion import SCENE_MOTIONS
from simtoreal.policies.compatibility_config import ScorerConfig
from simtoreal.policies.compatibility_scorer import Scorer

EPISODES = 30
SEED = 700_000_000


def shares(scorer: Scorer, limits: Thresholds, compatible: Dataset, conflicting: Dataset) -> dict[str, Any]:
    """What the thresholds say of moving episodes."""
    task = half_table("pick_place_right", RIGHT_Y_M)
    scores, labels = [], []
    for dataset in (compatible, conflicting):
        names = ["actions", *[f"obs/{key}" for key in scorer.features.keys]]
        scores += [scorer.score(dataset.read(episode, names)) for episode in dataset.episodes]
        labels += differences(dataset, task)
    joined, label = Scores.join(scores), np.concatenate(labels)
    conflict, agree = label > CONFLICT, label < AGREEMENT
    familiar, bad = joined.novelty < limits.novelty, limits.bad(joined)
    used = familiar & (conflict | agree)
    return {
        "judged": float(familiar.mean()),
        "flagged_conflicting": float(bad[conflict].mean()),
        "flagged_compatible": float(bad[agree].mean()),
        "auc_judged": detection_auc(joined.likelihood[used], conflict[used]),
        "conflicting": int(conflict.sum()),
        "compatible": int(agree.sum()),
    }


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """Data, scorers and what they find, by the name of the arm; what was done before is read."""
    task = half_table("pick_place_right", RIGHT_Y_M)
    still = demonstrate(folder / "still", task, ABOVE, BASE, SEED)
    moving = demonstrate(folder / "moving", task, ABOVE, EPISODES, SEED + 1000, motion="move")
    both = join(folder / "both", still, moving)
    candidates = [
        Dataset.open(demonstrate(folder / "compatible", task, ABOVE, EPISODES, SEED + 2000, motion="move")),
        Dataset.open(demonstrate(folder / "conflicting", task, FROM_SIDE, EPISODES, SEED + 3000, motion="move")),
    ]
    found: dict[str, dict[str, Any]] = {}
    arms = {
        "still base, its thresholds": (still, "static"),
        "both, static thresholds": (both, "static"),
        "both, thresholds of moving scenes": (both, "move"),
    }
    for name, (base, mode) in arms.items():
        stored = folder / f"{name}.json"
        if not stored.is_file():
            scorer = scorer_of(base, "mlp", 0)
            write_json(stored, shares(scorer, scorer.thresholds[mode], *candidates))
        found[name] = json.loads(stored.read_text())
        print(name, found[name], flush=True)
    return found


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_compatibility_move"))
    options = parser.parse_args()
    settings = {
        **LABELS, "seed": SEED, "episodes": [BASE, EPISODES], "scorer": ScorerConfig(), "motion": SCENE_MOTIONS["move"],
        "task": half_table("pick_place_right", RIGHT_Y_M),
    }  # fmt: skip
    with part(options.output, settings) as made:
        options.output.mkdir(parents=True, exist_ok=True)
        found = measure(options.output)
    ours, baseline = "both, thresholds of moving scenes", "both, static thresholds"
    write_benchmark(
        "compatibility_move",
        "What does compatibility filtering make of demonstrations in moving scenes (MOVE)?",
        {
            "metric": "share of conflicting steps in moving scenes that is found",
            "ours": found[ours]["flagged_conflicting"], "baseline": found[baseline]["flagged_conflicting"],
            "baseline_name": baseline, "ratio": None,
            "difference": found[ours]["flagged_conflicting"] - found[baseline]["flagged_conflicting"],
            "interval": None, "n": found[ours]["conflicting"], "p_value": None,
        },
        [
            {"name": f"{name}: {key}", "value": row[key], "n": row["conflicting"] + row["compatible"], "interval": None}
            for name, row in found.items()
            for key in ("judged", "flagged_conflicting", "flagged_compatible", "auc_judged")
        ],
        parts=[made],
        seeds=[SEED],
        notes=(
            "One scorer seed. Shares of steps; 'judged' is the share of steps in familiar states. A scorer that never "
            "saw a moving scene finds more conflicts, at more false alarms and a lower AUC."
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
