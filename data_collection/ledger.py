"""What became of every candidate seed of a collection, so that it can be killed at any moment and continued.

A collection tries the seeds of its range in order and keeps the first N successes, or the successes within a budget
of control steps. Workers finish them in any order,
so finished episodes wait in a staging folder until everything before them is decided. Which episodes a dataset ends
up with, and their numbers, therefore depend neither on the number of workers nor on interruptions.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import disk_errors, open_episode, read_info
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.files import append_whole

SEEDS_PER_COLLECTION = 1_000_000
STAGING = ".collect"
LOG = "collection.jsonl"

# Prior belief about a scripted expert, to ask for about as many seeds as will be needed: 19 of 20 succeed.
_PRIOR_SUCCESSES, _PRIOR_TRIALS = 19, 20
_PRIOR_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one seed."""

    seed: int
    success: bool
    failure: str
    steps: int
    stored: bool


def staged_path(output: Path, seed: int) -> Path:
    """Where a worker leaves the finished episode of ``seed``."""
    return output / STAGING / f"seed_{seed:012d}.hdf5"


class Ledger:
    """Outcomes of a collection's seeds, backed by ``collection.jsonl``, and the order in which episodes are committed.

    Args:
        writer: of the dataset.
        first_seed: the first candidate.
        episodes: successes to collect, or None.
        steps: budget of control steps, or None. Every attempt spends its steps, as it spends a demonstrator's time; the
            attempt that exceeds the budget is the last one and counts.

    Attributes:
        decided_successes, decided_steps: of the seeds before the first one without an outcome; no others count.
    """

    def __init__(self, writer: DatasetWriter, first_seed: int, episodes: int | None, steps: int | None = None) -> None:
        self.writer, self.first_seed, self.episodes, self.steps = writer, first_seed, episodes, steps
        self.outcomes: dict[int, Outcome] = {}
        self.assigned: set[int] = set()
        self._next = first_seed
        self._committed: set[int] = set()
        self.decided_successes = self.decided_steps = 0
        self._resume()
        with disk_errors(writer.path / LOG):
            self._log = os.open(writer.path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.advance()

    def _resume(self) -> None:
        path = self.writer.path
        for number, line in enumerate(_complete_lines(path / LOG), 1):
            try:
                outcome = Outcome(**json.loads(line))
                if not (isinstance(outcome.seed, int) and isinstance(outcome.steps, int)):
                    raise ValueError("seed and steps must be integers")
            except (ValueError, TypeError) as error:
                raise DatasetError(
                    f"{path / LOG}: line {number} is not the outcome of a seed ({error}). Delete the line; its seed is "
                    "tried again unless its episode is stored."
                ) from error
            self.outcomes[outcome.seed] = outcome
        for info in Dataset.open(path).episodes:
            self._committed.add(info.seed)
            self.outcomes[info.seed] = Outcome(
                seed=info.seed, success=info.success, failure=info.failure, steps=info.steps, stored=True
            )
        self._find_staged()
        for seed, outcome in list(self.outcomes.items()):
            # Surplus successes of an earlier, smaller request were removed; they are needed again now.
            if outcome.stored and seed not in self._committed and not staged_path(path, seed).exists():
                del self.outcomes[seed]

    def _find_staged(self) -> None:
        path = self.writer.path
        for file in sorted((path / STAGING).glob("seed_*.hdf5")):
            try:
                with open_episode(file) as handle:
                    info = read_info(handle, file)
            except DatasetError:
                # Cannot happen through a kill, as staging is atomic; a disk that lost it gets the seed run again.
                file.unlink()
                continue
            self.outcomes[info.seed] = Outcome(
                seed=info.seed, success=info.success, failure=info.failure, steps=info.steps, stored=True
            )

    @property
    def complete(self) -> bool:
        """Whether the wanted successes are committed, or the budget is spent."""
        if self.episodes is not None and self.decided_successes >= self.episodes:
            return True
        return self.steps is not None and self.decided_steps >= self.steps

    @property
    def tried(self) -> int:
        """Seeds with a known outcome."""
        return len(self.outcomes)

    @property
    def successes(self) -> int:
        """Successes among them."""
        return sum(outcome.success for outcome in self.outcomes.values())

    def decided(self) -> list[Outcome]:
        """Outcomes of the seeds in order up to the last one that counts."""
        return [self.outcomes[seed] for seed in range(self.first_seed, self._next)]

    def want(self) -> int:
        """How many more seeds should be running to expect enough successes or steps: at least one until complete.

        Successes behind a seed without an outcome do not replace it: an interrupted collection has nobody running it.
        """
        rate = (self.successes + _PRIOR_SUCCESSES) / (self.tried + _PRIOR_TRIALS)
        length = (sum(outcome.steps for outcome in self.outcomes.values()) + _PRIOR_STEPS) / (self.tried + 1)
        successes, steps = float(self.decided_successes), float(self.decided_steps)
        seed, count = self._next, 0
        while successes < (self.episodes or math.inf) and steps < (self.steps or math.inf):
            outcome = self.outcomes.get(seed)
            successes += rate if outcome is None else outcome.success
            steps += length if outcome is None else outcome.steps
            count += outcome is None
            seed += 1
        return count - len(self.assigned)

    def assign(self, count: int) -> list[int]:
        """The next ``count`` seeds that nobody has run or is running.

        Raises:
            DatasetError: the collection's range of seeds is used up.
        """
        seeds: list[int] = []
        seed = self._next
        while len(seeds) < count:
            if seed >= self.first_seed + SEEDS_PER_COLLECTION:
                raise DatasetError(
                    f"{self.writer.path}: all {SEEDS_PER_COLLECTION} seeds of this --seed are used. Use another --seed."
                )
            if seed not in self.outcomes and seed not in self.assigned:
                seeds.append(seed)
            seed += 1
        self.assigned.update(seeds)
        return seeds

    def record(self, outcome: Outcome) -> None:
        """Note the outcome of a seed; a stored episode must already be in the staging folder.

        Raises:
            DatasetError: the disk is full; the log is as it was before.
        """
        self.assigned.discard(outcome.seed)
        self.outcomes[outcome.seed] = outcome
        with disk_errors(self.writer.path / LOG):
            append_whole(self._log, json.dumps(asdict(outcome)).encode() + b"\n")
        self.advance()

    def advance(self) -> None:
        """Move staged episodes into the dataset as far as every earlier seed is decided."""
        while not self.complete and (outcome := self.outcomes.get(self._next)) is not None:
            if outcome.stored and outcome.seed not in self._committed:
                self.writer.adopt(staged_path(self.writer.path, outcome.seed))
                self._committed.add(outcome.seed)
            self.decided_successes += outcome.success
            self.decided_steps += outcome.steps
            self._next += 1

    def close(self) -> None:
        """Commit what stopped workers finished without being heard; once complete, remove the surplus."""
        os.close(self._log)
        self._find_staged()
        self.advance()
        staging = self.writer.path / STAGING
        if self.complete:
            for file in staging.glob("*"):
                file.unlink()
            with contextlib.suppress(FileNotFoundError):
                staging.rmdir()


def _complete_lines(path: Path) -> list[str]:
    """Lines of a log whose writer may have been killed: a torn last line is cut off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with open(path, "r+b") as handle:
            handle.truncate(len(complete))
    return complete.decode(errors="replace").splitlines()
