"""The stages of a co-training: what each did, what it cost, and which are left after an interruption.

Stages run in one process, one after the other, and continue by themselves in their folder. A finished stage leaves a
record with what it measured and with every episode and control step that it took in any world.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simtoreal.envs.errors import ConfigError
from simtoreal.envs.files import write_json
from simtoreal.evaluation.evaluate import DIGESTS
from simtoreal.evaluation.results import require_own_folder

RECORDS, SETTINGS = "stages", "settings.json"
# Worlds and purposes that are counted apart.
REAL, SIMULATION, IMAGINATION = "real", "simulation", "imagination"
DEMONSTRATIONS, LEARNING, EVALUATION = "demonstrations", "learning", "evaluation"


def steps_taken(world: str, purpose: str, episodes: int, steps: int) -> dict[str, Any]:
    """Return an entry of a stage's ``taken``.

    Args:
        world: ``real``, ``simulation`` or ``imagination``.
        purpose: ``demonstrations``, ``learning`` (rollouts that anything was learned from) or ``evaluation``.
        episodes, steps: how many.
    """
    return {"world": world, "purpose": purpose, "episodes": int(episodes), "steps": int(steps)}


class Stages:
    """The records of a co-training in ``output``.

    Args:
        output: folder.
        settings: what decides the results, JSON-compatible; compared when the folder exists already.
        notify: told in a line when a stage begins and ends.

    Raises:
        ConfigError: the folder holds a co-training with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], notify: Callable[[str], None]) -> None:
        self.output, self.notify = output, notify
        self.records: list[dict[str, Any]] = []
        _require_same(output / SETTINGS, json.loads(json.dumps(settings)))

    def run(
        self, name: str, title: str, work: Callable[[], dict[str, Any]], folder: str | None = None
    ) -> dict[str, Any]:
        """Do a stage, unless it is finished already, and return its record.

        Args:
            name: of the stage.
            title: what it does, for people.
            folder: below the output, what it makes; several stages may go on in the same.
            work: does it, continuing what an earlier attempt left, and returns what to record; its ``taken`` is a list
                of :func:`steps_taken`.
        """
        path = self.output / RECORDS / f"{name}.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        if not earlier.get("finished"):
            self.notify(title)
            seconds, started, content = float(earlier.get("seconds", 0.0)), time.monotonic(), None
            try:
                content = work()
            finally:
                seconds += time.monotonic() - started
                earlier = {
                    "name": name, "title": title, "finished": content is not None, "seconds": seconds,
                    "folder": folder, "taken": [], **(content or {}),
                }  # fmt: skip
                write_json(path, earlier)
        self.records.append(earlier)
        return earlier

    def ledger(self) -> list[dict[str, Any]]:
        """Return one row per entry of every stage so far, with the sum of real episodes and steps up to it.

        Evaluations are listed, but are not part of the sums: they serve the report and not the policy.
        """
        rows, episodes, steps = [], 0, 0
        for record in self.records:
            for entry in record["taken"]:
                if entry["world"] == REAL and entry["purpose"] != EVALUATION:
                    episodes, steps = episodes + entry["episodes"], steps + entry["steps"]
                rows.append({"stage": record["name"], **entry, "real_episodes": episodes, "real_steps": steps})
        return rows

    def real_so_far(self) -> dict[str, int]:
        """Return the real episodes and control steps that anything was learned from so far."""
        rows = self.ledger()
        return {key: rows[-1][key] if rows else 0 for key in ("real_episodes", "real_steps")}


def adopt_stages(
    source: Path, output: Path, names: Sequence[str], settings: Mapping[str, Any], varied: Sequence[str] = ()
) -> None:
    """Begin a co-training in ``output`` with finished stages of another one, which had the same settings for them.

    Nothing is done if ``output`` exists. Files are linked, not copied: both must lie on the same file system.

    Args:
        source: folder of the other co-training.
        output: folder that appears whole or not at all.
        names: of the stages.
        settings: of the new co-training.
        varied: settings that may differ, because none of these stages depends on them, such as
            ``wovr.iterations``; with all that is below them.

    Raises:
        ConfigError: a stage is not finished there, or other settings differ.
    """
    if output.exists():
        return
    settings = json.loads(json.dumps(settings))
    if (source / SETTINGS).exists():
        _refuse_differences(source, settings, varied, "Begin with the same ones, or in a new folder.")
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / RECORDS).mkdir(parents=True)
    for name in names:
        path = source / RECORDS / f"{name}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if not record.get("finished"):
            raise ConfigError(f"{source} has not finished its stage '{name}', which another co-training begins with")
        write_json(temporary / RECORDS / path.name, record)
        folder = record["folder"]
        if folder is not None and not (temporary / folder).exists():
            ignored = shutil.ignore_patterns(".lock")
            shutil.copytree(source / folder, temporary / folder, symlinks=True, ignore=ignored, copy_function=os.link)
    write_json(temporary / SETTINGS, settings)
    os.replace(temporary, output)


def _require_same(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        if (path.parent / RECORDS).exists():
            raise ConfigError(f"{path.parent} holds a co-training without {SETTINGS}; choose another --output")
        require_own_folder(path.parent, "cotrain")
        write_json(path, settings)
        return
    _refuse_differences(path.parent, settings, (), "Continue with the same ones, or choose another --output.")


def _refuse_differences(folder: Path, settings: Mapping[str, Any], varied: Sequence[str], remedy: str) -> None:
    path = folder / SETTINGS
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); choose another --output") from error
    # Earlier versions did not note every digest; nobody knows those of what they did.
    now = {key: value for key, value in settings.items() if key not in DIGESTS or key in stored}
    lines = [
        f"{key}: {text}"
        for key, text in _differences("", stored, now)
        if not any(f"{key}.".startswith(f"{name}.") for name in varied)
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise ConfigError(f"{folder} holds a co-training with other settings:\n  {listed}\n{remedy}")


def _differences(prefix: str, stored: Any, now: Any) -> list[tuple[str, str]]:
    if isinstance(stored, dict) and isinstance(now, dict):
        keys: Sequence[str] = [*stored, *(key for key in now if key not in stored)]
        return [
            line
            for key in keys
            for line in _differences(f"{prefix}.{key}" if prefix else key, stored.get(key), now.get(key))
        ]
    return [] if stored == now else [(prefix, f"{stored} there, {now} now")]
