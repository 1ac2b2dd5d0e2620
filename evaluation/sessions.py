"""Which commands made an evaluation: one entry per session, since an interrupted one is continued by another.

``sessions.json`` is written anew after every episode, so that a session that was killed is known, too. Each entry holds
``command``, ``commit``, ``seconds`` (until its last episode; None if unknown) and ``episodes``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simtoreal.envs.files import explained_disk_errors, write_json
from simtoreal.envs.provenance import provenance
from simtoreal.envs.rollout import EpisodeResult, Listener
from simtoreal.evaluation.results import RESULTS_FILE, EvaluationError

SESSIONS_FILE = "sessions.json"


class Session(Listener):
    """Notes the episodes of the session that runs now. Listens after what stores them.

    Args:
        folder: of the evaluation.
        done: episodes that earlier sessions left there.

    Raises:
        EvaluationError: see :func:`read_sessions`, or, while it runs, the disk is full.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self.started, self.path = time.monotonic(), folder / SESSIONS_FILE
        self.earlier, self.episodes = read_sessions(folder, done), 0
        made = provenance()
        self.source = {"command": made["command"], "commit": made["commit"]}

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """Note one more episode."""
        self.episodes += 1
        entry = {**self.source, "seconds": time.monotonic() - self.started, "episodes": self.episodes}
        safe = "The episodes up to this one are stored; free space and run the same command again to continue."
        with explained_disk_errors(self.path, EvaluationError, safe):
            write_json(self.path, [*self.earlier, entry])


def read_sessions(folder: Path, done: int) -> list[dict[str, Any]]:
    """Return the sessions of an evaluation, oldest first.

    Args:
        folder: of the evaluation; earlier versions kept no list, and only the last session in the results.
        done: episodes that it holds.

    Raises:
        EvaluationError: the list is damaged.
    """
    path = folder / SESSIONS_FILE
    if path.is_file():
        try:
            return [dict(entry) for entry in json.loads(path.read_text())]
        except (ValueError, TypeError) as error:
            raise EvaluationError(
                f"{path} is damaged ({error}); delete it to continue without knowing who made the episodes so far"
            ) from error
    if not done:
        return []
    try:
        results = json.loads((folder / RESULTS_FILE).read_text())
        source = {key: results["provenance"][key] for key in ("command", "commit")}
        return [{**source, "seconds": results["seconds"], "episodes": results["n"]}]
    except (OSError, ValueError, KeyError, TypeError):
        return [{"command": "", "commit": "unknown", "seconds": None, "episodes": done}]


def total_seconds(sessions: Sequence[dict[str, Any]]) -> float:
    """Return the duration of all sessions together, as far as it is known."""
    return float(sum(entry.get("seconds") or 0.0 for entry in sessions))
