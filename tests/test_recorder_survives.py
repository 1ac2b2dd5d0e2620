"""Recording under SIGKILL, full, stalled and broken disks, and any order of discarding and repeating takes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from simtoreal.data_collection import journal
from simtoreal.data_collection.check import check
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.edit import recover
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.takes import StreamTake, read_part
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import DatasetError, DiskError
from simtoreal.envs.rollout import EpisodeResult

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import recorder_kills
from recorder_sessions import EMBODIMENT, content, step_of

TASKS = {"point": {}}
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.rglob("*") if file.suffix in (".tmp", ".part")]


def patient_takes(writer: DatasetWriter, patience_s: float = 30.0):
    """Takes whose steps are flushed or refused when ``append`` returns, however busy this machine is."""
    return lambda info: StreamTake(writer.part_path(), writer.add, info, patience_s=patience_s)


class Session:
    """A person who records into ``folder``, take by take."""

    def __init__(self, folder: Path, takes=patient_takes) -> None:
        self.folder, self.alarms = folder, []
        self.writer = DatasetWriter(folder, EMBODIMENT, TASKS)
        self.accepting = True
        self.recorder = Recorder(
            takes(self.writer), task="point", embodiment=EMBODIMENT, source="teleop", operator="o",
            keep=lambda result: self.accepting, on_alarm=self.alarms.append,
        )  # fmt: skip
        self.take = self.steps = 0

    def begin(self, take: int) -> None:
        self.take, self.steps = take, 0
        self.recorder.on_reset(0, 0, take, {}, {"sim_state": content(0, take)["states"][0]})

    def record(self, steps: int) -> None:
        for _ in range(steps):
            self.recorder.on_step(step_of(content(0, self.take), self.steps))
            self.steps += 1

    def settle(self) -> None:
        """On a busy machine the journal's thread may lag behind."""
        with contextlib.suppress(DiskError):
            self.recorder._slots[0].take.finish()

    def end(self, *, accept: bool = True, **changes) -> None:
        self.accepting = accept
        result = EpisodeResult(
            episode=0, seed=self.take, success=True, steps=self.steps, duration_s=self.steps * 0.05, milestones={},
            instruction="", failure="",
        )  # fmt: skip
        self.recorder.on_episode(0, dataclasses.replace(result, **changes))

    def part(self) -> Path:
        (part,) = self.folder.glob("episodes/*.part")
        return part

    def vanish(self) -> None:
        """As if killed: nothing is closed or removed, only the lock is gone."""
        self.writer._lock.close()


def stored(folder: Path) -> dict[int, tuple[int, str]]:
    """Take -> steps and failure, after comparing every value."""
    found = {}
    dataset = Dataset.open(folder)
    for episode in dataset.episodes:
        for name, array in dataset.read(episode).items():
            if name in content(0, episode.seed):
                np.testing.assert_array_equal(array, content(0, episode.seed)[name][: episode.steps])
        assert episode.seed not in found
        found[episode.seed] = episode.steps, episode.failure
    return found


