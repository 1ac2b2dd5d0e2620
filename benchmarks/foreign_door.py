"""Human demonstrations of a robot that simtoreal does not know, from the file to a success rate.

    python benchmarks/foreign_door.py --data adroit_door_human.hdf5     # resumable; eight minutes per seed on one core

Twenty-five demonstrations of a person opening a door with the Adroit hand (Rajeswaran et al., RSS 2018). The recorded
actions are replayed open loop from the recorded starts; then a diffusion policy is trained on the observations and
evaluated in AdroitHandDoor-v1 of gymnasium-robotics, for as long as the demonstrations last and for the registered
length. Everything but the replay is the commands that docs/datasets.md shows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from interleaved import write_benchmark

from simtoreal import cli
from simtoreal.data_collection.dataset import META, Dataset
from simtoreal.envs.gymnasium_env import GymnasiumVectorEnv
from simtoreal.evaluation.results import RESULTS_FILE, load_evaluation
from simtoreal.evaluation.statistics import posterior_interval

ENV, CONTROL_HZ, EPISODES, STEPS, BATCH = "AdroitHandDoor-v1", 100, 100, 4000, 128
HORIZONS = (300, 200)


def replay(dataset: Dataset) -> list[bool]:
    """Which recorded action sequences still open the door from their recorded start."""
    env = GymnasiumVectorEnv(ENV, 1, embodiment=dataset.embodiment, keys={"state": (39,)}, horizon=max(HORIZONS))
    opened = []
    for episode in dataset.episodes:
        constants = episode.extra["constants"]
        start = {key: np.array(constants[f"initial_state/{key}"]) for key in ("qpos", "qvel", "door_body_pos")}
        env.reset(seed=0, options={"initial_state_dict": start})
        for action in dataset.read(episode, ["actions"])["actions"]:
            *_, terminated, truncated, info = env.step(action[None])
            if terminated[0] or truncated[0]:
                break
        opened.append(bool(info["success"][0]))
    env.close()
    return opened


def measure(data: Path, seed: int, horizon: int, output: Path) -> list[bool]:
    """Train and evaluate, or read what is there; successes in the order of the initial conditions."""
    run = output / f"run_{seed}"
    if not (run / "results.json").is_file():
        settings = ["--steps", str(STEPS), "--trainer.batch-size", str(BATCH), "--seed", str(seed)]
        cli.run(["train", "--data", str(data), "--policy", "diffusion", *settings, "--output", str(run), "--resume"])
    folder = output / f"evaluation_{seed}_{horizon}"
    if not (folder / RESULTS_FILE).is_file():
        cli.run(["evaluate", "--policy", str(run), "--env", ENV, "--horizon", str(horizon), "--episodes", str(EPISODES),
                 "--num-envs", "25", "--videos", "0", "--output", str(folder)])  # fmt: skip
    return load_evaluation(folder).outcomes


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="adroit_door_human.hdf5")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_foreign_door"))
    options = parser.parse_args()
    begin = time.perf_counter()
    data = options.output / "data"
    if not (data / META).is_file():
        cli.run(["data", "import", str(options.data), "--output", str(data), "--control-hz", str(CONTROL_HZ)])
    opened = replay(Dataset.open(data))
    outcomes = {
        horizon: [measure(data, seed, horizon, options.output) for seed in range(options.seeds)] for horizon in HORIZONS
    }
    rows = {"recorded actions, open loop": [opened]}
    rows |= {f"diffusion policy, {horizon} steps": per_seed for horizon, per_seed in outcomes.items()}
    arms = []
    for name, per_seed in rows.items():
        flat = np.concatenate(per_seed)
        arms.append({
            "name": name, "value": float(flat.mean()), "n": len(flat),
            "interval": list(posterior_interval(int(flat.sum()), len(flat))),
            "per seed": " ".join(f"{np.mean(one):.2f}" for one in per_seed),
        })  # fmt: skip
    ours, base = arms[1], arms[0]
    write_benchmark(
        "foreign_door",
        "Can human data of an unknown robot be imported, learned from, and evaluated in their own environment?",
        {
            "metric": "success", "ours": ours["value"], "baseline": base["value"],
            "baseline_name": "recorded actions", "ratio": None, "difference": ours["value"] - base["value"],
            "interval": None, "n": ours["n"], "p_value": None,
        },
        arms,
        seconds=time.perf_counter() - begin,
        seeds=list(range(options.seeds)),
        notes=(
            f"25 demonstrations of 223 to 300 steps at {CONTROL_HZ} Hz; {STEPS} steps of batch {BATCH}. The registered "
            f"length of 200 steps ends many attempts early. {EPISODES} initial conditions per training seed, the same "
            "for all; intervals pool the seeds and know rollout noise only. The simulator changed since the data were "
            "recorded, which is why most recorded actions no longer open the door."
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
