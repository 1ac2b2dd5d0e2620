"""Does filtering conflicting demonstrations help where operators go different ways to the same point?

    python benchmarks/compatibility_reach2d.py            # about an hour on one core; resumable

Gandhi et al. 2022 use a point in a plane; here it is the Panda in MuJoCo (task reach2d). Base: 20 demonstrations that
go up, then right. Added: 20 that go right, then up. On the way straight to the goal stands a place that must not be
entered (``pillar``): the mean of the two ways goes through it. Policies see the position of the end effector and the
goal, one step, as in the paper; the observed lag of the controller would tell them the previous action.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from compatibility_study import (
    STATE_KEYS,
    arm_row,
    comparisons,
    demonstrate,
    join,
    make_filters,
    run_arm,
    scorer_of,
)
from interleaved import write_benchmark

from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import load_task, parse_task
from simtoreal.policies.config import AugmentationConfig, BCConfig, DiffusionConfig, PolicyConfig, TrainerConfig

EPISODES, GOALS, SEEDS = 20, 200, 5
STEPS = 1500
# The scorer and the pillar were chosen with seeds below 10 and goals below 1,000,000.
FIRST_TRAINING, FIRST_GOAL = 10, 5_000_000
ARMS = ("base", "naive", "random", "box", "accepted")
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


def run_seed(folder: Path, task: TaskSpec, seed: int) -> tuple[dict[tuple[str, str], list[bool]], dict[str, Any]]:
    """Data, filters and arms of one seed; outcomes by (policy, arm), and what the filters kept."""
    first = 10_000 * seed
    base = demonstrate(folder / "base", task, "up_right", EPISODES, first, position=True)
    added = demonstrate(folder / "right_up", task, "right_up", EPISODES, first + 1000, position=True)
    everything = join(folder / "everything", base, added)
    kept = make_filters(everything, scorer_of(base, "mlp", seed), ("box", "random"), "mlp", seed)
    data: dict[str, tuple[Path, dict[str, str]]] = {
        "base": (base, {}), "naive": (everything, {}), "random": (everything, {"filter": "mlp_random"}),
        "box": (everything, {"filter": "mlp_box"}), "accepted": (everything, {"mask": "mlp_box"}),
    }  # fmt: skip
    goals = range(FIRST_GOAL + 1000 * seed, FIRST_GOAL + 1000 * seed + GOALS)
    trainer = TrainerConfig(
        steps=STEPS, seed=seed, checkpoint_every=STEPS, validate_every=STEPS, log_every=STEPS, precision="fp32"
    )
    outcomes = {}
    for name, policy in POLICIES.items():
        for arm, (path, selection) in data.items():
            run = folder / f"{name}_{arm}"
            outcomes[name, arm] = run_arm(
                run, path, policy, trainer, goals, task=task, **selection, position=True
            )  # fmt: skip
            print(f"seed {seed}, {name}, {arm}: {sum(outcomes[name, arm])}/{GOALS}", flush=True)
    return outcomes, kept


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_compatibility_reach2d"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    begin = time.perf_counter()
    task = pillar_task()
    found = []
    for seed in range(FIRST_TRAINING, FIRST_TRAINING + options.seeds):
        folder = options.output / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        found.append(run_seed(folder, task, seed))
    outcomes = {key: [one[key] for one, _ in found] for key in found[0][0]}
    arms = [arm_row(f"{policy}, {arm}", outcomes[policy, arm]) for policy in POLICIES for arm in ARMS]
    tests = {
        policy: comparisons(
            {arm: outcomes[policy, arm] for arm in ARMS}, "box", ("naive", "base", "random", "accepted")
        )
        for policy in POLICIES
    }
    flagged = [
        {row["operator"] + (" (base)" if row["base"] else ""): row["bad_share"] for row in kept["box"]["operators"]}
        for _, kept in found
    ]
    gain = tests["bc"]["box - naive"]
    values = {arm["name"]: arm["value"] for arm in arms}
    write_benchmark(
        "compatibility_reach2d",
        "Does filtering conflicting demonstrations help where operators go different ways to the same point?",
        {
            "metric": "success rate, unimodal policy", "ours": values["bc, box"], "baseline": values["bc, naive"],
            "baseline_name": "all demonstrations, unfiltered", "ratio": None, **gain,
        },
        [*arms, *({"name": f"{policy}, {name}", "value": test["difference"], "n": test["n"],
                   "interval": test["interval"], "p_value": test["p_value"]}
                  for policy, rows in tests.items() for name, test in rows.items())],
        seconds=time.perf_counter() - begin,
        seeds=list(range(FIRST_TRAINING, FIRST_TRAINING + options.seeds)),
        notes=(
            f"{options.seeds} seeds, each with its own demonstrations, scorer, training and {GOALS} goals; policies "
            f"trained for {STEPS} steps. Rows with a difference: interval from resampling seeds, then goals; exact "
            f"paired p-value over all goals. Share of bad steps per seed: {flagged}."
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
