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
from simtoreal.evaluation.bootstrap import interval, resample_counts
from simtoreal.evaluation.evaluate import check_settings
from simtoreal.evaluation.results import RESULTS_FILE, EvaluationError, failure_tag
from simtoreal.evaluation.sessions import Session, read_sessions, total_seconds
from simtoreal.evaluation.statistics import FEWEST_CONTEXTS, repeated_interval

ROLLOUTS_FILE = "rollouts.jsonl"
# Contexts and rollouts per context (D3IL's benchmark scripts); a single start where the task has one.
PINNED = {"avoid": (1, 100), "align": (60, 8)}
DEFAULT_CONTEXTS, DEFAULT_ROLLOUTS = 60, 8
BOOTSTRAP_DRAWS = 1000
# Entropies of one way differ from 0 by as much as this, from the rounding of shares.
_SMALLEST_SPREAD = 1e-9


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
    """Return the stored results if they are of all rollouts.

    Earlier versions stored intervals that were wrong, and no ``entropy_corrected``; those are summarised again.
    """
    try:
        results = json.loads((folder / RESULTS_FILE).read_text())
        return results if results["n"] == count and "entropy_corrected" in results else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def summarize_diversity(task: TaskSpec, rows: Sequence[dict[str, Any]], rollouts: int) -> dict[str, Any]:
    """Success and entropies of rollouts.

    Args:
        task: with ``behaviors``.
        rows: as read by :func:`read_rollouts`.
        rollouts: per context.

    Returns:
        ``success_rate``, ``successes``, ``n``, ``interval`` (over contexts, see
        :func:`simtoreal.evaluation.statistics.repeated_interval`) and ``contexts``, their number.

        ``entropy`` of all contexts together, as D3IL counts it, which small samples make too low;
        ``entropy_miller_madow``; ``entropy_corrected`` and its 95 % ``entropy_interval``, see :func:`corrected_draws`:
        the interval belongs to this estimate and to no other.

        ``conditional_entropy``, as D3IL counts it, and its 95 % ``conditional_entropy_interval``: of what this number
        of rollouts per context shows on average over contexts. The entropy that the policy really has given the context
        is no lower, and **no interval of it is given**: with few rollouts per context the bias does not get smaller
        with more contexts, and neither Miller-Madow (``conditional_entropy_miller_madow``) nor the bootstrap removes
        it.

        ``score`` (D3IL's composite); ``unlabelled``, ``behaviors`` text -> successes, ``failures``. Intervals are None
        where there is too little to tell, see :func:`interval_of`.
    """
    names = [join(behavior) for behavior in behaviors(task)]
    table = behavior_table(task, rows, rollouts)
    counts = count_table(table, len(names))
    per_context = Counter(row["context"] for row in rows if row["success"])
    reached = [per_context[context] for context in dict.fromkeys(row["context"] for row in rows)]
    successes, n = sum(reached), len(rows)
    draws = entropy_draws(counts, rollouts)
    pooled, conditional = corrected_draws(draws[:, 0]), draws[:, 1]
    independent = rollouts if len(counts) == 1 else len(counts)
    return {
        "success_rate": successes / n,
        "successes": successes,
        "n": n,
        "contexts": len(counts),
        "interval": list(repeated_interval(reached, rollouts)),
        "entropy": unconditional_entropy(counts.sum(0)),
        "entropy_corrected": float(pooled[0]),
        "entropy_interval": interval_of(pooled, independent),
        "entropy_miller_madow": unconditional_entropy(counts.sum(0), miller_madow=True),
        "conditional_entropy": conditional_entropy(counts, rollouts),
        # A single context says nothing about others.
        "conditional_entropy_interval": interval_of(conditional, len(counts)),
        "conditional_entropy_miller_madow": conditional_entropy(counts, rollouts, miller_madow=True),
        "score": composite_score(task.name, successes / n, unconditional_entropy(counts.sum(0))),
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


def count_table(table: np.ndarray, labels: int) -> np.ndarray:
    """``(S, B)`` successes per context and behaviour of a table ``(S, R)``."""
    return (table[:, :, None] == np.arange(labels)).sum(axis=1)


def entropy_draws(counts: np.ndarray, rollouts: int, draws: int = BOOTSTRAP_DRAWS) -> np.ndarray:
    """Unconditional and conditional entropy as D3IL counts them, ``(1 + draws, 2)``: measured, and bootstrap draws.

    Contexts are drawn with all their rollouts, or the rollouts of a single context. Drawing rollouts within drawn
    contexts, too, would count their noise twice. The same number of contexts is always drawn alike, so that draws of
    several policies on the same contexts can be subtracted. Draws lose rare behaviours as samples do: as they are, they
    lie too low, see :func:`corrected_draws`. Their spread around their mean is widened as Student's t widens an
    interval of few values, so the unconditional ones may leave [0, 1].

    Args:
        counts: ``(S, B)`` successes per context and behaviour.
        rollouts: per context, successful or not.
        draws: number of draws.
    """
    contexts = len(counts)
    if contexts == 1:
        shares = np.append(counts[0], rollouts - counts[0].sum()) / rollouts
        drawn = np.random.default_rng(0).multinomial(rollouts, shares, size=draws)[:, :-1]
        pooled = conditional = np.array([unconditional_entropy(row) for row in (counts[0], *drawn)])
    else:
        weights = resample_counts(contexts, draws)
        pooled = np.array([unconditional_entropy(row) for row in weights @ counts])
        conditional = weights @ np.array([conditional_entropy(row[None], rollouts) for row in counts]) / contexts
    independent = rollouts if contexts == 1 else contexts
    return np.stack([_widened(pooled, independent), np.clip(_widened(conditional, independent), 0.0, 1.0)], axis=1)


def _widened(draws: np.ndarray, independent: int) -> np.ndarray:
    """Draws ``(1 + D,)``, measured first, with the spread that a t interval of ``independent`` values has."""
    from scipy.stats import norm, t

    if independent < FEWEST_CONTEXTS:
        return draws  # There will be no interval.
    factor = float(t.ppf(0.975, independent - 1) / norm.ppf(0.975)) * np.sqrt(independent / (independent - 1))
    mean = draws[1:].mean()
    return np.append(draws[0], mean + factor * (draws[1:] - mean))


def corrected_draws(draws: np.ndarray) -> np.ndarray:
    """Draws ``(1 + D,)`` of an entropy without the bias of small samples, estimate first, in [0, 1].

    What the draws lose on average against the measured value is what that lost against the truth (the bootstrap's
    estimate of the bias), so it is added to the value, and the draws are shifted to it. In contrast to Miller-Madow,
    which counts rollouts, this knows how much those of one context are alike.

    In simulations the 95 % interval of these draws held the truth in 96 to 100 % of measurements of even and near-even
    policies and in 84 to 96 % of uneven ones (docs/diversity.md): with 100 rollouts many rare ways are never seen, and
    no correction knows of those.
    """
    mean = draws[1:].mean()
    # Even where a sample is more even than chance makes it, the truth is at most 1, and the interval keeps its width.
    estimate = np.clip(2 * draws[0] - mean, 0.0, 1.0)
    return np.clip(np.append(estimate, draws[1:] + estimate - mean), 0.0, 1.0)


def interval_of(draws: np.ndarray, independent: int) -> list[float] | None:
    """95 % percentile interval of draws ``(1 + D,)``, estimate first.

    Args:
        draws: of an entropy, see :func:`entropy_draws` and :func:`corrected_draws`, or of a difference of two.
        independent: number of what was drawn: contexts, or rollouts of a single context.

    Returns:
        None for fewer than :data:`~simtoreal.evaluation.statistics.FEWEST_CONTEXTS` of them, and where nothing varies
        (a single way, no success): a bootstrap knows nothing of what was never seen.
    """
    if independent < FEWEST_CONTEXTS or np.ptp(draws) < _SMALLEST_SPREAD:
        return None
    return interval(np.clip(draws[1:], -1.0, 1.0))
