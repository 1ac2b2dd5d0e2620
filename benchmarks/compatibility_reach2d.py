"""Does filtering conflicting demonstrations help where operators go different ways to the same point?

    python benchmarks/compatibility_reach2d.py            # about an hour on one core; resumable

Gandhi et al. 2022 use a point in a plane; here it is the Panda in MuJoCo (task reach2d). Base: 20 demonstrations that
go up, then right. Added: 20 that go right, then up. On the way straight to the goal stands a place that must not be
entered (``pillar``): the mean of the two ways goes through it. Policies see the position of the end effector and the
goal, one step, as in the paper; the observed lag of the controller would tell them the previous action.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compatibility_study import (
    STATE_KEYS,
    Outcomes,
    demonstrate,
    join,
    make_filters,
    run_arms,
    run_study,
    scorer_of,
)

from simtoreal.data_collection.operator_style import STYLES
from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import load_task, parse_task
from simtoreal.policies.config import AugmentationConfig, BCConfig, DiffusionConfig, PolicyConfig

EPISODES, GOALS, SEEDS = 20, 200, 5
STEPS = 1500
_COMMON: dict[str, Any] = {
    "observation_steps": 1, "image_keys": (), "state_keys": STATE_KEYS,
    "augmentation": AugmentationConfig(state_noise=0.0),
}  # fmt: skip
POLICIES: dict[str, PolicyConfig] = {
    # The paper's policy is a perceptron trained by squared error that decides anew at every step.
    "bc": BCConfig(horizon=1, execute_steps=1, hidden=256, layers=2, loss="l2", **_COMMON),
    "diffusion": DiffusionConfig(
        horizon=4, execute_steps=2, unet_widths=(32, 64), condition_width=128, noise_samples=2, **_COMMON
    ),
}


def pillar_task() -> TaskSpec:
    """``reach2d`` with a keep-out place of 3 cm radius on the way straight to the goal."""
    content = load_task("reach2d").to_dict()
    content |= {"name": "reach2d_pillar", "failure": "at(tcp, pillar, 0.03)"}
    content["objects"]["pillar"] = {"shape": "point", "size_m": [0.03], "color": "red"}
    content["initial"] = {
        "goal": {"x_m": [0.45, 0.45], "y_m": [-0.2, -0.13], "z_m": [0.36, 0.43]},
        "pillar": {"x_m": [0.45, 0.45], "y_m": [-0.07, -0.07], "z_m": [0.32, 0.32]},
    }
    return parse_task(content, "reach2d_pillar")


def run_seed(folder: Path, seed: int) -> tuple[Outcomes, dict[str, Any]]:
    """Data, filters and arms of one seed; outcomes by (policy, arm), and what the filters kept."""
    first, task = 10_000 * seed, pillar_task()
    base = demonstrate(folder / "base", task, "up_right", EPISODES, first, position=True)
    added = demonstrate(folder / "right_up", task, "right_up", EPISODES, first + 1000, position=True)
    everything = join(folder / "everything", base, added)
    kept = make_filters(everything, scorer_of(base, "mlp", seed), ("box", "random"), "mlp", seed)
    outcomes = run_arms(
        folder, base, everything, POLICIES, seed=seed, steps=STEPS, episodes=GOALS, task=task, position=True
    )  # fmt: skip
    return outcomes, kept


def notes(reports: list[dict[str, Any]]) -> str:
    """How it was measured, and which share of the steps each seed's filter calls bad."""
    flagged = [
        {row["operator"] + (" (base)" if row["base"] else ""): row["bad_share"] for row in kept["box"]["operators"]}
        for kept in reports
    ]
    return (
        f"scorer, training and {GOALS} goals; policies trained for {STEPS} steps. Rows with a difference: interval "
        "from resampling seeds, then goals; exact paired p-value over all goals. Share of bad steps per seed: "
        f"{flagged}."
    )


if __name__ == "__main__":
    run_study(
        "compatibility_reach2d",
        "Does filtering conflicting demonstrations help where operators go different ways to the same point?",
        __doc__,
        run_seed,
        POLICIES,
        settings={
            "episodes": EPISODES,
            "goals": GOALS,
            "steps": STEPS,
            "task": pillar_task(),
            "operators": [STYLES["up_right"], STYLES["right_up"]],
        },
        seeds=SEEDS,
        notes=notes,
    )
