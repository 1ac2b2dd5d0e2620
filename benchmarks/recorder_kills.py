"""Does recording lose anything when its process is killed with SIGKILL at a random instant?

    python benchmarks/recorder_kills.py                # 1,000 kills, about 10 minutes; resumable

Every kill hits a process that records, keeps, discards and repeats takes, rebuilds a dataset, or recovers it from the
kill before. It says over a pipe what it has done; what it said is compared, byte by byte, with what is on disk after
``simtoreal data recover``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from interleaved import result_name, write_benchmark
from parts import Part
from recorder_sessions import content, plan

from simtoreal.data_collection.dataset import EPISODES, META, Dataset
from simtoreal.data_collection.edit import recover
from simtoreal.data_collection.episode import read_episode
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import git_commit
from simtoreal.evaluation.statistics import posterior_interval

SESSIONS = Path(__file__).with_name("recorder_sessions.py")
SESSION_S, RECOVERY_S = 0.25, 0.03
KILLS_PER_FOLDER = 20


@dataclass
class Said:
    """What a killed process had said.

    Attributes:
        phase: what it was doing.
        take: number of the take it was at; -1 before the first.
        appended: calls of ``on_step`` begun in that take.
        flushed: steps it knew to be in the journal.
        ending: ``on_episode`` of that take was begun.
        kept: takes whose ``on_episode`` returned and that were to be kept.
    """

    session: int
    phase: str = "opening"
    take: int = -1
    appended: int = 0
    flushed: int = 0
    ending: bool = False
    kept: list[int] = field(default_factory=list)

    def hear(self, words: list[str]) -> None:
        kind, take = words[0], int(words[1])
        if kind == "step":
            self.take, self.appended, self.flushed, self.ending = take, int(words[2]) + 1, int(words[3]), False
            self.phase = "recording"
        elif kind == "ending":
            self.phase = "keeping" if plan(self.session, take).keep else "discarding"
            self.flushed, self.ending = int(words[3]), True
        elif kind == "ended":
            self.phase, self.take, self.appended, self.flushed = "between takes", -1, 0, 0
            if plan(self.session, take).keep:
                self.kept.append(take)
        else:
            self.phase = {"rebuilding": "rebuilding", "recovering": "recovering"}.get(kind, "between takes")


class Killer:
    """Starts processes and kills them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, str(SESSIONS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def kill(self, job: str, folder: Path, session: int, after_s: float) -> Said:
        """Run ``job`` on ``folder``, kill it after ``after_s`` seconds and return what it had said.

        Raises:
            Losses: it failed by itself, on what earlier kills had left.
        """
        assert self._server.stdin is not None
        request = {"job": job, "folder": str(folder), "session": session}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        said, early = Said(session), []
        for words in self._lines():
            if words[0] == "pid":
                time.sleep(after_s)
                # One that was done before has been waited for.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(words[1]), signal.SIGKILL)
            elif words[0] == "end":
                break
            else:
                early.append(words)
        for words in early:
            if words[0] == "failed":
                raise Losses(f"{folder}: the killed process failed by itself: {' '.join(words[1:])}")
            said.hear(words)
        return said

    def _lines(self) -> Iterator[list[str]]:
        assert self._server.stdout is not None
        while line := self._server.stdout.readline():
            yield line.split()
        raise RuntimeError("the server of the killed processes has ended")

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


class Losses(DatasetError):
    """Something that was acknowledged is missing, wrong or cannot be read."""


def hashes(folder: Path) -> dict[str, str]:
    """Content of every episode file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / EPISODES).glob("*.hdf5")}


def judge(folder: Path, said: Said, before: dict[str, str]) -> int:
    """Recover ``folder`` and compare it with what the process said; return the number of steps compared.

    Raises:
        Losses: something acknowledged is missing, differs, is there twice, cannot be read, or was to be discarded.
    """
    try:
        return _compare(folder, said, before)
    except Losses:
        raise
    except DatasetError as error:
        raise Losses(f"{folder}: cannot be recovered and read: {error}") from error


def _compare(folder: Path, said: Said, before: dict[str, str]) -> int:
    if (folder / META).exists():
        recover(folder)
    elif said.phase != "opening":
        raise Losses(f"{folder}: has no description")
    else:
        return 0
    after = hashes(folder)
    if changed := [name for name, digest in before.items() if after.get(name) != digest]:
        raise Losses(f"finished episodes changed: {changed}")
    leftovers = [file.name for file in folder.rglob("*") if file.suffix in (".part", ".tmp")]
    if leftovers or (folder / "damaged").exists():
        raise Losses(f"left behind: {leftovers}, or damaged files")
    stored: dict[int, int] = {}
    for episode in Dataset.open(folder).episodes:
        assert episode.path is not None
        if episode.path.name in before:
            continue
        arrays = read_episode(episode.path)[1]
        session, take = (int(value) for value in arrays["states"][0, :2])
        if session != said.session or take in stored:
            raise Losses(f"{episode.path}: take {take} of session {session} is there twice or not its own")
        stored[take] = episode.steps
        for name, expected in content(session, take).items():
            if not np.array_equal(arrays[name], expected[: episode.steps]):
                raise Losses(f"{episode.path}: '{name}' differs from what was recorded")
    for take in said.kept:
        if stored.pop(take, 0) != plan(said.session, take).steps:
            raise Losses(f"take {take}, which was kept, is missing or incomplete")
    _judge_running(said, stored.pop(said.take, 0))
    if stored:
        raise Losses(f"takes {sorted(stored)} were discarded and are there")
    return sum(plan(said.session, take).steps for take in said.kept) + said.flushed


def _judge_running(said: Said, found: int) -> None:
    """The take that was interrupted: all that was flushed, and nothing that was not appended."""
    least = 0 if said.phase == "discarding" else said.flushed
    if not least <= found <= said.appended:
        raise Losses(f"the running take has {found} steps; {least} were flushed and {said.appended} appended")


@dataclass
class Counts:
    """Outcome so far: kills, acknowledged steps that were compared, and what the killed processes were doing."""

    kills: int = 0
    steps: int = 0
    phases: dict[str, int] = field(default_factory=dict)

    def add(self, phase: str) -> None:
        """Count a kill."""
        self.kills += 1
        self.phases[phase] = self.phases.get(phase, 0) + 1


def run_kills(
    killer: Killer,
    root: Path,
    kills: int,
    seed: int,
    counts: Counts | None = None,
    progress: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Kill processes that write below ``root`` until there are ``kills`` in ``counts`` (none to begin with).

    Raises:
        Losses: at the first loss.
    """
    counts = Counts() if counts is None else counts
    while counts.kills < kills:
        folder = root / str(counts.kills // KILLS_PER_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        before = hashes(folder)
        rng = random.Random(f"{seed}/{counts.kills}")
        said = killer.kill("record", folder, seed * 100_000 + counts.kills, rng.uniform(0, SESSION_S))
        counts.add(said.phase)
        if rng.random() < 0.2 and counts.kills < kills and (folder / META).exists():
            again = killer.kill("recover", folder, said.session, rng.uniform(0, RECOVERY_S))
            counts.add("recovering" if again.phase == "recovering" else "recovered")
        counts.steps += judge(folder, said, before)
        progress(counts)
    return counts


def continue_kills(progress: Path, kills: int, seed: int) -> tuple[Counts, Part]:
    """Go on from the file ``progress`` until there are ``kills``; return the counts, and seconds and commits of all.

    A loss is written there before anything else, so that it cannot be passed over by running again.

    Raises:
        SystemExit: something was lost, now or before.
    """
    state = json.loads(progress.read_text()) if progress.exists() else {"seconds": 0.0, "counts": {}, "commits": []}
    if "loss" in state:
        raise SystemExit(
            f"{progress}: kill {state['counts']['kills']}: {state['loss']}. Delete the file to begin anew."
        )
    counts, begin = Counts(**state["counts"]), time.perf_counter() - state["seconds"]

    # Earlier versions did not store them.
    commits = state.get("commits", ["unknown"])
    if counts.kills < kills and git_commit() not in commits:
        commits.append(git_commit())

    def note(counts: Counts, **more: str) -> None:
        spent = time.perf_counter() - begin
        write_json(progress, {"seconds": spent, "commits": commits, "counts": asdict(counts), **more})
        print(counts.kills, end="\r", flush=True)

    killer, root = Killer(), Path(tempfile.mkdtemp(prefix="recorder_kills_"))
    try:
        run_kills(killer, root, kills, seed, counts, note)
    except Losses as error:
        note(counts, loss=f"{error}; the datasets are left in {root}")
        raise SystemExit(f"{error}; the datasets are left in {root}") from error
    finally:
        killer.close()
    shutil.rmtree(root)
    return counts, Part({}, time.perf_counter() - begin, commits, finished=True)


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_recorder_kills"), help="to resume from")
    options = parser.parse_args()
    counts, made = continue_kills(options.output / f"seed_{options.seed}.json", options.kills, options.seed)
    interval = list(posterior_interval(0, counts.kills))
    headline = {
        "metric": "share of kills that lost a flushed step or a finished episode", "ours": 0.0, "baseline": None,
        "baseline_name": None, "ratio": None, "difference": None, "interval": interval, "n": counts.kills,
        "p_value": None,
    }  # fmt: skip
    arms = [{"name": "kills with a loss", "value": 0.0, "interval": interval, "n": counts.kills, **asdict(counts)}]
    notes = (
        f"{counts.steps} acknowledged steps were compared byte by byte; kills by phase: {counts.phases}. The "
        "first loss ends the run with an error, so a stored result has none. SIGKILL, not a power cut: the running "
        "episode is not synced to the medium."
    )
    path = write_benchmark(
        result_name("recorder_kills", parser, options, "kills", "seed"),
        "Does recording lose anything when its process is killed at a random instant?",
        headline, arms, parts=[made], notes=notes, seeds=[options.seed],
    )  # fmt: skip
    print(f"{path}: {counts}, no loss")


if __name__ == "__main__":
    main()
