"""Rollouts for reinforcement learning, one decision per action chunk, in any vector environment of the interface.

:func:`~simtoreal.envs.rollout.rollout` lets every environment ask for a chunk when it needs one. Here all decide in the
same control step, so that the policy is asked in full batches, and the random choices are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from simtoreal.envs.errors import ConfigError, SimtorealError
from simtoreal.envs.rollout import Observation
from simtoreal.policies.denoising_chain import DenoisingPolicy
from simtoreal.policies.reinforcement_config import ExplorationConfig


@dataclass(frozen=True, kw_only=True)
class Starts:
    """Where the rollouts of one iteration begin.

    Attributes:
        seeds: one per rollout; equal seeds are equal initial conditions.
        groups: ``(R,)`` which of them are compared with one another (GRPO).
        options: further reset options. Arrays have one row per rollout, which goes with its seed (``init`` of
            :class:`~simtoreal.envs.tabletop_vector.TabletopVectorEnv`); everything else is passed on as it is.
    """

    seeds: tuple[int, ...]
    groups: np.ndarray
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.seeds)
        if not count or len(self.groups) != count:
            raise ConfigError(f"{count} seeds and {len(self.groups)} groups; expected one of each per rollout")
        for key, value in self.options.items():
            if isinstance(value, np.ndarray) and len(value) != count:
                raise ConfigError(f"reset option '{key}' has {len(value)} rows for {count} rollouts")

    @classmethod
    def repeated(cls, seeds: Sequence[int], times: int, options: Mapping[str, Any] | None = None) -> Starts:
        """Return ``times`` rollouts from each initial condition, which form a group; options have a row per seed."""
        rows = np.repeat(np.arange(len(seeds)), times)
        given = {key: value[rows] if isinstance(value, np.ndarray) else value for key, value in (options or {}).items()}
        return cls(seeds=tuple(int(seeds[row]) for row in rows), groups=rows, options=given)


@dataclass(frozen=True, kw_only=True)
class ChunkRollouts:
    """R rollouts with C decisions in all. What comes after the end of a rollout is not in it, so nothing is padded.

    A rollout ends with its first success, with termination or truncation, or after the largest number of chunks.

    Attributes:
        observation: key -> ``(C, observation_steps, ...)``, images uint8, of which the policy's ``vision.image_steps``
            newest are sure to be drawn; empty if only features were asked for.
        features: float32 ``(C, F)``; see :meth:`DenoisingPolicy.features`.
        instruction: one per decision.
        chain: float32 ``(C, K + 1, horizon, A)``.
        log_prob: float32 ``(C,)`` joint log-probability of the actions that were executed.
        executed: int64 ``(C,)`` how many those were: execute_steps, or fewer at the end of a rollout.
        reward: float32 ``(C,)`` sum over the executed actions.
        rollout: int64 ``(C,)`` row of the rollout, ascending; the decisions of a rollout are in order.
        last_features: float32 ``(R, F)`` of the observation after the last action.
        terminated: bool ``(R,)`` the task is over; otherwise time was.
        success: bool ``(R,)``.
        steps: int64 ``(R,)`` control steps.
        seeds, groups: int64 ``(R,)`` see :class:`Starts`.
        faults: why rollouts were dropped, one entry per dropped rollout.
        control_steps: taken in all, those of dropped rollouts too.
    """

    observation: dict[str, Tensor]
    features: Tensor
    instruction: tuple[str, ...]
    chain: Tensor
    log_prob: Tensor
    executed: Tensor
    reward: Tensor
    rollout: Tensor
    last_features: Tensor
    terminated: Tensor
    success: Tensor
    steps: Tensor
    seeds: Tensor
    groups: Tensor
    faults: tuple[str, ...]
    control_steps: int

    def lengths(self) -> Tensor:
        """Number of decisions ``(R,)`` of every rollout."""
        return torch.bincount(self.rollout, minlength=len(self.success))

    def returns(self) -> Tensor:
        """Undiscounted sum of rewards ``(R,)`` float32."""
        return torch.zeros(len(self.success)).index_add(0, self.rollout, self.reward)


def executed_log_prob(log_prob: Tensor, executed: Tensor) -> Tensor:
    """Return the joint log-probability ``(C,)`` of the first ``executed`` ``(C,)`` of the actions ``(C, E)``."""
    counted = torch.arange(log_prob.shape[1], device=log_prob.device) < executed[:, None]
    return (log_prob * counted).sum(-1)


def collect_rollouts(
    env: VectorEnv,
    policy: DenoisingPolicy,
    starts: Starts,
    *,
    exploration: ExplorationConfig,
    noise_seed: int,
    max_chunks: int | None = None,
    keep_observations: bool = True,
) -> ChunkRollouts:
    """Let the policy act stochastically from every start.

    Environments begin the next rollout as soon as theirs is over, at the next decision of all. The noise of a rollout
    comes from its own generator, so it depends neither on the number of environments nor on its neighbours. A rollout
    whose environment reports a fault (``info["sim_fault"]``) or gives values that are not finite is dropped.

    Args:
        env: vector environment with ``AutoresetMode.DISABLED``; equal seeds must give equal initial conditions.
        policy: used in evaluation mode.
        starts: of the rollouts, any number.
        exploration: noise of the policy.
        noise_seed: decides the noise.
        max_chunks: decisions after which a rollout is cut off; None leaves the end to the environment.
        keep_observations: keep them in the result; False is for updates that begin from features.

    Raises:
        ConfigError: the environment resets itself, or gives not every key that the policy reads.
        EmbodimentMismatchError: the policy was made for another embodiment.
        SimtorealError: every rollout was dropped.
    """
    if env.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ConfigError("rollouts need a vector environment made with autoreset_mode=AutoresetMode.DISABLED")
    policy.embodiment.require_equal(env.unwrapped.embodiment, "the policy", "the environment")
    for key in policy.config.keys:
        if key not in env.single_observation_space.spaces:
            raise ConfigError(
                f"the policy reads '{key}', but the environment gives {sorted(env.single_observation_space.spaces)}"
            )
    was_training = policy.training
    policy.eval()
    try:
        collector = _Collector(env, policy, starts, exploration, noise_seed, max_chunks, keep_observations)
        with torch.no_grad():
            return collector.run()
    finally:
        policy.train(was_training)
        env.unwrapped.images_wanted = True


class _Collector:
    def __init__(
        self,
        env: VectorEnv,
        policy: DenoisingPolicy,
        starts: Starts,
        exploration: ExplorationConfig,
        noise_seed: int,
        max_chunks: int | None,
        keep_observations: bool,
    ) -> None:
        self.env, self.policy, self.starts = env, policy, starts
        self.exploration, self.noise_seed = exploration, noise_seed
        self.max_chunks, self.keep = max_chunks, keep_observations
        # Only what the next decision looks at has to be drawn.
        vision = getattr(policy.config, "vision", None)
        steps = vision.image_steps if vision else policy.config.observation_steps
        self.images_read = steps if policy.config.image_keys else 0
        count, rollouts = env.num_envs, len(starts.seeds)
        self.next, self.control_steps = 0, 0
        self.rollout = np.full(count, -1)
        self.running = np.zeros(count, bool)
        self.history: Observation = {}
        self.instructions: list[str] = [""] * count
        self.generators: dict[int, torch.Generator] = {}
        self.steps, self.chunks = np.zeros(rollouts, np.int64), np.zeros(rollouts, np.int64)
        self.success, self.terminated = np.zeros(rollouts, bool), np.zeros(rollouts, bool)
        self.faults: dict[int, str] = {}
        self.last: dict[int, Tensor] = {}
        self.decisions: list[dict[str, Any]] = []

    def run(self) -> ChunkRollouts:
        self.begin(np.arange(self.env.num_envs))
        while self.running.any() or self.next < len(self.starts.seeds):
            self.decide()
            self.begin(np.flatnonzero(~self.running))
        return self.result()

    def begin(self, slots: np.ndarray) -> None:
        """Begin the next rollouts in free ``slots``, as far as there are any left."""
        slots = slots[: len(self.starts.seeds) - self.next]
        if not len(slots):
            return
        rows = self.next + np.arange(len(slots))
        self.next += len(slots)
        first = not self.history
        # A first reset must reach every environment; those without a rollout begin like the first one.
        row_of_slot = np.zeros(self.env.num_envs, dtype=np.int64)
        row_of_slot[slots] = rows
        mask = np.isin(np.arange(self.env.num_envs), slots)
        options = {
            key: value[row_of_slot] if isinstance(value, np.ndarray) else value
            for key, value in self.starts.options.items()
        }
        if not first:
            options["reset_mask"] = mask
        seeds = [
            self.starts.seeds[row] if first or inside else None for row, inside in zip(row_of_slot, mask, strict=True)
        ]
        observation, info = self.env.reset(seed=seeds, options=options or None)
        self.rollout[slots], self.running[slots] = rows, True
        repeats = self.policy.config.observation_steps
        # An imagined episode may begin in the middle of a real one, where the arm moves.
        before = getattr(self.env.unwrapped, "observation_history", lambda slots, steps: {})(slots, repeats)
        for key in self.policy.config.keys:
            if first:
                self.history[key] = np.repeat(observation[key][:, None], repeats, axis=1)
            self.history[key][slots] = before.get(key, observation[key][slots][:, None])
        for slot, row in zip(slots, rows, strict=True):
            mixed = np.random.SeedSequence([self.noise_seed, int(row)]).generate_state(1, np.uint64)[0]
            self.generators[int(slot)] = torch.Generator().manual_seed(int(mixed))
        self.note(info)
        self.drop_faulty(info, np.zeros(self.env.num_envs))

    def decide(self) -> None:
        """Choose a chunk for every running environment, and execute it."""
        slots = np.flatnonzero(self.running)
        if not len(slots):
            return
        features = self.features(slots)
        sample = self.policy.sample_from_condition(
            self.policy.condition(features), [self.generators[int(slot)] for slot in slots], self.exploration
        )
        rows = self.rollout[slots]
        decision = {
            "rollout": rows.copy(),
            "position": self.chunks[rows],
            "features": features.cpu(),
            "instruction": np.array([self.instructions[slot] for slot in slots], dtype=object),
            "chain": sample.chain.cpu(),
            "executed": np.zeros(len(slots), np.int64),
            "reward": np.zeros(len(slots), np.float32),
        }
        for key, values in self.history.items() if self.keep else ():
            decision[f"observation/{key}"] = torch.from_numpy(values[slots])
        chunk = sample.chunk.cpu().numpy()
        if (announce := getattr(self.env.unwrapped, "announce", None)) is not None:
            announce(chunk[:, : self.policy.config.execute_steps], slots)
        for offset in range(self.policy.config.execute_steps):
            active = self.running[slots]
            if not active.any():
                break
            left = self.policy.config.execute_steps - offset
            # An episode's last picture is always drawn, but not the one before it, which some policies look at, too.
            self.env.unwrapped.images_wanted = left <= self.images_read or self.images_read > 1
            decision["reward"][active] += self.step(slots[active], chunk[active, offset])
            decision["executed"][active] += 1
        decision["log_prob"] = executed_log_prob(sample.log_prob.cpu(), torch.from_numpy(decision["executed"]))
        self.decisions.append(decision)
        self.chunks[rows] += 1
        if self.max_chunks is not None:
            self.end(slots[self.running[slots] & (self.chunks[rows] >= self.max_chunks)])

    def step(self, slots: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Take one control step in ``slots``; return their rewards."""
        everyone = np.zeros(self.env.action_space.shape, np.float32)
        everyone[slots] = actions
        observation, reward, terminated, truncated, info = self.env.step(everyone)
        for key, values in self.history.items():
            self.history[key] = np.concatenate([values[:, 1:], observation[key][:, None]], axis=1)
        self.control_steps += len(slots)
        self.steps[self.rollout[slots]] += 1
        self.note(info)
        self.drop_faulty(info, reward)
        slots_alive = slots[self.running[slots]]
        rows = self.rollout[slots_alive]
        success = np.asarray(info["success"])[slots_alive].astype(bool)
        self.success[rows] = success
        self.terminated[rows] = success | terminated[slots_alive]
        self.end(slots_alive[self.terminated[rows] | truncated[slots_alive]])
        return np.asarray(reward)[slots]

    def features(self, slots: np.ndarray) -> Tensor:
        """Features ``(len(slots), F)`` of the current observations."""
        device = self.policy.device
        tensors = {key: torch.from_numpy(values[slots]).to(device) for key, values in self.history.items()}
        return self.policy.features(tensors, [self.instructions[slot] for slot in slots])

    def note(self, info: Mapping[str, Any]) -> None:
        if "instruction" in info:
            self.instructions = [str(text) for text in info["instruction"]]

    def drop_faulty(self, info: Mapping[str, Any], reward: np.ndarray) -> None:
        """End the rollouts whose environment went wrong."""
        faults = np.array(info.get("sim_fault", [""] * self.env.num_envs), dtype=object)
        seen = {f"observation '{key}'": self.history[key][:, -1] for key in self.policy.config.state_keys}
        for name, values in {**seen, "the reward": np.asarray(reward)[:, None]}.items():
            bad = ~np.isfinite(values).all(axis=-1) & (faults == "")
            faults[bad] = f"{name} is not finite"
        for slot in np.flatnonzero(self.running & (faults != "")):
            self.faults[int(self.rollout[slot])] = str(faults[slot])
            self.running[slot] = False

    def end(self, slots: np.ndarray) -> None:
        """Remember what was seen last in ``slots``, and free them."""
        if len(slots):
            features = self.features(slots).cpu()
            self.last.update({int(self.rollout[slot]): row for slot, row in zip(slots, features, strict=True)})
            self.running[slots] = False

    def result(self) -> ChunkRollouts:
        rows = np.array([row for row in range(len(self.starts.seeds)) if row not in self.faults], dtype=np.int64)
        if not len(rows):
            raise SimtorealError(
                f"all {len(self.faults)} rollouts were dropped; the first because of: {self.faults[0]}. "
                "Look at the environment with 'simtoreal view' or check_robot_env."
            )
        merged = {key: _concatenate([decision[key] for decision in self.decisions]) for key in self.decisions[0]}
        order = np.lexsort([merged.pop("position"), merged["rollout"]])
        order = order[np.isin(merged["rollout"][order], rows)]
        merged = {key: values[order] for key, values in merged.items()}
        groups = np.asarray(self.starts.groups)
        return ChunkRollouts(
            observation={
                key.removeprefix("observation/"): values
                for key, values in merged.items()
                if key.startswith("observation/")
            },
            features=merged["features"],
            instruction=tuple(merged["instruction"]),
            chain=merged["chain"],
            log_prob=merged["log_prob"],
            executed=torch.from_numpy(merged["executed"]),
            reward=torch.from_numpy(merged["reward"]),
            rollout=torch.from_numpy(np.searchsorted(rows, merged["rollout"])),
            last_features=torch.stack([self.last[int(row)] for row in rows]),
            terminated=torch.from_numpy(self.terminated[rows]),
            success=torch.from_numpy(self.success[rows]),
            steps=torch.from_numpy(self.steps[rows]),
            seeds=torch.tensor([self.starts.seeds[row] for row in rows], dtype=torch.int64),
            groups=torch.from_numpy(groups[rows]),
            faults=tuple(self.faults[row] for row in sorted(self.faults)),
            control_steps=self.control_steps,
        )


def _concatenate(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)
