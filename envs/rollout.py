"""The only control loop over an environment: collection, evaluation and deployment all call :func:`rollout`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from simtoreal.envs.errors import ConfigError

Observation = dict[str, np.ndarray]

TASK_FAILED = "task_failed"


class Actor(Protocol):
    """What acts in a rollout: a learned policy, a scripted expert, a person.

    Attributes:
        observation_steps: number of most recent observations given to :meth:`act` (oldest first).
        execute_steps: actions taken from each chunk before :meth:`act` is asked again.
        ensembling: decay of temporal ensembling (ACT, Zhao et al. 2023), or None to use chunks as they are.

    An actor with an attribute ``embodiment`` is only let into environments of exactly this embodiment.
    """

    observation_steps: int
    execute_steps: int
    ensembling: float | None

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """Forget everything about ``slots``, which begin episodes with the given seeds."""

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """Return action chunks ``(len(slots), horizon, action_dim)``, horizon >= ``execute_steps``.

        Args:
            observation: ``(len(slots), observation_steps, ...)`` per key.
            instructions: one per slot.
            slots: indices of the environments asked for.
        """


@dataclass(frozen=True, kw_only=True)
class Step:
    """One control step of all running environments, as seen by a :class:`Listener`.

    ``slots`` are the running environments; every array has a leading axis of ``len(slots)`` and ``info``
    holds the environment's info entries indexed the same way.
    """

    slots: np.ndarray
    observation: Observation
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    next_observation: Observation
    info: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """Outcome of one episode.

    Attributes:
        episode: position in the list of seeds given to :func:`rollout`.
        seed: seed of the episode, which is also the id of its initial condition.
        success: whether the task's goal was reached.
        steps: control steps taken.
        duration_s: simulated or real time of those steps.
        milestones: name -> reached at any time.
        failure: empty on success, otherwise ``"timeout"``, ``"task_failed"`` (the task ended otherwise: its failure
            predicate held, or a foreign environment terminated) or the fault that the environment reports.
    """

    episode: int
    seed: int
    success: bool
    steps: int
    duration_s: float
    milestones: dict[str, bool]
    instruction: str
    failure: str


class Listener:
    """Receives what happens in a rollout. Every method is optional to override."""

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """A new episode begins; arrays are those of this slot (no leading axis)."""

    def on_step(self, step: Step) -> None:
        """A control step was taken by every running slot."""

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """The episode of this slot ended."""


class SingleVectorEnv(VectorEnv):  # type: ignore[misc]
    """Presents one :class:`gymnasium.Env` as a vector of one, so that one loop serves every backend."""

    def __init__(self, env: gym.Env) -> None:
        self.env = env
        self.num_envs = 1
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.observation_space = batch_space(env.observation_space, 1)
        self.action_space = batch_space(env.action_space, 1)
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self.embodiment = env.unwrapped.embodiment  # type: ignore[attr-defined]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Reset the environment; see :meth:`gymnasium.vector.VectorEnv.reset`."""
        options = {key: value for key, value in (options or {}).items() if key != "reset_mask"}
        single = seed if seed is None or isinstance(seed, int) else int(seed[0])
        observation, info = self.env.reset(seed=single, options=options or None)
        return _add_axis(observation), _add_axis(info)

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the environment with ``actions`` of shape ``(1, action_dim)``."""
        observation, reward, terminated, truncated, info = self.env.step(actions[0])
        flags = np.array([terminated]), np.array([truncated])
        return _add_axis(observation), np.array([reward], dtype=np.float64), *flags, _add_axis(info)

    def close(self, **kwargs: Any) -> None:
        """Close the environment."""
        self.env.close()


def _add_axis(content: dict[str, Any]) -> dict[str, Any]:
    def batched(value: Any) -> Any:
        if isinstance(value, dict):
            return _add_axis(value)
        if isinstance(value, str) or value is None:
            return np.array([value], dtype=object)
        return np.asarray(value)[None]

    return {key: batched(value) for key, value in content.items()}


def index_info(info: dict[str, Any], index: np.ndarray | int) -> dict[str, Any]:
    """Take rows of every per-environment entry of a vector info (nested dictionaries included)."""
    return {
        key: index_info(value, index) if isinstance(value, dict) else value[index]
        for key, value in info.items()
        if isinstance(value, dict | np.ndarray)
    }


@dataclass
class _ChunkQueue:
    """Actions still to be executed in one environment, and the chunks that overlap for ensembling."""

    execute_steps: int
    ensembling: float | None
    pending: list[np.ndarray] = field(default_factory=list)
    chunks: list[tuple[int, np.ndarray]] = field(default_factory=list)
    time: int = 0

    def needs_chunk(self) -> bool:
        return self.ensembling is not None or not self.pending

    def add(self, chunk: np.ndarray) -> None:
        if self.ensembling is None:
            self.pending = list(chunk[: self.execute_steps])
        else:
            self.chunks = [(t, c) for t, c in self.chunks if self.time < t + len(c)] + [(self.time, chunk)]

    def next(self) -> np.ndarray:
        if self.ensembling is None:
            action = self.pending.pop(0)
        else:
            # ACT weights exp(-m i) with i = 0 for the oldest prediction of this step.
            overlapping = [chunk[self.time - t] for t, chunk in self.chunks if self.time < t + len(chunk)]
            weights = np.exp(-self.ensembling * np.arange(len(overlapping)))
            action = np.average(np.stack(overlapping), axis=0, weights=weights)
        self.time += 1
        return action


def rollout(
    env: VectorEnv | gym.Env,
    actor: Actor,
    seeds: Sequence[int],
    *,
    listeners: Sequence[Listener] = (),
    reset_options: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[EpisodeResult]:
    """Run one episode per seed and return their results in the order of ``seeds``.

    Environments of a vector are refilled with the next seed as soon as their episode ends, so the number
    of environments changes the wall time but not which episodes are run.

    Args:
        env: vector environment with ``AutoresetMode.DISABLED``, or a single environment.
        actor: see :class:`Actor`.
        seeds: initial conditions, one episode each.
        listeners: told about every reset, step and episode.
        reset_options: passed to every reset.
        stop: asked before every step; True abandons the running episodes.

    Raises:
        ConfigError: the vector environment resets itself.
        EmbodimentMismatchError: the actor was made for another embodiment; lists every differing field.
    """
    vector = env if isinstance(env, VectorEnv) else SingleVectorEnv(env)
    if vector.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ConfigError("rollout needs a vector environment made with autoreset_mode=AutoresetMode.DISABLED")
    made_for = getattr(actor, "embodiment", None)
    if made_for is not None:
        made_for.require_equal(vector.unwrapped.embodiment, "the policy", "the environment")  # type: ignore[attr-defined]
    state = _Rollout(vector, actor, list(seeds), list(listeners), dict(reset_options or {}))
    state.refill(np.arange(vector.num_envs))
    while state.running.any() and not stop():
        state.step()
    return [result for result in state.results if result is not None]


class _Rollout:
    def __init__(
        self, env: VectorEnv, actor: Actor, seeds: list[int], listeners: list[Listener], options: dict[str, Any]
    ) -> None:
        self.env, self.actor, self.seeds, self.listeners, self.options = env, actor, seeds, listeners, options
        count = env.num_envs
        # A learned world imagines a whole chunk at once; see docs/interface.md.
        self.announce = None if actor.ensembling is not None else getattr(env.unwrapped, "announce", None)
        self.next_episode = 0
        self.episode = np.full(count, -1)
        self.steps = np.zeros(count, dtype=int)
        self.running = np.zeros(count, dtype=bool)
        self.queues = [_ChunkQueue(actor.execute_steps, actor.ensembling) for _ in range(count)]
        self.milestones: list[dict[str, bool]] = [{} for _ in range(count)]
        self.results: list[EpisodeResult | None] = [None] * len(seeds)
        self.observation: Observation = {}
        self.history: Observation = {}
        self.instructions: list[str] = [""] * count
        self.action = np.zeros(env.action_space.shape or (), dtype=np.float32)

    def refill(self, slots: np.ndarray) -> None:
        """Begin the next episodes in ``slots``, as far as seeds are left."""
        self.running[slots] = False
        slots = slots[: max(0, len(self.seeds) - self.next_episode)]
        if not len(slots):
            return
        episodes = self.next_episode + np.arange(len(slots))
        self.next_episode += len(slots)
        mask = np.zeros(self.env.num_envs, dtype=bool)
        mask[slots] = True
        seeds: list[int | None] = [None] * self.env.num_envs
        for slot, episode in zip(slots, episodes, strict=True):
            seeds[slot] = self.seeds[episode]
        options = dict(self.options)
        if not mask.all():
            # A first reset must reach every environment; only later ones are partial.
            if self.observation:
                options["reset_mask"] = mask
            else:
                seeds = [self.seeds[0] if seed is None else seed for seed in seeds]
        observation, info = self.env.reset(seed=seeds, options=options or None)  # type: ignore[arg-type]
        self.running[slots] = True
        self.episode[slots], self.steps[slots] = episodes, 0
        steps = self.actor.observation_steps
        # An imagined episode may begin in the middle of a real one, where the arm moves; see docs/interface.md.
        history = getattr(self.env.unwrapped, "observation_history", None)
        before: dict[str, np.ndarray] = history(slots, steps) if history is not None else {}
        for key, value in observation.items():
            if key not in self.history:
                self.history[key] = np.repeat(value[:, None], steps, axis=1)
            self.history[key][slots] = before.get(key, value[slots][:, None])
        # What the others were given last is what they act on, and what is recorded with their action.
        kept = {key: value.copy() for key, value in (self.observation or observation).items()}
        for key, value in observation.items():
            kept[key][slots] = value[slots]
        self.observation = observation = kept
        for slot in slots:
            self.queues[slot] = _ChunkQueue(self.actor.execute_steps, self.actor.ensembling)
            self.milestones[slot] = {}
            self._note_instruction(slot, info)
        self.actor.reset(slots, [self.seeds[episode] for episode in episodes])
        for slot, episode in zip(slots, episodes, strict=True):
            single = {key: value[slot] for key, value in observation.items()}
            for listener in self.listeners:
                listener.on_reset(int(slot), int(episode), self.seeds[episode], single, index_info(info, slot))

    def step(self) -> None:
        slots = np.flatnonzero(self.running)
        asking = np.array([slot for slot in slots if self.queues[slot].needs_chunk()], dtype=int)
        if len(asking):
            history = {key: value[asking] for key, value in self.history.items()}
            chunks = self.actor.act(history, [self.instructions[slot] for slot in asking], asking)
            for slot, chunk in zip(asking, chunks, strict=True):
                self.queues[slot].add(chunk)
            if self.announce is not None:
                self.announce(np.asarray(chunks[:, : self.actor.execute_steps], np.float32), asking)
        for slot in slots:
            self.action[slot] = self.queues[slot].next()
        before = self.observation
        after, reward, terminated, truncated, info = self.env.step(self.action.copy())
        self.observation = after
        for key, value in after.items():
            self.history[key] = np.concatenate([self.history[key][:, 1:], value[:, None]], axis=1)
        self.steps[slots] += 1
        for slot in slots.tolist():
            self._note_instruction(slot, info)
            for name, reached in info.get("milestones", {}).items():
                self.milestones[slot][name] = self.milestones[slot].get(name, False) or bool(reached[slot])
        step = Step(
            slots=slots,
            observation={key: value[slots] for key, value in before.items()},
            action=self.action[slots].copy(),
            reward=reward[slots],
            terminated=terminated[slots],
            truncated=truncated[slots],
            next_observation={key: value[slots] for key, value in after.items()},
            info=index_info(info, slots),
        )
        for listener in self.listeners:
            listener.on_step(step)
        ended = np.flatnonzero((terminated | truncated) & self.running)
        for slot in ended:
            self._finish(int(slot), bool(terminated[slot]), info)
        if len(ended):
            self.refill(ended)

    def _note_instruction(self, slot: int, info: dict[str, Any]) -> None:
        if "instruction" in info:
            self.instructions[slot] = str(info["instruction"][slot])

    def _finish(self, slot: int, terminated: bool, info: dict[str, Any]) -> None:
        success = bool(info["success"][slot])
        fault = str(info["sim_fault"][slot]) if "sim_fault" in info else ""
        episode = int(self.episode[slot])
        result = EpisodeResult(
            episode=episode,
            seed=self.seeds[episode],
            success=success,
            steps=int(self.steps[slot]),
            duration_s=float(self.steps[slot] * self.env.embodiment.control_period_s),  # type: ignore[attr-defined]
            milestones=dict(self.milestones[slot]),
            instruction=self.instructions[slot],
            failure="" if success else (fault or (TASK_FAILED if terminated else "timeout")),
        )
        self.results[episode] = result
        for listener in self.listeners:
            listener.on_episode(slot, result)
