"""The folder an evaluation leaves behind, whatever the backend: one line per episode and a summary with intervals.

    episodes.jsonl   one JSON object per episode, appended durably as the episodes end
    results.json     success rate with n and 95 % interval, milestones, failures, provenance
    settings.json    what decides the outcome; only the same is continued
    sessions.json    which commands ran the episodes, see :mod:`simtoreal.evaluation.sessions`

Simulation and deployment write the same files, so that ``compare`` and the report read both.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import META
from simtoreal.envs.errors import ConfigError, SimtorealError
from simtoreal.envs.files import append_whole, explained_disk_errors
from simtoreal.envs.rollout import EpisodeResult
from simtoreal.evaluation.statistics import graded_posterior, posterior_interval

EPISODES_FILE = "episodes.jsonl"
RESULTS_FILE = "results.json"


class EvaluationError(SimtorealError):
    """An evaluation folder is missing, damaged, or does not fit what is asked of it."""


def require_own_folder(folder: Path, kind: str) -> None:
    """Refuse to write into a dataset, or over the results of another command. Call it before anything that takes long.

    Args:
        folder: output folder of a command, which may not exist yet.
        kind: of this command's ``results.json``: its entry ``kind``, or the only one beside the provenance.

    Raises:
        ConfigError: the folder is no folder, cannot be written to, or holds something else.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file, and {folder} is to be a folder; choose another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{existing} cannot be written to; choose another folder, or change its permissions")
    if (folder / META).is_file():
        raise ConfigError(f"{folder} is a dataset; choose another folder for the results")
    path = folder / RESULTS_FILE
    if not path.is_file():
        return
    try:
        content = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); choose another folder") from error
    if content.get("kind") != kind and set(content) != {kind, "provenance"}:
        raise ConfigError(f"{folder} holds the results of another command; choose another folder")


def failure_tag(result: EpisodeResult) -> str:
    """Short reason of a failure: empty on success, ``"timeout:<first milestone not reached>"`` or the fault."""
    if result.success:
        return ""
    missed = next((name for name, reached in result.milestones.items() if not reached), "")
    return f"{result.failure}:{missed}" if result.failure == "timeout" and missed else result.failure


def append_episode(folder: Path, result: EpisodeResult) -> None:
    """Append one episode to the table, durably: a crash loses at most the running episodes.

    Raises:
        EvaluationError: the disk is full; the episodes before this one are safe.
    """
    path = folder / EPISODES_FILE
    line = json.dumps({**dataclasses.asdict(result), "failure_tag": failure_tag(result)}, allow_nan=False)
    safe = "The episodes before this one are stored; free space and run the same command again to continue."
    with explained_disk_errors(path, EvaluationError, safe):
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as handle:
            # A line cut off by a crash must not swallow this one.
            if handle.tell() and not _ends_with_newline(handle):
                handle.truncate(_last_line_start(handle))
            append_whole(handle.fileno(), line.encode() + b"\n")
            os.fsync(handle.fileno())


def _ends_with_newline(handle: Any) -> bool:
    handle.seek(-1, os.SEEK_END)
    return bool(handle.read(1) == b"\n")


def _last_line_start(handle: Any) -> int:
    handle.seek(0)
    return int(handle.read().rfind(b"\n")) + 1


def read_episodes(folder: Path) -> list[EpisodeResult]:
    """Return the episodes of an evaluation, ordered by seed; a last line cut off by a crash is left out.

    Raises:
        EvaluationError: a complete line is not an episode, or a seed occurs twice.
    """
    path = Path(folder) / EPISODES_FILE
    if not path.is_file():
        return []
    names = {field.name for field in dataclasses.fields(EpisodeResult)}
    *lines, _unfinished = path.read_text().split("\n")
    results: list[EpisodeResult] = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            results.append(EpisodeResult(**{name: content[name] for name in names}))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path}, line {number} is not an episode ({error!r}); delete the line or evaluate again"
            ) from error
    twice = [seed for seed, count in Counter(result.seed for result in results).items() if count > 1]
    if twice:
        raise EvaluationError(f"{path} holds seed {twice[0]} more than once; evaluate again into an empty folder")
    return sorted(results, key=lambda result: result.seed)


