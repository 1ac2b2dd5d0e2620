"""What the benchmarks of co-training share: demonstrations, policies, outcomes in pairs, and their statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import write_benchmark
from parts import Part

import simtoreal.configs
from simtoreal.commands import cotrain
from simtoreal.data_collection.collect import CollectionPlan, collect
from simtoreal.envs import load_task, make_vector_env
from simtoreal.envs.config import build_config, read_yaml
from simtoreal.envs.embodiment import Embodiment
from simtoreal.evaluation.results import load_evaluation
from simtoreal.evaluation.statistics import paired_test, posterior_interval
from simtoreal.policies.config import DiffusionConfig, TrainerConfig
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import open_training_data
from simtoreal.world_models.config import WorldModelConfig, WorldModelTrainerConfig
from simtoreal.world_models.cotrain_measurement import World

# Settings of reinforcement and of world models were chosen on the initial conditions from 3_000_000 and from 4_000_000
# on, so these begin elsewhere. The number of demonstrations, and with it how good the base policy is, was chosen there
# for those from COLLECTION_SEED on.
FIRST_EPISODE, COLLECTION_SEED = 5_000_000, 700
RESAMPLES = 10_000

# Outcomes of an arm by training seed, on the same initial conditions in the same order.
Outcomes = dict[int, list[bool]]


def preset(name: str) -> dict[str, Any]:
    """Settings of a shipped preset of ``simtoreal cotrain``, by the name of the flag."""
    folder = Path(simtoreal.configs.__path__[0]) / "cotrain"
    content = read_yaml(folder / f"{name}.yaml")
    config = build_config(
        cotrain.Config, {"output": "-", "demonstrations": ["-"], "policy": "-", **content}, source=f"{name}.yaml"
    )
    return {key: getattr(config, key) for key in ("wovr", "rlco", "reinforcement", "measurement")}


def gpu_world_model() -> tuple[WorldModelConfig, WorldModelTrainerConfig]:
    """The shipped world model for one GPU."""
    path = Path(simtoreal.configs.__path__[0]) / "world_models" / "gpu.yaml"
    content = read_yaml(path)
    return (
        build_config(WorldModelConfig, content["model"], source=str(path)),
        build_config(WorldModelTrainerConfig, content["trainer"], source=str(path)),
    )


def demonstrate(
    folder: Path, task: str, episodes: int, seed: int, *, image_size: int = 64, randomization: str | None = None
) -> Path:
    """Collect demonstrations, unless they are there."""
    collect(
        CollectionPlan(
            output=folder, task=task, episodes=episodes, seed=COLLECTION_SEED + seed, image_size=image_size,
            randomization=randomization, workers=1,
        )
    )  # fmt: skip
    return folder


def imitate(folder: Path, data: Path, policy: DiffusionConfig, trainer: TrainerConfig, device: str | None) -> Path:
    """Train a policy, unless it is there."""
    train(policy, trainer, open_training_data(data, policy), folder, resume=True, device=device)
    return folder


def simulation(task: str, embodiment: Embodiment, num_envs: int, randomization: str = "none") -> World:
    """The simulated task as a world of co-training."""
    spec = load_task(task)
    return World(
        make=lambda: make_vector_env(spec, num_envs, embodiment=embodiment, randomization=randomization), task=spec,
        settings={"randomization": randomization},
    )  # fmt: skip


def read_outcomes(folders: Mapping[int, Path]) -> Outcomes:
    """Outcomes of finished evaluation folders by training seed; those that are missing are left out."""
    return {seed: load_evaluation(path).outcomes for seed, path in folders.items() if (path / "results.json").exists()}


def arm(name: str, outcomes: Outcomes, base: Outcomes, **further: Any) -> dict[str, Any]:
    """A row of the benchmark: success, its interval, and the paired test against ``base``."""
    flat = [success for seed in sorted(outcomes) for success in outcomes[seed]]
    rates = [float(np.mean(values)) for values in outcomes.values()]
    shared = sorted(set(outcomes) & set(base))
    difference = compare(outcomes, base) if shared and outcomes is not base else None
    return {
        "name": name, "value": float(np.mean(flat)), "n": len(flat),
        "interval": list(posterior_interval(sum(flat), len(flat))), "training_seeds": len(outcomes),
        "seed_sd": float(np.std(rates, ddof=1)) if len(rates) > 1 else None,
        "difference": difference["difference"] if difference else None,
        "difference_interval": difference["interval"] if difference else None,
        "p_value": difference["p_value"] if difference else None, **further,
    }  # fmt: skip


def compare(ours: Outcomes, base: Outcomes) -> dict[str, Any]:
    """Difference of success, with an interval that resamples training seeds, then initial conditions."""
    shared = sorted(set(ours) & set(base))
    a, b = (np.array([side[seed] for seed in shared], dtype=float) for side in (ours, base))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        rows, columns = rng.integers(len(shared), size=len(shared)), rng.integers(a.shape[1], size=a.shape[1])
        drawn.append((a - b)[rows][:, columns].mean())
    test = paired_test(*([bool(value) for value in side.ravel()] for side in (a, b)))
    return {
        "ours": float(a.mean()), "baseline": float(b.mean()), "ratio": None,
        "difference": float((a - b).mean()), "interval": np.quantile(drawn, (0.025, 0.975)).tolist(), "n": int(a.size),
        "p_value": test.p_value,
    }  # fmt: skip


def read_results(folder: Path) -> dict[str, Any]:
    """Content of ``results.json``, or nothing if the arm is not finished."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def say(name: str) -> Callable[[str], None]:
    """Print lines with the name of the arm before them."""
    return lambda text: print(f"{name}: {text}", flush=True)


def store(
    name: str, question: str, metric: str, comparison: Mapping[str, Any], baseline: str, arms: Iterable[Any],
    *, parts: list[Part], seeds: Iterable[int], notes: list[str],
) -> None:  # fmt: skip
    """Write the benchmark's JSON."""
    headline = {"metric": metric, "baseline_name": baseline, **comparison}
    path = write_benchmark(
        name,
        question,
        headline,
        list(arms),
        parts=parts,
        seeds=list(seeds),
        notes=notes,
    )
    print(f"wrote {path}")
