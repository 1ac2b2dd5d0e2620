"""Reinforcement as a run folder: checkpoints in the format of every policy, metrics, and exact continuation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from simtoreal.envs.errors import ConfigError
from simtoreal.envs.provenance import provenance
from simtoreal.policies import checkpoint as checkpoints
from simtoreal.policies.base import Policy
from simtoreal.policies.checkpoint import LoadedPolicy, load_policy
from simtoreal.policies.chunk_rollout import Starts
from simtoreal.policies.reinforcement import Anchor, Reinforcement
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.policies.trainer import FORMAT_VERSION
from simtoreal.policies.training_log import TrainingLog, read_metrics

Learner = Callable[[Policy, ReinforcementConfig, Anchor | None], Reinforcement]


@dataclass(frozen=True, kw_only=True)
class ReinforcementResult:
    """Outcome of a run.

    Attributes:
        run: folder, which :func:`~simtoreal.policies.checkpoint.load_policy` accepts.
        iterations: done in all, with those of the run that it continues.
        metrics: one mapping per iteration of this run; ``step`` is the number of the iteration, from 1.
    """

    run: Path
    iterations: int
    metrics: list[dict[str, Any]]

    def since(self, iteration: int) -> ReinforcementResult:
        """Return the same without the metrics of iterations up to ``iteration``."""
        return dataclasses.replace(self, metrics=[line for line in self.metrics if line["step"] > iteration])

    @property
    def control_steps(self) -> int:
        """Control steps taken in the environment."""
        return sum(int(line["control_steps"]) for line in self.metrics)

    @property
    def rollouts(self) -> int:
        """Episodes begun in the environment."""
        return sum(int(line["rollouts"]) + int(line["dropped_rollouts"]) for line in self.metrics)

    @property
    def dropped_rollouts(self) -> int:
        """Episodes in which the environment failed; nothing was learned from them."""
        return sum(int(line["dropped_rollouts"]) for line in self.metrics)


def reinforce(
    policy: str | Path,
    config: ReinforcementConfig,
    env: VectorEnv,
    output: str | Path,
    *,
    iterations: int,
    previous: str | Path | None = None,
    starts: Callable[[Reinforcement], Starts] | None = None,
    anchor: Callable[[Policy], Anchor] | None = None,
    learner: Learner | None = None,
    most_control_steps: int | None = None,
    seeds: Sequence[int] = (),
    checkpoint_every: int = 1,
    device: str | None = None,
    on_iteration: Callable[[int, dict[str, Any]], None] = lambda iteration, metrics: None,
) -> ReinforcementResult:
    """Improve a policy in ``env`` and leave checkpoints in ``output/checkpoints``.

    A run that is there already is continued, bit by bit on a CPU with the same number of threads.

    Args:
        policy: run or checkpoint folder of the policy to begin with.
        config: how to improve it.
        env: where; see :func:`~simtoreal.policies.chunk_rollout.collect_rollouts`.
        output: run folder.
        iterations: number of the last iteration, those of ``previous`` included.
        previous: run of this function to go on from, with its moments and counters, in another environment for
            instance; it takes the place of ``policy``.
        starts: where the rollouts of the learner's current iteration begin; default: seeds from ``config.first_seed``.
        anchor: makes the imitation loss for the policy; only used if ``config.anchor_weight`` is positive.
        learner: makes the learner, :class:`Reinforcement` by default.
        most_control_steps: end before the iteration that would probably take more than this in ``env``.
        seeds: further initial conditions that the policy has learned from, which no evaluation may reuse.
        checkpoint_every: iterations between checkpoints.
        device: torch device; None picks a GPU if there is one.
        on_iteration: called with the number and metrics of every iteration.

    Raises:
        ConfigError: ``output`` holds a run with other settings, or the policy cannot be improved.
        CheckpointError: a checkpoint cannot be read or written.
        EmbodimentMismatchError: policy and environment do not fit.
        SimtorealError: every rollout was dropped, or the loss stopped being finite.
    """
    output = Path(output)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = checkpoints.complete_checkpoints(output)
    continued = found[-1] if found else (Path(previous) if previous is not None else None)
    loaded = load_policy(continued or policy, chosen)
    if found:
        _require_same(loaded, config)
    make = learner or (lambda policy, config, anchor: Reinforcement(policy, config, anchor=anchor))
    anchored = anchor(loaded.policy) if anchor is not None and config.anchor_weight > 0 else None
    current = make(loaded.policy, config, anchored)
    if continued is not None:
        current.load_state_dict(checkpoints.load_tensors(loaded.folder / checkpoints.STATE))
    if current.iteration > iterations:
        raise ConfigError(f"{loaded.folder} is beyond iteration {iterations} already; choose another folder")
    first = int(loaded.training["reinforcement"]["first"]) if found else current.iteration
    save = _Saver(output, loaded, config, str(policy), first, seeds)
    output.mkdir(parents=True, exist_ok=True)
    checkpoints.clear_leftovers(output)
    if not found:
        # Also a run without an iteration, or one that is interrupted in its first, has a policy.
        save(current)
    with TrainingLog(output, first_step=current.iteration, last_step=iterations, progress=False) as log:
        while current.iteration < iterations and _affordable(output, most_control_steps):
            metrics = current.iterate(env, starts(current) if starts is not None else None)
            log.write(current.iteration, metrics)
            on_iteration(current.iteration, metrics)
            if current.iteration % checkpoint_every == 0:
                save(current)
    save(current)
    return ReinforcementResult(run=output, iterations=current.iteration, metrics=read_metrics(output))


def _affordable(output: Path, most: int | None) -> bool:
    if most is None:
        return True
    taken = [int(line["control_steps"]) for line in read_metrics(output)]
    return sum(taken) + (taken[-1] if taken else 0) <= most


@dataclass(frozen=True)
class _Saver:
    output: Path
    base: LoadedPolicy
    config: ReinforcementConfig
    initial: str
    first: int
    seeds: Sequence[int]

    def __call__(self, learner: Reinforcement) -> None:
        """Write a checkpoint unless there is one of this iteration."""
        found = checkpoints.complete_checkpoints(self.output)
        if found and int(found[-1].name) == learner.iteration:
            return
        data = dict(self.base.training.get("data") or {})
        known = {int(seed) for seed in data.get("seeds") or ()}
        data["seeds"] = sorted(known | {int(seed) for seed in self.seeds})
        training = {
            "format_version": FORMAT_VERSION,
            "step": learner.iteration,
            "reinforcement": {
                "config": checkpoints.plain_config(self.config), "initial": self.initial, "first": self.first,
                "updates": learner.updates,
            },
            "parameters": sum(parameter.numel() for parameter in learner.policy.parameters()),
            "data": data,
            "task": self.base.task,
            "provenance": provenance([self.config.seed]),
        }  # fmt: skip
        checkpoints.save_checkpoint(
            self.output, learner.iteration, learner.policy, weights=learner.policy.state_dict(),
            state=learner.state_dict(), training=training,
        )  # fmt: skip


def _require_same(loaded: LoadedPolicy, config: ReinforcementConfig) -> None:
    stored = (loaded.training.get("reinforcement") or {}).get("config")
    now = checkpoints.plain_config(config)
    if stored == now:
        return
    if not isinstance(stored, dict):
        raise ConfigError(f"{loaded.folder} is not a run of reinforcement; choose another folder")
    keys = [key for key in {**stored, **now} if stored.get(key) != now.get(key)]
    listed = "\n  ".join(f"{key}: {stored.get(key)} there, {now.get(key)} now" for key in keys)
    raise ConfigError(
        f"cannot continue {loaded.folder}: it was made with other settings:\n  {listed}\n"
        "Continue with the same ones, or choose another folder."
    )
