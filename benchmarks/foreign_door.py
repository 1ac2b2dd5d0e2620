"""Human demonstrations of a robot that simtoreal does not know, from the file to a success rate.

    python benchmarks/foreign_door.py --data adroit_door_human.hdf5             # resumable; eight minutes on one core
    python benchmarks/foreign_door.py --data adroit_door_human.hdf5 --seeds 3   # with a result of its own

Twenty-five demonstrations of a person opening a door with the Adroit hand (Rajeswaran et al., RSS 2018). The recorded
actions are replayed open loop from the recorded starts; then a diffusion policy is trained on the observations and
evaluated in AdroitHandDoor-v1 of gymnasium-robotics, for as long as the demonstrations last and for the registered
length. Everything but the replay is the commands that docs/datasets.md shows.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import result_name, write_benchmark
from parts import Part, part

from simtoreal import cli
from simtoreal.data_collection.dataset import META, Dataset
from simtoreal.envs.gymnasium_env import GymnasiumVectorEnv
from simtoreal.evaluation.results import load_evaluation
from simtoreal.evaluation.statistics import posterior_interval
from simtoreal.policies.config import DiffusionConfig, TrainerConfig

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


def measure(source: dict[str, Any], seed: int, output: Path) -> list[Part]:
    """Train, and evaluate for every horizon, or leave what is there.

    Args:
        source: what decides the data.
        seed: of the training.
        output: gets the folders ``data``, ``run_SEED`` and ``evaluation_SEED_HORIZON``.
    """
    run = output / f"run_{seed}"
    trainer = TrainerConfig(steps=STEPS, batch_size=BATCH, seed=seed)
    settings: dict[str, Any] = {"data": source, "policy": DiffusionConfig(), "trainer": trainer}
    with part(run, settings) as trained:
        if not trained.finished:
            flags = ["--steps", str(STEPS), "--trainer.batch-size", str(BATCH), "--seed", str(seed), "--resume"]
            data = str(output / "data")
            cli.run(["train", "--data", data, "--policy", "diffusion", *flags, "--output", str(run)])
    made = [trained]
    for horizon in HORIZONS:
        folder = output / f"evaluation_{seed}_{horizon}"
        with part(folder, {**settings, "env": ENV, "horizon": horizon, "episodes": EPISODES}) as evaluated:
            if not evaluated.finished:
                flags = ["--episodes", str(EPISODES), "--num-envs", "25", "--videos", "0", "--output", str(folder)]
                cli.run(["evaluate", "--policy", str(run), "--env", ENV, "--horizon", str(horizon), *flags])
        made.append(evaluated)
    return made


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="adroit_door_human.hdf5")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_foreign_door"))
    options = parser.parse_args()
    data = options.output / "data"
    source = {"sha256": hashlib.sha256(options.data.read_bytes()).hexdigest(), "control_hz": CONTROL_HZ}
    with part(data, source) as imported:
        if not (data / META).is_file():
            cli.run(["data", "import", str(options.data), "--output", str(data), "--control-hz", str(CONTROL_HZ)])
    begin = time.perf_counter()
    opened = replay(Dataset.open(data))
    seconds, parts = time.perf_counter() - begin, [imported]
    for seed in range(options.seeds):
        parts += measure(source, seed, options.output)
    outcomes = {
        horizon: [
            load_evaluation(options.output / f"evaluation_{seed}_{horizon}").outcomes for seed in range(options.seeds)
        ]
        for horizon in HORIZONS
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
        result_name("foreign_door", parser, options, "seeds"),
        "Can human data of an unknown robot be imported, learned from, and evaluated in their own environment?",
        {
            "metric": "success", "ours": ours["value"], "baseline": base["value"],
            "baseline_name": "recorded actions", "ratio": None, "difference": ours["value"] - base["value"],
            "interval": None, "n": ours["n"], "p_value": None,
        },
        arms,
        seconds=seconds,
        parts=parts,
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