def summarize(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Success rate with n and 95 % interval, milestones, graded completion, time to success and failures.

    Returns:
        ``success_rate``, ``successes``, ``n``, ``interval`` ``[low, high]``; ``milestones`` name -> the same;
        ``completion`` (mean fraction of milestones and its interval); ``time_to_success_s`` (quartiles over the
        successes, or None); ``failures`` tag -> count.

    Raises:
        EvaluationError: there are no episodes.
    """
    if not results:
        raise EvaluationError("there are no episodes to summarize")
    summary = _rate([result.success for result in results])
    names = list(dict.fromkeys(name for result in results for name in result.milestones))
    reached = {name: [result.milestones.get(name, False) for result in results] for name in names}
    summary["milestones"] = {name: _rate(flags) for name, flags in reached.items()}
    summary["completion"] = _completion(results, len(names)) if names else None
    times = [result.duration_s for result in results if result.success]
    summary["time_to_success_s"] = None
    if times:
        quartiles = [float(value) for value in np.quantile(times, [0.25, 0.5, 0.75])]
        summary["time_to_success_s"] = dict(zip(("q25", "median", "q75"), quartiles, strict=True))
    summary["failures"] = dict(Counter(failure_tag(result) for result in results if not result.success).most_common())
    return summary


def _rate(flags: Sequence[bool]) -> dict[str, Any]:
    successes, n = int(sum(flags)), len(flags)
    return {
        "success_rate": successes / n,
        "successes": successes,
        "n": n,
        "interval": list(posterior_interval(successes, n)),
    }


def _completion(results: Sequence[EpisodeResult], levels: int) -> dict[str, Any]:
    counts = [0] * (levels + 1)
    for result in results:
        # The task's goal implies its milestones, also when one of them was passed between two control steps.
        counts[levels if result.success else sum(result.milestones.values())] += 1
    mean, interval = graded_posterior(counts, [level / levels for level in range(levels + 1)])
    return {"posterior_mean": mean, "interval": list(interval), "counts": counts}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation as it lies on disk.

    Attributes:
        folder: where it was read from.
        label: short name for tables and plots.
        results: content of ``results.json``.
        episodes: the table, ordered by seed.
    """

    folder: Path
    label: str
    results: dict[str, Any]
    episodes: tuple[EpisodeResult, ...]

    @property
    def task(self) -> str:
        """Name of the evaluated task."""
        return str(self.results["task"])

    @property
    def backend(self) -> str:
        """``"simulation"``, ``"twin"``, ``"robot"``, ``"gymnasium"``, ``"world_model"`` or ``"imagined"``."""
        return str(self.results.get("backend", "simulation"))

    @property
    def world(self) -> str:
        """Where it took place, e.g. ``"'standard' twin"``, ``"simulation with randomization 'hard'"``.

        Two of one name may still differ, see :func:`simtoreal.evaluation.compare.elsewhere`.
        """
        gap, varied = self.results.get("gap"), self.results.get("randomization") or "none"
        if gap:
            return f"'{gap}' {self.backend}"
        return self.backend if varied == "none" else f"{self.backend} with randomization '{varied}'"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Initial conditions, ascending."""
        return tuple(result.seed for result in self.episodes)

    @property
    def outcomes(self) -> list[bool]:
        """Success per initial condition, in the order of :attr:`seeds`."""
        return [result.success for result in self.episodes]


def load_evaluation(folder: Path | str, label: str | None = None) -> Evaluation:
    """Read an evaluation folder.

    Args:
        folder: made by ``simtoreal evaluate`` or ``simtoreal deploy``.
        label: name to use instead of the stored one.

    Raises:
        EvaluationError: files are missing, damaged, or contradict each other.
    """
    folder = Path(folder)
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise EvaluationError(
            f"{folder} is not a finished evaluation: it has no {RESULTS_FILE}. "
            "Make one with: simtoreal evaluate --policy RUN --task TASK --output DIR"
        )
    try:
        content = json.loads(path.read_text())
        task, n, successes = content["task"], content["n"], content["successes"]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} is not the result of an evaluation: expected a mapping with task, n and successes. Give the "
            "folder that 'simtoreal evaluate' or 'simtoreal deploy' wrote."
        ) from error
    if content.get("kind") == "diversity":
        raise EvaluationError(
            f"{folder} is a diversity measurement: it runs every initial condition several times and keeps no episodes "
            "to compare. Give the folder of 'simtoreal evaluate' without --diversity."
        )
    episodes = read_episodes(folder)
    counted = (len(episodes), sum(result.success for result in episodes))
    if counted != (n, successes):
        raise EvaluationError(
            f"{folder}: {RESULTS_FILE} says {successes}/{n} successes on {task}, but {EPISODES_FILE} holds "
            f"{counted[1]}/{counted[0]}; run the same evaluate command again to finish or repair it"
        )
    stored = content.get("label") or folder.name
    return Evaluation(folder=folder, label=label or str(stored), results=content, episodes=tuple(episodes))
