"""Is success in the model what success in the simulator is? The same policies from the same first frames in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from simtoreal.envs import make_vector_env
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.rollout import Listener
from simtoreal.envs.task import TaskSpec
from simtoreal.envs.task_file import load_task, parse_task
from simtoreal.evaluation.evaluate import FIRST_SEED, check_unseen, evaluate
from simtoreal.evaluation.policies import checkpoint_digest, load_actor, training_seeds
from simtoreal.evaluation.results import read_episodes
from simtoreal.evaluation.statistics import paired_test
from simtoreal.evaluation.validity import policy_validity
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.checkpoint import LoadedPolicy
from simtoreal.world_models.checkpoint import LoadedWorldModel
from simtoreal.world_models.hallucination import first_frames, places_by_seed
from simtoreal.world_models.learned_episodes import learned_seeds
from simtoreal.world_models.vector_env import WorldModelVectorEnv, require_no_failure, require_shown

# Episodes run together.
SLOTS = 32


def evaluated_task(loaded: LoadedWorldModel, task: str | TaskSpec | None) -> TaskSpec:
    """Return the task named, or that of the model's data.

    Raises:
        ConfigError: the model is of several tasks and none is named; or it is one that a world model cannot judge.
    """
    if task is None and not loaded.task:
        raise ConfigError(f"{loaded.folder} was trained on several tasks; say which one to evaluate policies on")
    chosen = load_task(task) if task is not None else parse_task(loaded.task, source=str(loaded.folder))
    require_no_failure(chosen)
    return chosen


def load_policies(
    loaded: LoadedWorldModel, policies: Sequence[Path], seeds: range, device: str
) -> list[tuple[Path, LoadedPolicy, PolicyActor]]:
    """Load policies to be evaluated in a world model and in the simulator.

    Raises:
        CheckpointError: a policy cannot be loaded.
        ConfigError: the model or a policy was trained on some of the initial conditions ``seeds``, or a policy reads
            what the model does not show.
        EmbodimentMismatchError: a policy is of another embodiment or render profile than the model.
    """
    if common := learned_seeds(loaded.training.get("data") or {}) & set(seeds):
        raise ConfigError(
            f"{len(common)} of the {len(seeds)} initial conditions from {seeds.start} on are among the episodes that "
            f"the world model {loaded.folder} learned from; choose others with --first-condition"
        )
    actors = []
    for path in policies:
        policy, actor = load_actor(path, device=device)
        policy.embodiment.require_equal(loaded.embodiment, f"policy {path}", f"the world model {loaded.folder}")
        require_shown(policy.config.keys, loaded.embodiment, f"policy {path}")
        check_unseen(seeds, training_seeds(policy))
        actors.append((path, policy, actor))
    return actors


def evaluate_policies(
    loaded: LoadedWorldModel,
    policies: Sequence[Path],
    output: Path,
    *,
    task: str | TaskSpec | None = None,
    randomization: str = "none",
    conditions: int,
    first_seed: int = FIRST_SEED,
    device: str = "auto",
    videos: int = 1,
    listeners: Sequence[Listener] = (),
) -> dict[str, Any]:
    """Run every policy in the simulator and in the model, and compare.

    Interrupted evaluations continue.

    Args:
        loaded: the world model.
        policies: run or checkpoint folders, of the model's embodiment.
        output: folder; every policy gets ``<number>_<folder's name>/simulation`` and ``.../imagined`` in it.
        task: default: the task of the model's data.
        randomization: of the simulator, the one that the model's data are from.
        conditions: initial conditions, the same for all policies and both worlds.
        first_seed: of the conditions.
        device: where the policies run.
        videos: of successes and failures in each world.
        listeners: see :func:`~simtoreal.envs.rollout.rollout`.

    Returns:
        ``policies``: label, path, success in both worlds with n and interval, and the paired test; and the entries of
        :func:`~simtoreal.evaluation.validity.policy_validity`.

    Raises:
        ConfigError: the model is of several tasks and none is named, or it or a policy was trained on the conditions.
        EmbodimentMismatchError: a policy is of another embodiment or render profile than the model.
    """
    chosen = evaluated_task(loaded, task)
    seeds = range(first_seed, first_seed + conditions)
    actors = load_policies(loaded, policies, seeds, device)
    slots = min(SLOTS, conditions)
    env = _simulator(chosen, slots, loaded, randomization)
    try:
        begin = first_frames(env, seeds, chosen)
    finally:
        env.close()
    places, rows, outcomes = places_by_seed(seeds), [], []
    for number, (path, policy, actor) in enumerate(actors):
        label = f"{number}_{Path(path).resolve().name}"
        shared = {
            "task": chosen.name, "label": label, "policy": str(path), "checkpoint": checkpoint_digest(policy.folder),
            "horizon": chosen.horizon, "first_seed": first_seed, "model": str(loaded.folder),
            "randomization": randomization,
        }  # fmt: skip
        results, successes = {}, []
        for world in ("simulation", "imagined"):
            env = (
                _simulator(chosen, slots, loaded, randomization)
                if world == "simulation"
                else WorldModelVectorEnv(loaded, slots, begin, places=places, task=chosen)
            )
            folder = output / label / world
            try:
                settings = {**shared, "backend": world}
                if world == "imagined":
                    settings["world_model_checkpoint"] = checkpoint_digest(loaded.folder)
                results[world] = evaluate(env, actor, seeds, folder, settings, videos=videos, listeners=listeners)
            finally:
                env.close()
            successes.append([result.success for result in read_episodes(folder)])
        outcomes.append(successes)
        test = paired_test(*successes)
        kept = ("success_rate", "successes", "n", "interval")
        rows.append(
            {
                "label": label,
                "path": str(path),
                **{world: {key: results[world][key] for key in kept} for world in results},
                "only_simulation": test.only_first,
                "only_imagined": test.only_second,
                "p_value": test.p_value,
            }
        )
    table = np.array(outcomes, dtype=bool)
    return {"rows": rows, "randomization": randomization, **policy_validity(table[:, 0], table[:, 1])}


def _simulator(task: TaskSpec, slots: int, loaded: LoadedWorldModel, randomization: str) -> VectorEnv:
    return make_vector_env(task, slots, embodiment=loaded.embodiment, observe="image", randomization=randomization)
