"""Parts of a benchmark that an earlier run left: the settings that made them, their seconds, and their commits.

Beside the file or folder ``x`` of a part lies ``x.settings.json``::

    settings, seconds and commits (of all sessions), finished, killed (sessions whose seconds nobody knows)

A part is only taken for what it is while the settings are the same: its name says less than what the result's notes do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import git_commit


@dataclasses.dataclass
class Part:
    """What is known about a part.

    Attributes:
        settings: what decides it, JSON-compatible.
        seconds: wall time of all sessions that made it.
        commits: of those sessions, the first one first.
        finished: nothing is left to do.
        killed: sessions that did not come to note their seconds, or one that is running.
    """

    settings: dict[str, Any]
    seconds: float = 0.0
    commits: list[str] = dataclasses.field(default_factory=list)
    finished: bool = False
    killed: int = 0


def find_part(path: Path, settings: Mapping[str, Any]) -> Part:
    """What is known about the part at ``path``, a file or folder; a new one if there is nothing.

    Args:
        path: where the part is, or will be.
        settings: all that decides it, also through the parts that it is made from; JSON-compatible, or with dataclasses
            and what has a ``to_dict``.

    Raises:
        SystemExit: what is there was made with other settings, or nobody knows with which.
    """
    wanted, note = json.loads(json.dumps(settings, default=_plain)), _note_of(path)
    there = any(path.iterdir()) if path.is_dir() else path.exists()
    known = Part(**json.loads(note.read_text())) if note.is_file() else None
    if known is None or known.settings != wanted:
        if there:
            reason = f"there is no {note.name} beside it" if known is None else _difference(known.settings, wanted)
            raise SystemExit(
                f"{path}: was not made with these settings ({reason}). Delete it, or choose another --output."
            )
        return Part(wanted)
    # Whoever deletes a finished part wants it again, and with it its seconds.
    return Part(wanted) if known.finished and not there else known


@contextlib.contextmanager
def part(path: Path, settings: Mapping[str, Any]) -> Iterator[Part]:
    """Make a part, go on with it, or read it: what is done inside counts for it, unless it was finished before.

    Raises:
        SystemExit: see :func:`find_part`, whose arguments these are.
    """
    found = find_part(path, settings)
    if found.finished:
        yield found
        return
    if git_commit() not in found.commits:
        found.commits.append(git_commit())
    # Before anything of it is there: what is killed has settings, too.
    found.killed += 1
    write_json(_note_of(path), dataclasses.asdict(found))
    earlier, began = found.seconds, time.perf_counter()
    try:
        yield found
        found.finished = True
    finally:
        found.seconds, found.killed = earlier + time.perf_counter() - began, found.killed - 1
        write_json(_note_of(path), dataclasses.asdict(found))


def parts_of(results: Iterable[Mapping[str, Any]]) -> list[Part]:
    """What commands of simtoreal left, which keep account of their sessions themselves, as parts.

    Args:
        results: content of their ``results.json``. A stage of a co-training that another one adopts is counted once:
            its record there is a copy, to the last digit of its seconds.
    """
    counted: set[tuple[str, float]] = set()
    parts = []
    for content in results:
        stages = set(content["stages"].items()) if "stages" in content else {("", content["seconds"])}
        sessions = content.get("sessions") or [content.get("provenance", {})]
        commits = [session["commit"] for session in sessions if "commit" in session]
        parts.append(Part({}, sum(seconds for _, seconds in stages - counted), commits, finished=True))
        counted |= stages
    return parts


def notes_on(parts: Sequence[Part]) -> list[str]:
    """What a result has to say about its parts: commits other than the one that publishes them, unknown seconds."""
    commits = list(dict.fromkeys(commit for one in parts for commit in one.commits))
    killed, notes = sum(one.killed for one in parts), []
    if not set(commits) <= {git_commit()}:
        shown = (commit[:12] + ("-dirty" if commit.endswith("-dirty") else "") for commit in commits)
        notes.append(f"Its parts were made at {', '.join(shown)}; the commit below put them together.")
    if killed:
        notes.append(f"The seconds are without those of {killed} session(s) that were killed.")
    return notes


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _plain(value: Any) -> Any:
    """What JSON does not know; anything else is refused."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{value!r} cannot be compared with what is stored")


def _difference(there: Any, now: Any, name: str = "") -> str:
    """The first setting that differs."""
    if isinstance(there, dict) and isinstance(now, dict):
        key = next(key for key in {**there, **now} if there.get(key) != now.get(key))
        return _difference(there.get(key), now.get(key), f"{name}.{key}" if name else key)
    return f"{name}: {there!r} there, {now!r} now"
