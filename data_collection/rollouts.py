"""Rollouts of an actor as a dataset: every episode, failures included, with nothing selected.

A world model learns what happens when things go wrong from exactly these episodes, and how many there were is part of
what it costs, so every one of them is counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from simtoreal.data_collection.dataset import META, Dataset, read_meta
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, disk_errors
from simtoreal.data_collection.ledger import Outcome
from simtoreal.data_collection.recorder import Recorder
from simtoreal.data_collection.takes import MemoryTake
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.files import append_whole
from simtoreal.envs.rollout import TASK_FAILED, Actor, EpisodeResult, Listener, rollout
from simtoreal.envs.task import TaskSpec

LOG = "rollouts.jsonl"
# Episodes per environment that are run before any of them is stored, so that environments rarely wait.
_BLOCK = 2
# Ends of an episode after which it holds what really happened; anything else is a fault of the environment.
_SOUND = ("", "timeout", TASK_FAILED)


def record_rollouts(
    env: VectorEnv | gym.Env,
    actor: Actor,
    seeds: Sequence[int],
    output: str | Path,
    *,
    task: TaskSpec,
    operator: str,
    settings: Mapping[str, Any],
    listeners: Sequence[Listener] = (),
) -> list[Outcome]:
    """Run one episode per seed and store all of them in the dataset ``output``, in the order of the seeds.

    Run again with the same arguments to continue an interrupted recording; a block of episodes that was not finished is
    run again, so that the dataset does not depend on the interruption. With a single environment, such as a robot, a
    block is one episode.

    Args:
        env: see :func:`~simtoreal.envs.rollout.rollout`.
        actor: whose rollouts they are.
        seeds: initial conditions, all different.
        output: dataset folder.
        task: what is done.
        operator: name of the actor, see :class:`~simtoreal.data_collection.episode.EpisodeInfo`.
        settings: what decides the rollouts, JSON-compatible; attached to every episode and compared on resume.
        listeners: told about everything.

    Returns:
        One outcome per seed. Episodes in which the environment failed (a simulation that diverged, a sensor that went
        silent) are counted, but not stored.

    Raises:
        ConfigError: seeds repeat, or the folder holds other rollouts.
        DatasetError: the folder is in use or damaged, or the disk is full.
        EmbodimentMismatchError: actor, environment and folder do not fit together.
    """
    output, seeds = Path(output), [int(seed) for seed in seeds]
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError(f"{len(seeds)} seeds, {len(set(seeds))} of them different; expected one or more, none twice")
    embodiment = env.unwrapped.embodiment  # type: ignore[union-attr]
    identity = json.loads(json.dumps({"rollouts": {"task": task.name, "operator": operator, **settings}}))
    _require_same(output, identity)
    with DatasetWriter(output, embodiment, {task.name: task.to_dict()}, collection=identity) as writer:
        outcomes = _read_outcomes(output, seeds)
        stored = {episode.seed for episode in Dataset.open(output).episodes}
        block = _BLOCK * getattr(env, "num_envs", 1) if isinstance(env, VectorEnv) else 1
        for first in range(len(outcomes) // block * block, len(seeds), block):
            chosen = seeds[first : first + block]
            taken: dict[int, tuple[Arrays, EpisodeInfo]] = {}
            recorder = Recorder(
                lambda info, taken=taken: MemoryTake(  # type: ignore[misc]
                    lambda arrays, ended: taken.update({ended.seed: (arrays, ended)})
                ),
                task=task.name, embodiment=embodiment, source="policy", operator=operator, extra=dict(settings),
                keep=lambda result: result.failure in _SOUND,
            )  # fmt: skip
            for result in rollout(env, actor, chosen, listeners=[recorder, *listeners]):
                if result.seed in taken and result.seed not in stored:
                    writer.add(*taken[result.seed])
                if result.episode + first >= len(outcomes):
                    outcomes.append(_outcome(result, stored=result.seed in taken))
                    _append(output / LOG, outcomes[-1])
    return outcomes


def _outcome(result: EpisodeResult, *, stored: bool) -> Outcome:
    return Outcome(
        seed=result.seed, success=result.success, failure=result.failure, steps=result.steps, stored=stored
    )  # fmt: skip


def _require_same(output: Path, identity: dict[str, Any]) -> None:
    if not (output / META).exists():
        return
    earlier = read_meta(output).get("collection")
    if earlier != identity:
        raise ConfigError(
            f"{output}: holds other data:\n  {earlier} there\n  {identity} asked for\n"
            "Choose a new folder, or ask for the same to continue it."
        )


def _append(path: Path, outcome: Outcome) -> None:
    with disk_errors(path), open(path, "ab", buffering=0) as handle:
        append_whole(handle.fileno(), json.dumps(asdict(outcome)).encode() + b"\n")
        os.fsync(handle.fileno())


def _read_outcomes(output: Path, seeds: list[int]) -> list[Outcome]:
    """Outcomes that are known already; they are a beginning of ``seeds``."""
    path = output / LOG
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text().split("\n")
    try:
        outcomes = [Outcome(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{path}: is damaged ({error}). Record into a new folder.") from error
    if _unfinished:
        # A line cut off by a crash would swallow the next one.
        with disk_errors(path), open(path, "r+b") as handle:
            handle.truncate(path.stat().st_size - len(_unfinished.encode()))
    if [outcome.seed for outcome in outcomes] != seeds[: len(outcomes)]:
        raise ConfigError(f"{output}: holds rollouts from other initial conditions. Choose a new folder.")
    return outcomes
