"""Run a policy on many initial conditions and keep what happened, episode by episode."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

from simtoreal.envs.errors import ConfigError
from simtoreal.envs.files import explained_disk_errors, write_json
from simtoreal.envs.provenance import provenance
from simtoreal.envs.rollout import Actor, EpisodeResult, Listener, rollout
from simtoreal.envs.task import TaskSpec
from simtoreal.evaluation.outside import OutsideView
from simtoreal.evaluation.results import (
    RESULTS_FILE,
    EvaluationError,
    append_episode,
    load_evaluation,
    read_episodes,
    summarize,
)
from simtoreal.evaluation.sessions import Session, read_sessions, total_seconds
from simtoreal.evaluation.videos import EpisodeVideos, list_videos

# Collection uses seeds from 0 upwards; evaluation starts here, so that no initial condition was ever demonstrated.
FIRST_SEED = 100_000
SETTINGS_FILE = "settings.json"
# Of files that may say something else under the same name by now; earlier versions did not note all of them.
DIGESTS = {"task_digest": "the task's file was changed", "robot_digest": "the robot's topics or limits were changed"}


class _Writer(Listener):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        append_episode(self.folder, result)


def check_unseen(seeds: Sequence[int], training_seeds: Collection[int], *, allowed: bool = False) -> str:
    """Make sure that no initial condition of the evaluation was demonstrated.

    Args:
        seeds: of the evaluation.
        training_seeds: of the demonstrations.
        allowed: return a warning instead of raising.

    Returns:
        Empty, or the warning to print with the result.

    Raises:
        ConfigError: seeds overlap and ``allowed`` is False.
    """
    common = sorted(set(seeds) & set(training_seeds))
    if not common:
        return ""
    message = (
        f"{len(common)} of {len(seeds)} evaluation seeds are initial conditions of the training demonstrations "
        f"({common[0]}{f' to {common[-1]}' if len(common) > 1 else ''})"
    )
    if allowed:
        return f"{message}: the success rate says little about unseen conditions"
    raise ConfigError(f"{message}. Use --seed {FIRST_SEED}, or --allow-training-seeds to measure memorisation")


def task_digest(task: TaskSpec) -> str:
    """Return a short digest of everything that a task says, to tell tasks of one name apart."""
    # Not sorted by name: positions are drawn in the order of the objects.
    return hashlib.sha256(json.dumps(task.to_dict()).encode()).hexdigest()[:16]


def check_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Remember what decides the outcome of an evaluation, or refuse to continue a different one.

    Returns:
        The settings to store with the results: without digests that the version that began the folder did not note,
        since nobody knows them of its episodes.

    Raises:
        EvaluationError: the folder holds an evaluation with other settings.
    """
    path = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))  # As it will be read back: tuples become lists.
    if not path.is_file():
        if read_episodes(folder) or (folder / RESULTS_FILE).is_file():
            raise EvaluationError(f"{folder} holds results but no {SETTINGS_FILE}; choose another --output")
        with explained_disk_errors(path, EvaluationError, "Free space and run the same command again."):
            write_json(path, settings)
        return settings
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise EvaluationError(f"{path} is damaged ({error}); choose another --output") from error
    settings = {key: value for key, value in settings.items() if key not in DIGESTS or key in stored}
    differing = [key for key in {**stored, **settings} if stored.get(key) != settings.get(key)]
    if "policy" in differing and settings.get("checkpoint") and "checkpoint" not in differing:
        differing.remove("policy")  # The same policy in a run that was moved.
    if differing:
        lines = [
            f"{key}: {stored.get(key)!r} there, {settings.get(key)!r} now"
            + (f" ({DIGESTS[key]})" if key in DIGESTS else "")
            for key in differing
        ]
        raise EvaluationError(
            f"{folder} holds a different evaluation:\n  " + "\n  ".join(lines) + "\n"
            "Choose another --output, or delete the folder to evaluate again."
        )
    return settings


def evaluate(
    env: gym.vector.VectorEnv | gym.Env,
    actor: Actor,
    seeds: Sequence[int],
    folder: Path,
    settings: dict[str, Any],
    *,
    videos: int = 3,
    outside: OutsideView | None = None,
    recorder: EpisodeVideos | None = None,
    listeners: Sequence[Listener] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Run one episode per seed, skipping those already in ``folder``, and write the evaluation folder.

    A finished evaluation is left as it is, so that its results name the commands that ran the episodes. Episodes are
    independent of each other, so an interrupted evaluation that is run again gives the same table up to floating-point
    differences between batch sizes.

    Args:
        env: see :func:`rollout`.
        actor: acts; called with the seed of every episode, on which its own randomness must depend.
        seeds: initial conditions.
        folder: output; see :mod:`simtoreal.evaluation.results`.
        settings: what decides the outcome (at least ``task``); stored in the results and checked on resume.
        videos: number of videos of successes, and of failures.
        outside: draws the first of each from outside too; ``env`` must record ``sim_state``.
        recorder: makes the videos instead of the one that shows the cameras of the observation.
        listeners: in addition to the writer and the videos.
        notes: warnings to keep with the result.

    Returns:
        The content of ``results.json``.

    Raises:
        EvaluationError: the folder holds another evaluation, or the disk is full.
        EmbodimentMismatchError: the actor was made for another embodiment than ``env``.
    """
    settings = check_settings(folder, settings)
    done = {result.seed for result in read_episodes(folder)}
    surplus = done - set(seeds)
    if surplus:
        raise EvaluationError(
            f"{folder} holds {len(done)} episodes, {len(surplus)} of which were not asked for now "
            f"(e.g. seed {min(surplus)}); ask for at least as many episodes, or choose another --output"
        )
    remaining = [seed for seed in seeds if seed not in done]
    if not remaining and (finished := _finished(folder)):
        return finished
    if remaining:
        embodiment = env.unwrapped.embodiment  # type: ignore[union-attr]
        visible = [key for key in embodiment.image_keys if key in env.observation_space.spaces]  # type: ignore[attr-defined]
        limit = videos if visible else 0
        if recorder is None:
            recorder = EpisodeVideos(folder / "videos", visible, embodiment.control_hz, limit, outside)
        rollout(env, actor, remaining, listeners=[_Writer(folder), Session(folder, len(done)), recorder, *listeners])
    sessions = read_sessions(folder, len(done))
    results = {
        "kind": "evaluation",
        **settings,
        "seeds": {"first": min(seeds), "last": max(seeds)},
        **summarize(read_episodes(folder)),
        "videos": list_videos(folder / "videos"),
        "notes": list(notes),
        "sessions": sessions,
        "seconds": total_seconds(sessions),
        "episodes_this_run": len(remaining),
        "provenance": provenance([min(seeds), max(seeds)]),
    }
    safe = "Every episode is stored; free space and run the same command again."
    with explained_disk_errors(folder / RESULTS_FILE, EvaluationError, safe):
        write_json(folder / RESULTS_FILE, results)
    return results


def _finished(folder: Path) -> dict[str, Any] | None:
    """Return the stored results if they are of all the episodes that are there."""
    try:
        return load_evaluation(folder).results
    except EvaluationError:
        return None
