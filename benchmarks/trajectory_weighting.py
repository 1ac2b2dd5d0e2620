"""Does drawing good episodes more often help on data of mixed quality? Pushing, from the scene's state.

    python benchmarks/trajectory_weighting.py                           # resumable; minutes on one core
    python benchmarks/trajectory_weighting.py --policies bc diffusion   # half an hour, with a result of its own

A tenth of the episodes is the scripted expert's. Half are of an operator who misjudges where things are, by an error
drawn per episode, with noise on every action; the rest moves at random. Failures are kept. How far the block has to go
differs much between starts and decides the return of a success, so that a high return may just be an easy start.
Everybody is evaluated on the same 200 initial conditions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import result_name, write_benchmark
from parts import Part, part

from simtoreal.data_collection.dataset import META, Dataset
from simtoreal.data_collection.episode import ABORTED
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.operator_style import OperatorStyle
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import TaskSpec, load_task, make_vector_env, rollout
from simtoreal.envs.rollout import Observation
from simtoreal.envs.task_file import parse_task
from simtoreal.evaluation.evaluate import evaluate
from simtoreal.evaluation.policies import checkpoint_digest, load_actor
from simtoreal.evaluation.results import load_evaluation
from simtoreal.evaluation.statistics import bonferroni, paired_test, posterior_interval
from simtoreal.policies.config import BCConfig, DiffusionConfig, PolicyConfig, TrainerConfig
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import open_training_data
from simtoreal.policies.weighting import Method, Weighting, effective_share

EVALUATION_SEED, EPISODES = 600_000, 200
MIX = {"expert": 30, "misjudging": 150, "random": 120}
METHODS: tuple[Method, ...] = ("uniform", "return", "advantage", "top")
MISJUDGEMENT_M, NOISE = 0.015, 0.3
STEPS = {"bc": 2500, "diffusion": 2500}


def mixed_task() -> TaskSpec:
    """``push`` away from the robot, over 8 to 27 cm: the distance, and with it the return, is nearly linear in x."""
    content = load_task("push").to_dict()
    content["initial"] = {
        "block": {"x_m": [0.37, 0.46], "y_m": [-0.1, 0.1], "yaw_deg": [-15, 15]},
        "region": {"x_m": [0.54, 0.64], "y_m": [-0.1, 0.1]},
    }
    content["name"] = "push_far"
    return parse_task(content, "benchmarks/trajectory_weighting.py")


class Misjudging:
    """The expert, seeing every object displaced horizontally by an error drawn per episode (m)."""

    observation_steps, execute_steps, ensembling = 1, 1, None

    def __init__(self, expert: ScriptedExpert, task: TaskSpec) -> None:
        self.expert, self.task, self.errors = expert, task, {}
        self.embodiment = expert.embodiment

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """See :class:`simtoreal.envs.rollout.Actor`."""
        for slot, seed in zip(slots, seeds, strict=True):
            error = np.random.default_rng([seed, 1]).normal(0.0, MISJUDGEMENT_M, (len(self.task.objects), 2))
            self.errors[int(slot)] = error
        self.expert.reset(slots, seeds)

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """See :class:`simtoreal.envs.rollout.Actor`."""
        state = observation["object_state"].copy()
        for row, slot in enumerate(slots):
            for index, error in enumerate(self.errors[int(slot)]):
                state[row, :, 7 * index : 7 * index + 2] += error
        return self.expert.act({**observation, "object_state": state}, instructions, slots)


class Wandering:
    """Random actions that change slowly: an Ornstein-Uhlenbeck process."""

    observation_steps, execute_steps, ensembling = 1, 1, None

    def __init__(self) -> None:
        self.state: dict[int, tuple[np.random.Generator, np.ndarray]] = {}

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """See :class:`simtoreal.envs.rollout.Actor`."""
        for slot, seed in zip(slots, seeds, strict=True):
            self.state[int(slot)] = (np.random.default_rng([seed, 2]), np.zeros(7))

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """See :class:`simtoreal.envs.rollout.Actor`."""
        actions = np.zeros((len(slots), 1, 7), np.float32)
        for row, slot in enumerate(slots):
            rng, before = self.state[int(slot)]
            before += -0.15 * before + 0.3 * rng.normal(size=7)
            actions[row, 0] = np.clip(before, -1, 1)
            actions[row, 0, 3:6] *= 0.2
        return actions


def data_settings() -> dict[str, Any]:
    """What decides the data, see :func:`~parts.find_part`."""
    return {"task": mixed_task(), "mix": MIX, "misjudgement_m": MISJUDGEMENT_M, "noise": NOISE}


def collect_mix(folder: Path) -> Part:
    """Record the episodes, going on with what is there."""
    with part(folder, data_settings()) as made:
        if made.finished:
            return made
        task = mixed_task()
        env = make_vector_env(task, 30, observe="state")
        noisy = OperatorStyle(name="misjudging", noise=NOISE)
        actors = {
            "expert": ScriptedExpert(task, env.embodiment),
            "misjudging": Misjudging(ScriptedExpert(task, env.embodiment, style=noisy), task),
            "random": Wandering(),
        }
        with DatasetWriter(folder, env.embodiment, {task.name: task.to_dict()}) as writer:
            done = {episode.seed for episode in Dataset.open(folder).episodes} if (folder / META).is_file() else set()
            first = 0
            for operator, count in MIX.items():
                recorder = Recorder(
                    memory_takes(writer), task=task.name, embodiment=env.embodiment, source="expert",
                    operator=operator, keep=lambda result: result.failure != ABORTED,
                )  # fmt: skip
                seeds = [seed for seed in range(first, first + count) if seed not in done]
                rollout(env, actors[operator], seeds, listeners=[recorder])
                first += count
        env.close()
    return made


def count_successes(folder: Path) -> dict[str, str]:
    """Successes of every operator."""
    episodes = Dataset.open(folder).episodes
    return {
        operator: f"{sum(e.success for e in episodes if e.operator == operator)}/{count}"
        for operator, count in MIX.items()
    }


def policy_config(policy: str) -> PolicyConfig:
    """Small networks on vectors."""
    common: dict[str, Any] = {"image_keys": (), "state_keys": ("proprio", "object_state"), "observation_steps": 2}
    common |= {"horizon": 16, "execute_steps": 8}
    if policy == "bc":
        return BCConfig(**common, hidden=256, loss="l2")
    return DiffusionConfig(**common, condition_width=128, noise_samples=1, unet_widths=(32, 64))


def measure(policy: str, method: Method, seed: int, output: Path) -> Part:
    """Train and evaluate one policy, continuing what is there, into the folder ``evaluation`` of it."""
    folder = output / f"{policy}_{method}_{seed}"
    trainer = TrainerConfig(
        steps=STEPS[policy], batch_size=128, seed=seed, checkpoint_every=250, validate_every=10_000, log_every=50
    )
    settings = {
        "data": data_settings(), "policy": policy_config(policy), "trainer": trainer,
        "weighting": Weighting(method=method), "evaluation": [EVALUATION_SEED, EPISODES],
    }  # fmt: skip
    with part(folder, settings) as made:
        if made.finished:
            return made
        print(f"{policy} {method} seed {seed}", flush=True)
        data = open_training_data(
            output / "data", policy_config(policy), mask="all", weighting=Weighting(method=method), hold_out=False
        )
        train(policy_config(policy), trainer, data, folder, resume=True)
        loaded, actor = load_actor(folder, device="cpu")
        env = make_vector_env(mixed_task(), 50, embodiment=loaded.embodiment, observe="state")
        seeds = range(EVALUATION_SEED, EVALUATION_SEED + EPISODES)
        described = {"task": env.task.name, "label": folder.name, "checkpoint": checkpoint_digest(loaded.folder)}
        try:
            evaluate(env, actor, seeds, folder / "evaluation", described, videos=0)
        finally:
            env.close()
    return made


def describe(output: Path) -> list[str]:
    """What each method draws: share of the expert's windows, and the effective number of windows."""
    dataset = Dataset.open(output / "data")
    operators = np.array([episode.operator for episode in dataset.filter("all")])
    lines = []
    for method in METHODS:
        weighting = Weighting(method=method)
        data = open_training_data(output / "data", policy_config("bc"), mask="all", weighting=weighting, hold_out=False)
        windows = data.train.episode_of_window  # type: ignore[attr-defined]
        p = np.full(len(windows), 1 / len(windows)) if data.probabilities is None else data.probabilities
        share = p[operators[windows] == "expert"].sum()
        lines.append(
            f"{method} {100 * share:.0f} % expert, {100 * effective_share(data.probabilities):.0f} % effective"
        )
    return lines