class FullDisk:
    """No file of this process may grow beyond ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.before = limit, resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *unused: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_kills_at_random_instants_lose_nothing(tmp_path: Path) -> None:
    killer = recorder_kills.Killer()
    try:
        counts = recorder_kills.run_kills(killer, tmp_path, kills=10, seed=5)
    finally:
        killer.close()
    assert counts.kills >= 10
    assert counts.steps > 0


def test_the_judge_of_the_kills_notices_losses(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.begin(3)
    session.record(5)
    session.vanish()
    said = recorder_kills.Said(0, "recording", take=3, appended=6, flushed=6)
    part = session.part().read_bytes()
    with pytest.raises(recorder_kills.Losses, match="5 steps; 6 were flushed"):
        recorder_kills.judge(tmp_path, said, {})
    (tmp_path / "episodes/000000.hdf5").unlink()
    (tmp_path / "episodes/000000.part").write_bytes(part)
    said = recorder_kills.Said(0, "between takes", kept=[3])
    with pytest.raises(recorder_kills.Losses, match="missing or incomplete"):
        recorder_kills.judge(tmp_path, said, {})
    with pytest.raises(recorder_kills.Losses, match="were discarded and are there"):
        recorder_kills.judge(tmp_path, recorder_kills.Said(0, "between takes"), {})


def test_a_loss_is_not_passed_over_by_running_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise DatasetError(f"{folder}: is damaged")

    progress = tmp_path / "progress" / "seed_1.json"
    monkeypatch.setattr(recorder_kills, "recover", refuse)
    monkeypatch.setattr(recorder_kills.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    with pytest.raises(SystemExit, match=r"cannot be recovered and read.*is damaged; the datasets are left in"):
        recorder_kills.continue_kills(progress, kills=20, seed=1)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"seed_1\.json: kill \d+: .*is damaged.* Delete the file to begin anew"):
        recorder_kills.continue_kills(progress, kills=20, seed=1)


def test_kills_go_on_where_they_were_and_tell_of_which_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = tmp_path / "seed_1.json"
    for commit, kills in (("one", 2), ("two", 4), ("three", 4)):
        monkeypatch.setattr(recorder_kills, "git_commit", lambda commit=commit: commit)
        counts, made = recorder_kills.continue_kills(progress, kills, seed=1)
        assert counts.kills >= kills
    assert (made.commits, made.finished) == (["one", "two"], True)


def test_a_process_that_ends_before_it_is_killed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(pid: int, number: int) -> None:
        raise ProcessLookupError(pid)

    with DatasetWriter(tmp_path, EMBODIMENT, TASKS):
        pass
    killer = recorder_kills.Killer()
    monkeypatch.setattr(recorder_kills.os, "kill", too_late)
    try:
        assert killer.kill("recover", tmp_path, session=1, after_s=0.0).phase == "between takes"
    finally:
        killer.close()


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_takes_leaves_what_was_accepted(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    session, model, take = Session(tmp_path), {}, 0
    for _ in range(14):
        session.begin(take)
        steps, full_after = rng.randint(1, 8), rng.randint(0, 8) if rng.random() < 0.3 else None
        if full_after is None or full_after >= steps:
            session.record(steps)
            kept, failure = steps, ""
        else:
            session.record(full_after)
            session.settle()
            with FullDisk(session.part().stat().st_size + 10 if full_after else 10):
                session.record(steps - full_after)
            kept, failure = full_after, "disk_full"
            assert session.recorder.health["partial"]
        match rng.choice(("accept", "accept", "discard", "rerecord", "abandon", "kill")):
            case "accept":
                session.end()
                if kept:
                    model[take] = kept, failure
                take += 1
            case "discard":
                session.end(accept=False)
                take += 1
            case "rerecord":
                session.recorder.discard()
            case "abandon":
                take += 1  # the next reset drops it
            case "kill":
                session.vanish()
                recover(tmp_path)
                if kept:
                    model[take] = kept, failure or "aborted"
                take += 1
                session = Session(tmp_path)
        running = len(list(tmp_path.glob("episodes/*.part")))
        assert running <= 1
    session.recorder.discard()
    assert leftovers(tmp_path) == []
    session.writer.close()
    assert stored(tmp_path) == model
    names = sorted(file.stem for file in tmp_path.glob("episodes/*.hdf5"))
    assert names == [f"{number:06d}" for number in range(len(model))], "discarded takes leave no gap in the numbers"
    assert check(tmp_path).problems == ()


def test_full_disk_is_an_alarm_and_not_an_error(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.begin(0)
    session.record(4)
    session.settle()
    with FullDisk(session.part().stat().st_size + 10):
        session.record(6)
        health = session.recorder.health
        assert (health["partial"], health["steps"], health["flushed"]) == (True, 10, 4)
        session.settle()
    with FullDisk(1000):
        session.end()  # there is no space for the episode either
    assert len(session.alarms) == 2
    assert "the disk is full" in session.alarms[0]
    assert "4 of its steps are safe" in session.alarms[0]
    assert "data recover" in session.recorder.alarm
    session.begin(1)
    session.record(3)
    assert session.recorder.alarm == "", "the next take is recorded again"
    session.end()
    session.writer.close()
    assert stored(tmp_path) == {1: (3, "")}
    assert [(info.steps, info.failure) for info in recover(tmp_path).recovered] == [(4, "disk_full")]
    assert stored(tmp_path) == {0: (4, "disk_full"), 1: (3, "")}
    assert [episode.seed for episode in Dataset.open(tmp_path).filter("failure")] == [0]


def test_partial_episode_is_stored_once_there_is_space(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.begin(0)
    session.record(4)
    session.settle()
    with FullDisk(session.part().stat().st_size + 10):
        session.record(3)
    session.record(2)
    session.end()
    session.writer.close()
    (episode,) = Dataset.open(tmp_path).episodes
    assert (episode.steps, episode.success, episode.failure) == (4, False, "disk_full")
    assert episode.extra["lost_steps"] == 5
    assert episode.duration_s == pytest.approx(4 * EMBODIMENT.control_period_s)
    assert leftovers(tmp_path) == []


def test_takes_in_memory_still_say_that_they_are_lost(tmp_path: Path) -> None:
    session = Session(tmp_path, memory_takes)
    session.begin(0)
    session.record(4)
    with FullDisk(1000), pytest.raises(DiskError, match="disk is full"):
        session.end()


@pytest.fixture
def mount(tmp_path: Path):
    """A small file system of its own."""
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(4 * 2**20)
    for command in (["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this machine does not allow mounting")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@ROOT
def test_really_full_file_system(mount: Path) -> None:
    session = Session(mount)
    session.begin(0)
    session.record(3)
    session.end()
    session.begin(1)
    session.record(4)
    filler = mount / "filler"
    blocks = itertools.repeat(bytes(4096))
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        file.writelines(blocks)
    session.record(20)
    assert session.recorder.health["partial"]
    safe = session.recorder.health["flushed"]
    assert 4 <= safe < 24
    session.end()
    filler.unlink()
    session.writer.close()
    recover(mount)
    assert stored(mount) == {0: (3, ""), 1: (safe, "disk_full")}, "the reason could be noted on a full disk"


@ROOT
def test_a_stalled_disk_does_not_stop_the_control_loop(mount: Path) -> None:
    session = Session(mount, lambda writer: patient_takes(writer, patience_s=0.5))
    session.begin(0)
    session.record(2)
    if subprocess.run(["fsfreeze", "-f", str(mount)], check=False, capture_output=True).returncode:
        pytest.skip("this machine cannot freeze a file system")
    try:
        session.record(8)  # a plain write would hang until the disk goes on
        health = session.recorder.health
        assert (health["steps"], health["flushed"], health["waiting"], health["alarm"]) == (10, 2, 8, "")
    finally:
        subprocess.run(["fsfreeze", "-u", str(mount)], check=True)
    session.end()
    session.writer.close()
    assert stored(mount) == {0: (10, "")}


def test_a_disk_that_is_too_slow_ends_the_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, write = threading.Event(), journal.append_whole

    def stalled(descriptor: int, record: bytes) -> None:
        assert go_on.wait(60)
        write(descriptor, record)

    session = Session(tmp_path, lambda writer: lambda info: StreamTake(
        writer.part_path(), writer.add, info, limit_bytes=50_000, patience_s=0.5,
    ))  # fmt: skip
    session.begin(0)
    session.record(2)
    monkeypatch.setattr(journal, "append_whole", stalled)
    session.record(18)
    assert "does not keep up" in session.recorder.alarm
    assert len(session.alarms) == 1
    go_on.set()
    session.end()
    session.writer.close()
    steps, failure = stored(tmp_path)[0]
    # What the disk had in its hands comes after what was safe; what was waiting is gone, without a gap.
    assert 2 <= steps <= 3
    assert failure == "disk_error"
    (episode,) = Dataset.open(tmp_path).episodes
    assert episode.extra["lost_steps"] == 20 - steps


def test_killed_between_storing_the_episode_and_removing_its_journal(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.begin(0)
    session.record(5)
    part = session.part()
    content_before = part.read_bytes()
    session.end()
    part.write_bytes(content_before)
    (tmp_path / "episodes/.000001.hdf5.abc.tmp").write_bytes(b"half")
    session.vanish()
    recovery = recover(tmp_path)
    assert (recovery.recovered, [file.name for file in recovery.emptied]) == ((), [part.name])
    assert stored(tmp_path) == {0: (5, "")}
    assert leftovers(tmp_path) == []


def test_a_journal_with_values_that_cannot_be_used_is_set_aside(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.begin(0)
    step = step_of(content(0, 0), 0)
    session.recorder.on_step(dataclasses.replace(step, info={**step.info, "target": np.full((1, 10), np.nan)}))
    session.vanish()
    ((file, reason),) = recover(tmp_path).set_aside
    assert file.parent.name == "damaged"
    assert "not finite" in reason


def test_notes_survive_a_kill_in_the_middle_of_one(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.begin(0)
    for text in ("", "first", "second", "third"):
        step = step_of(content(0, 0), session.steps)
        contacts = {"wall": np.array([False])}
        info = {**step.info, "instruction": np.array([text], dtype=object), "contacts": contacts}
        session.recorder.on_step(dataclasses.replace(step, info=info))
        session.steps += 1
    session.settle()
    path = session.part()
    info, arrays = read_part(path)
    assert info.columns == {"contacts": ("wall",)}
    assert info.instructions == ("", "first", "second", "third")
    assert arrays["step/instruction"].tolist() == [0, 0, 1, 2]
    damaged = bytearray(path.read_bytes())
    newest = damaged.rindex(b'"third"')
    damaged[newest + 2] ^= 1
    path.write_bytes(damaged)
    assert read_part(path)[0].instructions == ("", "first", "second"), "the one before is used"
    damaged[damaged.index(b'"second"') + 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DatasetError, match="known about the episode is damaged"):
        read_part(path)
    session.recorder.discard()


def test_appending_waits_no_longer_than_its_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the disk is known to stall, steps are not delayed at all."""
    go_on, write, waits = threading.Event(), journal.append_whole, []

    class Condition(threading.Condition):
        def wait_for(self, predicate, timeout=None):
            if threading.current_thread() is threading.main_thread():
                waits.append(timeout)
            return super().wait_for(predicate, timeout)

    def stalled(descriptor: int, record: bytes) -> None:
        go_on.wait(60)
        write(descriptor, record)

    monkeypatch.setattr(journal, "append_whole", stalled)
    monkeypatch.setattr(journal.threading, "Condition", Condition)
    stream = journal.Journal(tmp_path / "x", patience_s=0.2)
    monkeypatch.undo()
    monkeypatch.setattr(journal, "append_whole", stalled)
    for _ in range(20):
        stream.append(b"record")
        assert (waits, stream.flushed) == ([0.2], 0), "only the first record waits, with the given patience"
    go_on.set()
    stream.drain()
    assert (stream.flushed, stream.waiting) == (20, 0)
    stream.close()
    assert (tmp_path / "x").read_bytes() == b"record" * 20
