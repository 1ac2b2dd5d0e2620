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
from simtoreal.evaluation.bootstrap import resample_counts
from simtoreal.evaluation.diversity import (
    behavior_table,
    corrected_draws,
    count_table,
    entropy_draws,
    evaluate_diversity,
    interval_of,
    read_rollouts,
    summarize_diversity,
)
from simtoreal.evaluation.policies import checkpoint_digest, load_actor
from simtoreal.evaluation.statistics import repeated_interval
from simtoreal.policies.config import AugmentationConfig, BCConfig, DiffusionConfig, PolicyConfig, TrainerConfig
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import open_training_data

EVALUATION_SEED = 600_000
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


def measure(task: str, policy: str, seed: int, output: Path) -> None:
    """Train and evaluate one policy, continuing what is there."""
    settings, folder = TASKS[task], output / task / f"{policy}_{seed}"
    if (folder / "evaluation" / "results.json").is_file():
        return
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


def finished(task: str, policy: str, seeds: int, output: Path) -> list[int]:
    """Training seeds that are trained and evaluated."""
    folders = {seed: output / task / f"{policy}_{seed}" for seed in range(seeds)}
    return [seed for seed, folder in folders.items() if (folder / "evaluation" / "results.json").is_file()]


def entropies(task: str, rows: list[list[dict[str, Any]]]) -> np.ndarray:
    """Mean over training seeds of both entropies, ``(1 + draws, 2)``: measured, then over seeds and contexts.

    All policies and seeds have the same contexts, and draws choose the same ones of them.

    Args:
        task: its name.
        rows: rollouts of each training.
    """
    spec, rollouts = load_task(task), TASKS[task]["rollouts"]
    each = np.stack(
        [
            entropy_draws(count_table(behavior_table(spec, found, rollouts), len(behaviors(spec))), rollouts)
            for found in rows
        ]
    )
    weights = resample_counts(len(each), each.shape[1] - 1, seed=1) / len(each)
    return np.einsum("ds,sde->de", weights, each)


def success_interval(task: str, rows: list[list[dict[str, Any]]]) -> tuple[float, float]:
    """95 % interval of the success rate of all trainings together, over contexts."""
    successes = {context: 0 for context in range(EVALUATION_SEED, EVALUATION_SEED + TASKS[task]["contexts"])}
    for row in (row for found in rows for row in found):
        successes[row["context"]] += row["success"]
    return repeated_interval(list(successes.values()), TASKS[task]["rollouts"] * len(rows))


def arm(task: str, policy: str, rows: list[list[dict[str, Any]]], draws: np.ndarray) -> dict[str, Any]:
    """Row of the table: mean over training seeds."""
    contexts = TASKS[task]["contexts"]
    # Anew, because stored results may be of a version with wrong intervals.
    results = [summarize_diversity(load_task(task), found, TASKS[task]["rollouts"]) for found in rows]
    entropies = [result["entropy"] for result in results]
    successes, n = sum(result["successes"] for result in results), sum(result["n"] for result in results)
    low, high = success_interval(task, rows)
    corrected = corrected_draws(draws[:, 0])
    return {
        "name": f"{task}: {POLICIES[policy]}",
        "value": float(np.mean(entropies)),
        "n": n,
        "contexts": contexts,
        "training_seeds": len(results),
        # D3IL's entropy has a bias and no interval; its corrected value has.
        "interval": None,
        "entropy per seed": " ".join(f"{value:.2f}" for value in entropies),
        "corrected": float(corrected[0]),
        "corrected interval": text_of(interval_of(corrected, contexts)),
        "conditional": float(np.mean([result["conditional_entropy"] for result in results])),
        "conditional interval": text_of(interval_of(draws[:, 1], contexts)),
        "success": successes / n,
        "success interval": f"{low:.3f}-{high:.3f}",
        "success per seed": " ".join(f"{result['success_rate']:.2f}" for result in results),
        "score": float(np.mean([result["score"] for result in results])),
    }


def text_of(bounds: list[float] | None) -> str | None:
    """Interval as text for the table, None if there is none."""
    return f"{bounds[0]:.3f}-{bounds[1]:.3f}" if bounds else None


def spent_s(folder: Path) -> float:
    """Seconds of a training and its evaluation, whenever and in however many parts they ran."""
    trained = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    return float(trained + json.loads((folder / "evaluation" / "results.json").read_text())["seconds"])


def summarize(task: str, policies: list[str], seeds: int, output: Path) -> None:
    """Write the result of a task from the trainings that are finished; nothing without the U-Net and the L2 loss.

    The headline is the entropy that a deterministic policy cannot have: where there is a single start (avoid) that of
    all rollouts, corrected for its bias, otherwise the one given the context, as this number of rollouts shows it.
    """
    shown = dataset_diversity(Dataset.open(output / task / "data"))
    arms, draws, seconds = {}, {}, 0.0
    for policy in policies:
        done = finished(task, policy, seeds, output)
        if done:
            rows = [read_rollouts(output / task / f"{policy}_{seed}" / "evaluation") for seed in done]
            draws[policy] = entropies(task, rows)
            seconds += sum(spent_s(output / task / f"{policy}_{seed}") for seed in done)
            arms[policy] = arm(task, policy, rows, draws[policy])
            print(arms[policy], flush=True)
    if not {"unet", "bc_l2"} <= set(arms):
        return
    if task == "avoid":
        key, kind = "corrected", "behaviour entropy, corrected for small samples,"
        shown_draws = {policy: corrected_draws(found[:, 0]) for policy, found in draws.items()}
    else:
        key, kind = "conditional", f"behaviour entropy given the context, of {TASKS[task]['rollouts']} rollouts each,"
        shown_draws = {policy: found[:, 1] for policy, found in draws.items()}
    ours, base = arms["unet"], arms["bc_l2"]
    headline = {
        "metric": f"{kind} on {task} (0: one way, 1: all alike)", "ours": ours[key],
        "baseline": base[key], "baseline_name": POLICIES["bc_l2"], "ratio": None,
        "difference": ours[key] - base[key],
        "interval": interval_of(shown_draws["unet"] - shown_draws["bc_l2"], TASKS[task]["contexts"]),
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
            "value is D3IL's unconditional entropy of the behaviours of successful rollouts; corrected adds what small "
            "samples lose by the bootstrap's estimate, and has the interval. conditional is D3IL's mean over identical "
            f"initial states, as {TASKS[task]['rollouts']} rollouts from each show it: its interval is of that number, "
            "not of the policy's own conditional entropy, which is no lower, and of which so few rollouts give no "
            "interval. Intervals are over contexts, since rollouts of one are alike (entropy: bootstrap over training "
            "seeds, too; success: Beta posterior, the number of rollouts divided by the design effect, all trainings "
            "together). So few seeds say little about other trainings, and a single one nothing. "
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