def compare_weightings(policy: str, advantage: list[list[bool]], returns: list[list[bool]]) -> str:
    """Advantage against return: difference, with an interval that resamples training seeds, then initial conditions."""
    differences = np.array(advantage, dtype=float) - np.array(returns, dtype=float)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(10_000):
        seeds, starts = (rng.integers(size, size=size) for size in differences.shape)
        drawn.append(differences[seeds][:, starts].mean())
    low, high = 100 * np.quantile(drawn, (0.025, 0.975))
    better = int((differences.mean(1) > 0).sum())
    return (
        f"{policy}, advantage - return: {100 * differences.mean():+.1f} points [{low:+.1f}, {high:+.1f}] (resampled "
        f"over training seeds, then initial conditions), better in {better} of {len(differences)} trainings."
    )


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=STEPS, default=["bc"])
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_trajectory_weighting"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [collect_mix(options.output / "data")]
    successes = count_successes(options.output / "data")
    drawn = describe(options.output)
    print(successes, drawn, flush=True)
    outcomes: dict[tuple[str, str], list[list[bool]]] = {}
    for policy in options.policies:
        for seed in range(options.seeds):
            for method in METHODS:
                parts.append(measure(policy, method, seed, options.output))
                found = load_evaluation(options.output / f"{policy}_{method}_{seed}" / "evaluation").outcomes
                outcomes.setdefault((policy, method), []).append(found)
    arms, compared = [], []
    for policy in options.policies:
        compared.append(compare_weightings(policy, outcomes[policy, "advantage"], outcomes[policy, "return"]))
        uniform = np.concatenate(outcomes[policy, "uniform"])
        tests = {
            method: paired_test(np.concatenate(outcomes[policy, method]), uniform)
            for method in METHODS if method != "uniform"
        }  # fmt: skip
        adjusted = dict(zip(tests, bonferroni([test.p_value for test in tests.values()]), strict=True))
        for method in METHODS:
            per_seed = outcomes[policy, method]
            flat = np.concatenate(per_seed)
            arms.append({
                "name": f"{policy}, {method}", "value": float(flat.mean()), "n": len(flat),
                "interval": list(posterior_interval(int(flat.sum()), len(flat))),
                "per seed": " ".join(f"{np.mean(one):.2f}" for one in per_seed),
                "p against uniform": adjusted.get(method),
            })  # fmt: skip
            print(json.dumps(arms[-1]))
    values = {row["name"]: row for row in arms}
    policy = options.policies[0]
    ours, base = values[f"{policy}, advantage"], values[f"{policy}, uniform"]
    headline = {
        "metric": f"success of {policy}", "ours": ours["value"], "baseline": base["value"],
        "baseline_name": "uniform", "ratio": None, "difference": ours["value"] - base["value"], "interval": None,
        "n": ours["n"], "p_value": ours["p against uniform"],
    }  # fmt: skip
    write_benchmark(
        result_name("trajectory_weighting", parser, options, "policies", "seeds"),
        "Does drawing good episodes more often (by return, by advantage, the best tenth) help on mixed data?",
        headline,
        arms,
        parts=parts,
        seeds=list(range(options.seeds)),
        notes=(
            f"Successes in the data: {successes}. Drawn: {'; '.join(drawn)}. Temperature 0.1, discounted returns. "
            f"p-values: exact paired test over the same {EPISODES} initial conditions per training seed, pooled over "
            f"{options.seeds} training seeds, Bonferroni over the three comparisons with uniform; it knows rollout "
            f"noise only, the columns per seed show the training noise. {' '.join(compared)}"
        ),
    )


if __name__ == "__main__":
    main()
