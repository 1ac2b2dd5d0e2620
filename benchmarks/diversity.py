"""Do policies keep the ways to do a task that their demonstrations show? D3IL's avoid and align, from state.

    python benchmarks/diversity.py            # resumable; a bit more than an hour per training seed on one core
    python benchmarks/diversity.py --tasks avoid --policies bc_l2 unet --seeds 1
    python benchmarks/diversity.py --summarize    # only write the results of the trainings that are finished

Behaviour cloning with the absolute and the squared error, and diffusion with both denoisers, learn from the same
demonstrations, balanced over the ways, with the same number of windows. Contexts, rollouts and settings were fixed
beforehand; the settings were chosen on other initial conditions (from 900,000) and another training seed (7).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import write_benchmark

from simtoreal.data_collection.collect import CollectionPlan, collect
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.diversity import behaviors, dataset_diversity
from simtoreal.envs import load_task, make_vector_env
from simtoreal.evaluation.diversity import behavior_table, evaluate_diversity, read_rollouts, resample
from simtoreal.evaluation.policies import checkpoint_digest, load_actor
from simtoreal.evaluation.statistics import posterior_interval
from simtoreal.policies.config import AugmentationConfig, BCConfig, DiffusionConfig, PolicyConfig, TrainerConfig
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import open_training_data

EVALUATION_SEED = 600_000
DRAWS = 1000
# Demonstrations, contexts, rollouts per context, observations, actions executed per prediction, training steps.
# avoid: 10 demonstrations of each of 24 ways, and 480 rollouts as in D3IL's longer setting; align: 300 of each of 2
# ways (D3IL: 500), 60 x 8 rollouts. On avoid a prediction is executed whole: whoever decides again between two rows may
# decide otherwise.
TASKS: dict[str, dict[str, Any]] = {
    "avoid": {
        "episodes": 240, "contexts": 20, "rollouts": 24, "keys": ("proprio",), "execute_steps": 16, "steps": 24000,
    },
    "align": {
        "episodes": 600, "contexts": 60, "rollouts": 8, "keys": ("proprio", "object_state"), "execute_steps": 8,
        "steps": 18000,
    },
}  # fmt: skip
POLICIES = {
    "bc_l1": "bc, L1 loss",
    "bc_l2": "bc, L2 loss (MSE)",
    "unet": "diffusion, U-Net",
    "transformer": "diffusion, transformer",
}
BATCH = 64
# Few Euler steps end between two ways.
INFERENCE_STEPS = 32


def policy_config(policy: str, task: str) -> PolicyConfig:
    """Small networks on vectors: a training takes a few minutes of one core."""
    common: dict[str, Any] = {
        "image_keys": (), "state_keys": TASKS[task]["keys"], "observation_steps": 2, "horizon": 16,
        "execute_steps": TASKS[task]["execute_steps"], "augmentation": AugmentationConfig(state_noise=0.01),
    }  # fmt: skip
    if policy.startswith("bc"):
        return BCConfig(**common, hidden=256, loss="l1" if policy == "bc_l1" else "l2")
    diffusion = {"condition_width": 128, "noise_samples": 1, "inference_steps": INFERENCE_STEPS}
    if policy == "unet":
        return DiffusionConfig(**common, **diffusion, unet_widths=(64, 128))
    return DiffusionConfig(**common, **diffusion, denoiser="transformer", transformer_width=64, transformer_layers=3)


def measure(task: str, policy: str, seed: int, output: Path) -> dict[str, Any]:
    """Train and evaluate one policy, continuing what is there."""
    settings, folder = TASKS[task], output / task / f"{policy}_{seed}"
    result = folder / "evaluation" / "results.json"
    if not result.is_file():
        print(f"{task} {policy} seed {seed}", flush=True)
        config = policy_config(policy, task)
        data = open_training_data(output / task / "data", config, mask="all", hold_out=False)
        trainer = TrainerConfig(
            steps=settings["steps"],
            batch_size=BATCH,
            seed=seed,
            checkpoint_every=250,
            validate_every=100_000,
            log_every=50,
        )
        train(config, trainer, data, folder, resume=True)
        loaded, actor = load_actor(folder, device="cpu")
        env = make_vector_env(task, 60, embodiment=loaded.embodiment, observe="state")
        contexts = range(EVALUATION_SEED, EVALUATION_SEED + settings["contexts"])
        try:
            evaluate_diversity(
                env, actor, contexts, settings["rollouts"], folder / "evaluation",
                {"task": task, "label": policy, "checkpoint": checkpoint_digest(loaded.folder)},
            )  # fmt: skip
        finally:
            env.close()
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def finished(task: str, policy: str, seeds: int, output: Path) -> list[int]:
    """Training seeds that are trained and evaluated."""
    folders = {seed: output / task / f"{policy}_{seed}" for seed in range(seeds)}
    return [seed for seed, folder in folders.items() if (folder / "evaluation" / "results.json").is_file()]


def interval(task: str, policy: str, seeds: list[int], output: Path) -> np.ndarray:
    """Bootstrap draws ``(DRAWS, 2)`` of both entropies, over training seeds, then contexts, then rollouts."""
    spec, rollouts = load_task(task), TASKS[task]["rollouts"]
    labels, rng = len(behaviors(spec)), np.random.default_rng(0)
    tables = [
        behavior_table(spec, read_rollouts(output / task / f"{policy}_{seed}" / "evaluation"), rollouts)
        for seed in seeds
    ]
    draws = [
        np.mean([resample(tables[index], labels, rng) for index in rng.integers(len(seeds), size=len(seeds))], axis=0)
        for _ in range(DRAWS)
    ]
    return np.array(draws)


def arm(task: str, policy: str, results: list[dict[str, Any]], draws: np.ndarray) -> dict[str, Any]:
    """Row of the table: mean over training seeds."""
    entropies = [result["entropy"] for result in results]
    successes, n = sum(result["successes"] for result in results), sum(result["n"] for result in results)
    low, high = posterior_interval(successes, n)
    return {
        "name": f"{task}: {POLICIES[policy]}",
        "value": float(np.mean(entropies)),
        "n": n,
        "training_seeds": len(results),
        "interval": np.quantile(draws[:, 0], [0.025, 0.975]).tolist(),
        "entropy per seed": " ".join(f"{value:.2f}" for value in entropies),
        "Miller-Madow": float(np.mean([result["entropy_miller_madow"] for result in results])),
        "conditional": float(np.mean([result["conditional_entropy"] for result in results])),
        "success": successes / n,
        "success interval": f"{low:.3f}-{high:.3f}",
        "success per seed": " ".join(f"{result['success_rate']:.2f}" for result in results),
        "score": float(np.mean([result["score"] for result in results])),
    }


def spent_s(folder: Path) -> float:
    """Seconds of a training and its evaluation, whenever and in however many parts they ran."""
    trained = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    return float(trained + json.loads((folder / "evaluation" / "results.json").read_text())["seconds"])


def summarize(task: str, policies: list[str], seeds: int, output: Path) -> None:
    """Write the result of a task from the trainings that are finished; nothing without the U-Net and the L2 loss.

    The headline is the entropy that a deterministic policy cannot have: where there is a single start (avoid) that of
    all rollouts, otherwise the one given the context.
    """
    shown = dataset_diversity(Dataset.open(output / task / "data"))
    arms, draws, seconds = {}, {}, 0.0
    for policy in policies:
        done = finished(task, policy, seeds, output)
        if done:
            results = [measure(task, policy, seed, output) for seed in done]
            draws[policy] = interval(task, policy, done, output)
            seconds += sum(spent_s(output / task / f"{policy}_{seed}") for seed in done)
            arms[policy] = arm(task, policy, results, draws[policy])
            print(arms[policy], flush=True)
    if not {"unet", "bc_l2"} <= set(arms):
        return
    column, key, given = (0, "value", "") if task == "avoid" else (1, "conditional", " given the context")
    ours, base = arms["unet"], arms["bc_l2"]
    difference = draws["unet"][:, column] - draws["bc_l2"][:, column]
    headline = {
        "metric": f"behaviour entropy{given} on {task} (0: one way, 1: all alike)", "ours": ours[key],
        "baseline": base[key], "baseline_name": POLICIES["bc_l2"], "ratio": None,
        "difference": ours[key] - base[key], "interval": np.quantile(difference, [0.025, 0.975]).tolist(),
        "n": ours["n"], "p_value": None,
    }  # fmt: skip
    write_benchmark(
        f"diversity_{task}",
        "How many of the ways to do a task that the demonstrations show does a policy keep?",
        headline,
        list(arms.values()),
        seconds=seconds,
        seeds=list(range(seeds)),
        notes=(
            "value is D3IL's unconditional entropy of the behaviours of successful rollouts; conditional is its mean "
            "over identical initial states, limited by the number of rollouts from each. Intervals: bootstrap over "
            "training seeds, contexts and rollouts (entropy), posterior of all rollouts (success). "
            f"{shown['successes']} demonstrations, entropy {shown['entropy']:.3f}; {TASKS[task]['steps']} steps with "
            f"batches of {BATCH} windows."
        ),
    )


def main() -> None:
    """Run and store the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_diversity"))
    parser.add_argument("--summarize", action="store_true", help="only write the results of what is finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.summarize:
        for task in options.tasks:
            collect(
                CollectionPlan(
                    output=options.output / task / "data", task=task, episodes=TASKS[task]["episodes"], image_size=16,
                    workers=1,
                )
            )  # fmt: skip
        # Seed by seed, so that an interrupted run has something of everything.
        for seed in range(options.seeds):
            for task in options.tasks:
                for policy in options.policies:
                    measure(task, policy, seed, options.output)
    for task in options.tasks:
        summarize(task, options.policies, options.seeds, options.output)


if __name__ == "__main__":
    main()
