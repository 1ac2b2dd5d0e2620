"""What the benchmarks of co-training share: demonstrations, policies, outcomes in pairs, and their statistics."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
PR_SET_PDEATHSIG = 1
# Task, training seed, arm.
Arm = tuple[str, int, str]


def do_arms(
    execute: Callable[[Arm], str], arms: Sequence[Arm], first: str, jobs: int | None, device: str | None
) -> None:
    """Do several arms at the same time, on a CPU with one thread each, so that results do not depend on how many.

    Args:
        execute: does what is left of an arm, and says what came out.
        arms: which.
        first: name of the arm whose stages the others of the same task and seed begin with.
        jobs: at the same time; None means one per core, or one where all of them would share a GPU.
        device: torch device; None picks a GPU if there is one.

    Raises:
        SystemExit: something is missing that an arm begins with. The others are finished before.
    """
    on_gpu = torch.cuda.is_available() if device is None else device != "cpu"
    count = jobs or (1 if on_gpu else os.cpu_count() or 1)
    begun = {(task, seed) for task, seed, name in arms if name == first}
    ready = [one for one in arms if one[2] == first or one[:2] not in begun]
    waiting = [one for one in arms if one not in ready]
    failed: list[BaseException] = []
    threads = torch.get_num_threads() if on_gpu else 1
    # Not forked: torch's threads do not survive that.
    with ProcessPoolExecutor(count, get_context("spawn"), _begin_process, (threads,)) as pool:
        running: dict[Future[str], Arm] = {pool.submit(execute, one): one for one in ready}
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                task, seed, name = running.pop(done)
                if (error := done.exception()) is not None:
                    failed.append(error)
                    continue
                print(f"{task}-{seed}-{name}: {done.result()}", flush=True)
                if name == first:
                    ready = [one for one in waiting if one[:2] == (task, seed)]
                    running |= {pool.submit(execute, one): one for one in ready}
    if failed:
        raise failed[0]


def _begin_process(threads: int) -> None:
    # Whoever kills the benchmark means its arms, too; they would go on writing.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    torch.set_num_threads(threads)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other arm prepares something in ``folder``: all begin with the same demonstrations and policies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".prepared", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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
