"""How many of the ways to do a task a policy keeps: repeated rollouts from identical initial states.

    rollouts.jsonl   one JSON object per rollout: context, rollout, success, behavior, ...
    results.json     success rate, entropies, composite score
    settings.json, sessions.json    as of every evaluation

Every context (initial condition) is run equally often. The simulation begins in exactly the same state each time, the
actor draws other noise: rollout 0 of a context is the episode that a plain evaluation runs.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from simtoreal.data_collection.diversity import (
    behaviors,
    composite_score,
    conditional_entropy,
    join,
    label_behavior,
    unconditional_entropy,
)
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.files import append_whole, explained_disk_errors, write_json
from simtoreal.envs.provenance import provenance
from simtoreal.envs.rollout import Actor, EpisodeResult, Listener, Observation, Step, rollout
from simtoreal.envs.task import TaskSpec
from simtoreal.evaluation.evaluate import check_settings
from simtoreal.evaluation.results import RESULTS_FILE, EvaluationError, failure_tag
from simtoreal.evaluation.sessions import Session, read_sessions, total_seconds
from simtoreal.evaluation.statistics import posterior_interval

ROLLOUTS_FILE = "rollouts.jsonl"
# Contexts and rollouts per context (D3IL's benchmark scripts); a single start where the task has one.
PINNED = {"avoid": (1, 100), "align": (60, 8)}
DEFAULT_CONTEXTS, DEFAULT_ROLLOUTS = 60, 8
BOOTSTRAP_DRAWS = 1000


def pinned_counts(task: str, contexts: int | None = None, rollouts: int | None = None) -> tuple[int, int]:
    """Number of contexts and of rollouts per context: those given, otherwise the task's."""
    default = PINNED.get(task, (DEFAULT_CONTEXTS, DEFAULT_ROLLOUTS))
    return default[0] if contexts is None else contexts, default[1] if rollouts is None else rollouts


class RepeatedActor:
    """Gives an actor other noise in every rollout of the same initial condition.

    Args:
        actor: acts.
        seeds: of the episodes that :func:`rollout` is going to begin, in that order.
        rollouts: number of each among the repetitions of its seed; number 0 leaves the seed as it is.
    """

    def __init__(self, actor: Actor, seeds: Sequence[int], rollouts: Sequence[int]) -> None:
        self.actor, self.seeds, self.rollouts, self.begun = actor, list(seeds), list(rollouts), 0
        self.observation_steps, self.execute_steps = actor.observation_steps, actor.execute_steps
        self.ensembling = actor.ensembling
        self.embodiment = getattr(actor, "embodiment", None)

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """Begin the next episodes; see :class:`Actor`."""
        upcoming = slice(self.begun, self.begun + len(slots))
        if list(seeds) != self.seeds[upcoming]:
            raise ValueError("episodes begin in another order than announced")
        mixed = [repeated_seed(seed, number) for seed, number in zip(seeds, self.rollouts[upcoming], strict=True)]
        self.begun += len(slots)
        self.actor.reset(slots, mixed)

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """See :class:`Actor`."""
        return self.actor.act(observation, instructions, slots)


