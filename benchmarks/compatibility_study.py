"""What the compatibility benchmarks share: state-only demonstrations, arms, paired evaluation, statistics.

An arm is a policy trained on part of one dataset: base data, everything (naive), everything but the candidates' bad
steps (box), as many random candidate steps (random), or the episodes with few bad steps, whole (accepted). All arms of
a seed share data, network, optimiser steps and evaluation episodes, so that outcomes are compared in pairs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import result_name, write_benchmark
from parts import part

from simtoreal.data_collection.edit import merge
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.filters import write_filter
from simtoreal.data_collection.operator_style import STYLES, OperatorStyle
from simtoreal.data_collection.recorder import Recorder
from simtoreal.data_collection.takes import MemoryTake
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.files import write_json
from simtoreal.envs.panda import panda_embodiment
from simtoreal.envs.rollout import rollout
from simtoreal.envs.tabletop_vector import TabletopVectorEnv
from simtoreal.envs.task import TaskSpec
from simtoreal.evaluation.statistics import paired_test, posterior_interval
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.checkpoint import load_policy
from simtoreal.policies.compatibility_config import ScorerConfig
from simtoreal.policies.compatibility_features import make_features
from simtoreal.policies.compatibility_filter import filter_dataset
from simtoreal.policies.compatibility_scorer import Scorer
from simtoreal.policies.compatibility_store import open_scorer
from simtoreal.policies.config import PolicyConfig, TrainerConfig
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import open_training_data

STATE_KEYS = ("proprio", "object_state")
ARMS = ("base", "naive", "random", "box", "accepted")
# What is measured here was chosen with training seeds below 10 and evaluation episodes below 1,000,000.
FIRST_TRAINING, FIRST_EPISODE = 10, 5_000_000
BOOTSTRAPS = 10_000
# What decides all outcomes beside the settings of each benchmark; scorers and trainings have the seed of their part.
_SHARED: dict[str, Any] = {
    "first_episode": FIRST_EPISODE, "arms": ARMS, "scorers": ScorerConfig(),
    "trainer": TrainerConfig(precision="fp32"), "robot": panda_embodiment(cameras=()),
}  # fmt: skip

# Outcomes by (policy, arm) of one training seed.
Outcomes = dict[tuple[str, str], list[bool]]


class PositionEnv(TabletopVectorEnv):
    """Tells the learner where the end effector is and nothing else about the arm.

    The commanded target runs ahead of the end effector, which gives away the previous action and with it the operator:
    a policy that sees it need not average.
    """

    def _observe(self, measured: np.ndarray, drawn: np.ndarray) -> dict[str, np.ndarray]:
        observation = super()._observe(measured, drawn)
        observation["proprio"] = position_only(observation["proprio"])
        return observation


def position_only(proprio: np.ndarray) -> np.ndarray:
    """``proprio`` (N, 20) with zeros for everything but the position of the end effector."""
    reduced = np.zeros_like(proprio)
    reduced[:, :3] = proprio[:, :3]
    return reduced


def state_env(
    task: str | TaskSpec, num_envs: int, *, position: bool = False, motion: str | None = None
) -> TabletopVectorEnv:
    """Simulations without cameras, with all of the proprio vector or the position only, still or moving."""
    kind = PositionEnv if position else TabletopVectorEnv
    return kind(task, num_envs, embodiment=panda_embodiment(cameras=()), observe="state", motion=motion)


def demonstrate(
    path: Path,
    task: str | TaskSpec,
    style: OperatorStyle | str,
    episodes: int,
    first_seed: int,
    *,
    position: bool = False,
    motion: str | None = None,
    num_envs: int = 20,
) -> Path:
    """Make a dataset of ``episodes`` successful demonstrations, unless it is there.

    The operator sees everything; ``position`` reduces what is recorded. ``motion`` moves the scene (MOVE).
    """
    if path.exists():
        return path
    style = STYLES[style] if isinstance(style, str) else style
    env = state_env(task, min(num_envs, episodes), motion=motion)
    temporary = path.with_name(f".{path.name}.making")
    shutil.rmtree(temporary, ignore_errors=True)
    with DatasetWriter(temporary, env.embodiment, {env.task.name: env.task.to_dict()}) as writer:
        found: list[Any] = []
        recorder = Recorder(
            lambda begun: MemoryTake(lambda arrays, info: found.append((arrays, info))), task=env.task.name,
            embodiment=env.embodiment, source="expert", operator=style.name,
            extra={"motion": env.motion.to_dict()} if motion else {},
        )  # fmt: skip
        expert = ScriptedExpert(env.task, env.embodiment, style=style)
        rollout(env, expert, range(first_seed, first_seed + episodes + max(4, episodes // 5)), listeners=[recorder])
        found.sort(key=lambda pair: pair[1].seed)
        if len(found) < episodes:
            raise RuntimeError(f"{style.name}: only {len(found)} successes for {episodes} demonstrations")
        for arrays, info in found[:episodes]:
            if position:
                arrays["obs/proprio"] = position_only(arrays["obs/proprio"])
            writer.add(arrays, info)
    temporary.rename(path)
    return path


def join(path: Path, *sources: Path) -> Path:
    """Merge datasets by links, unless that was done."""
    if not path.exists():
        merge(sources, path)
    return path


def scorer_of(base: Path, kind: str, seed: int) -> Scorer:
    """The scorer of base data."""
    from simtoreal.data_collection.dataset import Dataset

    dataset = Dataset.open(base)
    return open_scorer(dataset, make_features(dataset), ScorerConfig(kind=kind, seed=seed))


def make_filters(everything: Path, scorer: Scorer, methods: Sequence[str], prefix: str, seed: int) -> dict[str, Any]:
    """Write one filter per method, named ``<prefix>_<method>``; return what each keeps per operator."""
    from simtoreal.data_collection.dataset import Dataset

    dataset, kept = Dataset.open(everything), {}
    for method in methods:
        result = filter_dataset(dataset, scorer, name=f"{prefix}_{method}", method=method, seed=seed)
        write_filter(everything, result)
        kept[method] = {"operators": result.operators(), "thresholds": result.thresholds}
    return kept


def run_arm(
    folder: Path,
    data: Path,
    policy: PolicyConfig,
    trainer: TrainerConfig,
    seeds: Sequence[int],
    *,
    task: str | TaskSpec,
    mask: str = "success",
    filter: str | None = None,
    position: bool = False,
    num_envs: int = 50,
) -> list[bool]:
    """Train, evaluate, and return the outcomes in the order of ``seeds``; what was done before is read."""
    stored = folder / "outcomes.json"
    if stored.is_file():
        content = json.loads(stored.read_text())
        if content["seeds"] == list(seeds):
            return [bool(value) for value in content["outcomes"]]
    shutil.rmtree(folder, ignore_errors=True)
    windows = open_training_data(data, policy, mask=mask, filter=filter, hold_out=False)
    train(policy, trainer, windows, folder)
    env = state_env(task, num_envs, position=position)
    actor = PolicyActor(load_policy(folder).policy)
    results = rollout(env, actor, list(seeds))
    steps = [result.steps for result in results]
    outcomes = [bool(result.success) for result in results]
    write_json(stored, {"seeds": list(seeds), "outcomes": outcomes, "steps": steps, "windows": len(windows.train)})
    shutil.rmtree(folder / "checkpoints")
    return outcomes


def run_arms(
    folder: Path,
    base: Path,
    everything: Path,
    policies: Mapping[str, PolicyConfig],
    *,
    seed: int,
    steps: int,
    episodes: int,
    task: str | TaskSpec,
    position: bool = False,
) -> Outcomes:
    """Train every policy of one seed on the data of every arm for ``steps``; all meet the same ``episodes``.

    ``everything`` has the filters ``mlp_box`` and ``mlp_random``, see :func:`make_filters`.
    """
    data: dict[str, tuple[Path, dict[str, str]]] = {
        "base": (base, {}), "naive": (everything, {}), "random": (everything, {"filter": "mlp_random"}),
        "box": (everything, {"filter": "mlp_box"}), "accepted": (everything, {"mask": "mlp_box"}),
    }  # fmt: skip
    trainer = TrainerConfig(
        steps=steps, seed=seed, checkpoint_every=steps, validate_every=steps, log_every=steps, precision="fp32"
    )
    seeds = range(FIRST_EPISODE + 1000 * seed, FIRST_EPISODE + 1000 * seed + episodes)
    outcomes: Outcomes = {}
    for name, policy in policies.items():
        for arm in ARMS:
            path, selection = data[arm]
            outcomes[name, arm] = run_arm(
                folder / f"{name}_{arm}", path, policy, trainer, seeds, task=task, **selection, position=position
            )  # fmt: skip
            print(f"seed {seed}, {name}, {arm}: {sum(outcomes[name, arm])}/{episodes}", flush=True)
    return outcomes


def arm_row(name: str, outcomes: Sequence[Sequence[bool]], **more: Any) -> dict[str, Any]:
    """Success over all seeds together, and of each seed.

    Args:
        name: of the arm.
        outcomes: per training seed.
        more: further columns.
    """
    flat = np.concatenate([np.asarray(one) for one in outcomes])
    rates = [float(np.mean(one)) for one in outcomes]
    return {
        "name": name, "value": float(flat.mean()), "n": len(flat),
        "interval": list(posterior_interval(int(flat.sum()), len(flat))),
        "per_seed": rates, "seed_sd": float(np.std(rates, ddof=1)) if len(rates) > 1 else None, **more,
    }  # fmt: skip


def paired_difference(
    first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]], seed: int = 0
) -> dict[str, Any]:
    """Second minus first: mean, 95 % interval by resampling training seeds and then episodes, exact paired p-value.

    The p-value takes the training runs as given; the interval does not.
    """
    differences = [np.asarray(b, dtype=float) - np.asarray(a, dtype=float) for a, b in zip(first, second, strict=True)]
    rng = np.random.default_rng(seed)
    draws = np.empty(BOOTSTRAPS)
    for index in range(BOOTSTRAPS):
        chosen = rng.integers(len(differences), size=len(differences))
        draws[index] = np.mean([rng.choice(differences[i], len(differences[i])).mean() for i in chosen])
    test = paired_test(np.concatenate(first).tolist(), np.concatenate(second).tolist())
    return {
        "difference": float(np.mean([one.mean() for one in differences])),
        "interval": [float(value) for value in np.quantile(draws, [0.025, 0.975])],
        "p_value": test.p_value,
        "n": sum(len(one) for one in differences),
    }


def comparisons(outcomes: Mapping[str, Sequence[Sequence[bool]]], ours: str, others: Sequence[str]) -> dict[str, Any]:
    """``ours`` against each of ``others``."""
    return {f"{ours} - {other}": paired_difference(outcomes[other], outcomes[ours]) for other in others}


def run_study(
    name: str,
    question: str,
    description: str,
    run_seed: Callable[[Path, int], tuple[Outcomes, dict[str, Any]]],
    policies: Mapping[str, PolicyConfig],
    *,
    settings: Mapping[str, Any],
    seeds: int,
    notes: Callable[[list[dict[str, Any]]], str],
    more_rows: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda reports: [],
) -> None:
    """Run a benchmark's training seeds and store success of the arms, box against each other arm, and its own rows.

    Args:
        name: of the benchmark.
        question: that it answers.
        description: shown by ``--help``.
        run_seed: gets a folder and the seed; returns the outcomes, and a report for ``notes`` and ``more_rows``.
        policies: by their name in ``run_seed``'s outcomes; the headline is that of ``bc``.
        settings: what decides the results beside policies and seed, see :func:`~parts.find_part`.
        seeds: default of ``--seeds``.
        notes: gets the reports of all seeds.
        more_rows: likewise.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(f"outputs/benchmark_{name}"))
    parser.add_argument("--seeds", type=int, default=seeds)
    options = parser.parse_args()
    training = range(FIRST_TRAINING, FIRST_TRAINING + options.seeds)
    found, parts = [], []
    for seed in training:
        folder = options.output / f"seed_{seed}"
        with part(folder, {**settings, **_SHARED, "policies": policies, "seed": seed}) as made:
            folder.mkdir(parents=True, exist_ok=True)
            found.append(run_seed(folder, seed))
        parts.append(made)
    outcomes = {key: [one[key] for one, _ in found] for key in found[0][0]}
    reports = [report for _, report in found]
    arms = [arm_row(f"{policy}, {arm}", outcomes[policy, arm]) for policy in policies for arm in ARMS]
    tests = {
        policy: comparisons(
            {arm: outcomes[policy, arm] for arm in ARMS}, "box", ("naive", "base", "random", "accepted")
        )
        for policy in policies
    }
    differences = [
        {"name": f"{policy}, {pair}", "value": test["difference"], "n": test["n"], "interval": test["interval"],
         "p_value": test["p_value"]}
        for policy, pairs in tests.items() for pair, test in pairs.items()
    ]  # fmt: skip
    values = {arm["name"]: arm["value"] for arm in arms}
    write_benchmark(
        result_name(name, parser, options, "seeds"),
        question,
        {
            "metric": "success rate, unimodal policy", "ours": values["bc, box"], "baseline": values["bc, naive"],
            "baseline_name": "all demonstrations, unfiltered", "ratio": None, **tests["bc"]["box - naive"],
        },
        [*arms, *differences, *more_rows(reports)],
        parts=parts,
        seeds=list(training),
        notes=f"{options.seeds} seeds, each with its own demonstrations, {notes(reports)}",
    )  # fmt: skip