def repeated_seed(seed: int, number: int) -> int:
    """Seed of the actor's noise in repetition ``number`` of an initial condition."""
    return int(seed) if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class _Writer(Listener):
    """Logs poses, labels every finished rollout and appends it to the table, durably."""

    def __init__(self, path: Path, task: TaskSpec, rollouts: Sequence[int]) -> None:
        self.path, self.task, self.rollouts = path, task, list(rollouts)
        self.logs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        self.logs[slot] = [(observation["proprio"].copy(), observation["object_state"].copy())]

    def on_step(self, step: Step) -> None:
        after = step.next_observation
        for row, slot in enumerate(step.slots):
            self.logs[int(slot)].append((after["proprio"][row].copy(), after["object_state"][row].copy()))

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        proprio, state = (np.stack(part) for part in zip(*self.logs.pop(slot), strict=True))
        found = label_behavior(self.task, proprio, state) if result.success else None
        row = {
            "context": result.seed,
            "rollout": self.rollouts[result.episode],
            "success": result.success,
            "behavior": None if found is None else join(found),
            "steps": result.steps,
            "failure_tag": failure_tag(result),
        }
        safe = "The rollouts before this one are stored; free space and run the same command again to continue."
        with explained_disk_errors(self.path, EvaluationError, safe):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as handle:
                append_whole(handle.fileno(), json.dumps(row).encode() + b"\n")
                os.fsync(handle.fileno())


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Rows of ``rollouts.jsonl``, ordered by context and rollout; a last line cut off by a crash is removed.

    Raises:
        EvaluationError: a complete line is not a rollout, or one occurs twice.
    """
    path = folder / ROLLOUTS_FILE
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    rows = []
    for number, line in enumerate(complete.decode().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append(
                {key: row[key] for key in ("context", "rollout", "success", "behavior", "steps", "failure_tag")}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path}, line {number} is not a rollout ({error!r}); evaluate again") from error
    keys = Counter((row["context"], row["rollout"]) for row in rows)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise EvaluationError(f"{path} holds rollout {twice[0][1]} of context {twice[0][0]} more than once")
    return sorted(rows, key=lambda row: (row["context"], row["rollout"]))


def evaluate_diversity(
    env: gym.vector.VectorEnv,
    actor: Actor,
    contexts: Sequence[int],
    rollouts: int,
    folder: Path,
    settings: dict[str, Any],
    *,
    listeners: Sequence[Listener] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Run every context ``rollouts`` times, skipping what is in ``folder`` already, and write the folder.

    A finished measurement is left as it is: its results name the commands that made it.
    Exactly ``len(contexts) * rollouts`` rollouts are run, whatever the number of environments.

    Args:
        env: simulation of a task with ``behaviors``.
        actor: acts; its randomness must depend on the seeds it is reset with.
        contexts: seeds of the initial conditions.
        rollouts: per context.
        folder, settings, listeners, notes: as for :func:`simtoreal.evaluation.evaluate.evaluate`.

    Raises:
        ConfigError: the task names no behaviours, or a count is below 1.
        EvaluationError: the folder holds another evaluation, or the disk is full.
    """
    if rollouts < 1 or not contexts:
        raise ConfigError(f"{len(contexts)} contexts and {rollouts} rollouts of each; expected at least 1")
    task = env.unwrapped.task  # type: ignore[attr-defined]
    behaviors(task)
    settings = {**settings, "kind": "diversity", "contexts": len(contexts), "rollouts": rollouts}
    settings = check_settings(folder, settings)
    done = {(row["context"], row["rollout"]) for row in read_rollouts(folder)}
    wanted = [(seed, number) for seed in contexts for number in range(rollouts)]
    if done - set(wanted):
        raise EvaluationError(f"{folder} holds rollouts that were not asked for now; choose another --output")
    remaining = [pair for pair in wanted if pair not in done]
    if not remaining and (finished := _finished(folder, len(wanted))):
        return finished
    if remaining:
        seeds, numbers = [seed for seed, _ in remaining], [number for _, number in remaining]
        writer = _Writer(folder / ROLLOUTS_FILE, task, numbers)
        rollout(
            env, RepeatedActor(actor, seeds, numbers), seeds, listeners=[writer, Session(folder, len(done)), *listeners]
        )
    sessions = read_sessions(folder, len(done))
    results = {
        **settings,
        "seeds": {"first": min(contexts), "last": max(contexts)},
        **summarize_diversity(task, read_rollouts(folder), rollouts),
        "notes": list(notes),
        "sessions": sessions,
        "seconds": total_seconds(sessions),
        "provenance": provenance([min(contexts), max(contexts)]),
    }
    safe = "Every rollout is stored; free space and run the same command again."
    with explained_disk_errors(folder / RESULTS_FILE, EvaluationError, safe):
        write_json(folder / RESULTS_FILE, results)
    return results


def _finished(folder: Path, count: int) -> dict[str, Any] | None:
    """Return the stored results if they are of all rollouts."""
    try:
        results = json.loads((folder / RESULTS_FILE).read_text())
        return results if results["n"] == count else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def summarize_diversity(task: TaskSpec, rows: Sequence[dict[str, Any]], rollouts: int) -> dict[str, Any]:
    """Success and entropies of rollouts.

    Args:
        task: with ``behaviors``.
        rows: as read by :func:`read_rollouts`.
        rollouts: per context.

    Returns:
        ``success_rate``, ``successes``, ``n``, ``interval``; ``entropy`` (all contexts together) and
        ``conditional_entropy``, each also ``_miller_madow`` and with a 95 % bootstrap interval over contexts and then
        rollouts; ``score`` (D3IL's composite); ``unlabelled``, ``behaviors`` text -> successes, ``failures``.
    """
    names = [join(behavior) for behavior in behaviors(task)]
    table = behavior_table(task, rows, rollouts)
    counts = _count(table, len(names))
    successes, n = sum(row["success"] for row in rows), len(rows)
    entropy = unconditional_entropy(counts.sum(0))
    pooled, conditional = _bootstrap(table, len(names))
    return {
        "success_rate": successes / n,
        "successes": successes,
        "n": n,
        "interval": list(posterior_interval(successes, n)),
        "entropy": entropy,
        "entropy_interval": pooled,
        "entropy_miller_madow": unconditional_entropy(counts.sum(0), miller_madow=True),
        "conditional_entropy": conditional_entropy(counts, rollouts),
        "conditional_entropy_interval": conditional,
        "conditional_entropy_miller_madow": conditional_entropy(counts, rollouts, miller_madow=True),
        "score": composite_score(task.name, successes / n, entropy),
        "unlabelled": successes - int(counts.sum()),
        "behaviors": {name: int(count) for name, count in zip(names, counts.sum(0), strict=True) if count},
        "failures": dict(Counter(row["failure_tag"] for row in rows if not row["success"]).most_common()),
    }


def behavior_table(task: TaskSpec, rows: Sequence[dict[str, Any]], rollouts: int) -> np.ndarray:
    """``(S, R)`` index of the behaviour in :func:`behaviors`; -1 for failures and successes that made no choice."""
    names = [join(behavior) for behavior in behaviors(task)]
    place = {context: index for index, context in enumerate(dict.fromkeys(row["context"] for row in rows))}
    table = np.full((len(place), rollouts), -1)
    for row in rows:
        if row["success"] and row["behavior"] is not None:
            table[place[row["context"]], row["rollout"]] = names.index(row["behavior"])
    return table


def resample(table: np.ndarray, labels: int, rng: np.random.Generator) -> tuple[float, float]:
    """Unconditional and conditional entropy of one bootstrap draw over contexts and then rollouts.

    Resampling loses behaviours as sampling does; the Miller-Madow correction keeps the draws around the measured value.
    """
    contexts, rollouts = table.shape
    rows = rng.integers(contexts, size=(contexts, 1))
    counts = _count(table[rows, rng.integers(rollouts, size=(contexts, rollouts))], labels)
    return unconditional_entropy(counts.sum(0), miller_madow=True), conditional_entropy(
        counts, rollouts, miller_madow=True
    )


def _count(table: np.ndarray, labels: int) -> np.ndarray:
    """``(S, B)`` successes per context and behaviour of a table ``(S, R)``."""
    return (table[:, :, None] == np.arange(labels)).sum(axis=1)


def _bootstrap(table: np.ndarray, labels: int) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(0)
    draws = [resample(table, labels, rng) for _ in range(BOOTSTRAP_DRAWS)]
    pooled, conditional = np.quantile(draws, [0.025, 0.975], axis=0).T.tolist()
    return pooled, conditional
