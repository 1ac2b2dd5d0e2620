"""However a collection session ends, a take that its operator did not discard is in the dataset."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from simtoreal.commands import teleop
from simtoreal.data_collection import teleop_take, writer
from simtoreal.data_collection.coaching import Review
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.edit import recover
from simtoreal.data_collection.episode import EpisodeInfo
from simtoreal.data_collection.takes import read_part
from simtoreal.data_collection.teleop_device import OperatorInput
from simtoreal.data_collection.teleop_hub import InputHub
from simtoreal.data_collection.teleop_loop import SessionEnd, SessionOptions, TeleopSession
from simtoreal.data_collection.teleop_page import PageDevice
from simtoreal.data_collection.teleop_session import Board
from simtoreal.data_collection.teleop_take import TakeStore
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import load_task, panda_embodiment
from simtoreal.envs.errors import ConfigError, DatasetError, DiskError, RobotError
from simtoreal.envs.tabletop import TabletopEnv
from simtoreal.policies.compatibility_coach import CompatibilityCoach

STEPS = 6


class Person:
    """Records a take of ``STEPS``, acts once in ``state`` (``act`` and ``events``), then rests and stops.

    It needs a look at what the session asks before it can answer.
    """

    name = "person"

    def __init__(self, board: Board, state: str, act: Callable[[], Any], events: tuple[str, ...] = ()) -> None:
        self.board, self.state, self.act, self.events = board, state, act, events
        self.reads, self.stage, self.done, self.asked = 0, -1, False, False

    def read(self) -> OperatorInput | None:
        self.reads += 1
        if self.reads % 2 == 0:
            return None
        shown, events = self.board.snapshot, ()
        stage, self.stage = self.stage, shown.stage
        enough = shown.state != "recording" or shown.steps >= STEPS
        if stage != shown.stage:
            pass
        elif shown.state == self.state and enough and not self.done:
            self.done = True
            self.act()
            events = self.events
        elif self.done and (shown.state in ("ready", "review") or shown.steps == 0):
            events = ("stop",)
        elif shown.state == "recording" and enough and self.state == "review":
            events = ("finish",)
        elif shown.state == "ready" and not self.asked:
            self.asked = True
            events = ("record",)
        return OperatorInput(
            motion=np.array([0.3, 0, 0, 0, 0, 0]), engaged=self.reads % 20 > 1 and not self.done, events=events,
            received_ns=time.monotonic_ns(),
        )  # fmt: skip

    def close(self) -> None: ...


class Unwell:
    """A coach that fails where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, where: str) -> None:
        if where == self.where:
            raise ZeroDivisionError(f"in {where}")

    def reset(self) -> None:
        self.fail("reset")

    def step(self, observation: Any, action: np.ndarray) -> float:
        self.fail("step")
        return float("nan") if self.where == "nan" else 0.5

    def review(self, arrays: Any) -> Review:
        self.fail("review")
        return Review(accepted=False, compatibility=0.3, bad_steps=9, tolerance=3)


class Session:
    """A real simulation in a session whose operator is a :class:`Person`."""

    def __init__(
        self, folder: Path, state: str, act: Callable[[], Any] = lambda: None, *, events: tuple[str, ...] = (),
        coach: Any = None, unjudged: dict[bool, str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        written = load_task("reach")
        embodiment = panda_embodiment(16, cameras=("front",))
        self.folder, self.board = folder, Board()
        self.env = TabletopEnv(dataclasses.replace(written, horizon=400), embodiment=embodiment, record_state=True)
        page = PageDevice(self.board)
        self.person = Person(self.board, state, act, events)
        self.writer = DatasetWriter(folder, embodiment, {"reach": written.to_dict()})
        self.store = TakeStore(self.writer, task="reach", embodiment=embodiment)
        self.session = TeleopSession(
            SessionOptions(task="reach", first_seed=3, operator="Ada", **options), self.env,
            InputHub([self.person, page], embodiment), page, self.store, self.board,
            coaches={False: coach} if coach else None, unjudged=unjudged,
        )  # fmt: skip

    def run(self, expected: type[BaseException] | None = None) -> list[Any]:
        """Run to the end; returns the episodes."""
        try:
            with self.writer:
                if expected is None:
                    self.session.run()
                else:
                    with pytest.raises(expected):
                        self.session.run()
        finally:
            self.env.close()
        assert self.board.snapshot.state == "finished"
        return list(Dataset.open(self.folder).episodes)

    def parts(self) -> list[Path]:
        return sorted((self.folder / "episodes").glob("*.part"))


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    return fail


WAYS_OUT = {
    "stop": (lambda: None, ("stop",), None),
    "SIGINT": (functools.partial(os.kill, os.getpid(), signal.SIGINT), (), KeyboardInterrupt),
    "device error": (raising(ZeroDivisionError()), (), ZeroDivisionError),
    "exit": (raising(SystemExit()), (), SystemExit),
}


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("state", ["recording", "review"])
def test_every_way_out_of_a_session_stores_the_take(tmp_path: Path, state: str, way: str):
    act, events, error = WAYS_OUT[way]
    opened = Session(tmp_path / "data", state, act, events=events)
    (episode,) = opened.run(error)
    assert episode.failure == {"recording": "aborted", "review": "unreviewed"}[state]
    assert (episode.success, episode.operator, episode.seed) == (False, "Ada", 3)
    assert episode.steps >= STEPS
    assert opened.parts() == []
    assert "episode 000000 is stored" in opened.board.snapshot.note
    assert [row["name"] for row in opened.board.episodes] == ["000000"]


def test_a_session_that_ends_while_the_arm_moves_by_itself_says_where_it_is(tmp_path: Path):
    opened = Session(tmp_path / "data", "ready")
    opened.env.reset = raising(SessionEnd("the arm has stopped on its way home"))
    assert opened.run() == []
    assert opened.board.snapshot.note == "the session has ended; the arm has stopped on its way home"


@pytest.mark.parametrize("event", ["discard", "next", "rerecord", "reset", "left"])
def test_what_the_operator_discards_is_gone(tmp_path: Path, event: str):
    for state in ("recording", "review"):
        opened = Session(tmp_path / state, state, events=(event,))
        assert opened.run() == []
        assert opened.person.done, "there was a take to discard"
        assert opened.parts() == []


@pytest.mark.parametrize(("judge", "reached"), [("simulation", True), ("operator", None)])
def test_an_unreviewed_take_is_no_success_but_says_what_the_environment_saw(
    tmp_path: Path, judge: str, reached: bool | None
):
    opened = Session(tmp_path / "data", "review", events=("stop",), judge=judge)
    step = opened.env.step

    def reaching(action: np.ndarray) -> Any:
        *result, info = step(action)
        return (*result, {**info, "success": True})

    opened.env.step = reaching
    (episode,) = opened.run()
    assert (episode.success, episode.failure) == (False, "unreviewed")
    assert episode.extra.get("goal_reached") == reached


def test_a_take_that_a_sensor_ended_says_so_although_it_was_accepted(tmp_path: Path):
    notes: list[str] = []
    opened = Session(tmp_path / "data", "review", events=("accept",), judge="operator", practice=False)
    opened.board.watch(lambda: notes.append(opened.board.snapshot.note))
    step, silent = opened.env.step, "nothing received on /camera for 1.3 s (held for 1.0 s)"

    def failing(action: np.ndarray) -> Any:
        observation, reward, terminated, truncated, info = step(action)
        ended = opened.board.snapshot.steps >= STEPS
        return observation, reward, terminated, truncated or ended, {**info, "sim_fault": silent if ended else ""}

    opened.env.step = failing
    (episode,) = opened.run()
    assert (episode.success, episode.failure) == (False, silent)
    assert f"{silent}; accepting stores this take as a failure" in notes


def test_an_accepted_take_whose_journal_is_still_there_is_not_recovered_twice(tmp_path: Path):
    opened = Session(tmp_path / "data", "review", events=("accept",), judge="operator", practice=False)
    unlink = Path.unlink
    with pytest.MonkeyPatch.context() as patch:  # killed after the episode was stored
        patch.setattr(Path, "unlink", lambda path, **more: None if path.suffix == ".part" else unlink(path, **more))
        (episode,) = opened.run()
    assert episode.success
    assert len(opened.parts()) == 1
    assert recover(opened.folder).recovered == ()
    assert len(Dataset.open(opened.folder).episodes) == 1


@pytest.mark.parametrize("error", [RobotError("the arm is lost"), DatasetError("odd step")])
def test_a_robot_error_in_a_take_stores_it_and_the_session_goes_on(tmp_path: Path, error: Exception):
    notes: list[str] = []
    opened = Session(tmp_path / "data", "recording")
    opened.board.watch(lambda: notes.append(opened.board.snapshot.note))
    step = opened.env.step
    opened.env.step = lambda action: raising(error)() if opened.board.snapshot.steps >= STEPS else step(action)
    opened.person.done = True  # from here on: stop as soon as the session is ready again
    opened.person.read = functools.partial(_record_then_stop, opened)
    (episode,) = opened.run()
    assert (episode.success, episode.failure, episode.steps) == (False, "aborted", STEPS)
    assert any(str(error) in note and "episode 000000 is stored" in note for note in notes)


def _record_then_stop(opened: Session) -> OperatorInput:
    person, shown = opened.person, opened.board.snapshot
    person.reads += 1
    events: tuple[str, ...] = ()
    if shown.state == "ready":
        events = ("stop",) if opened.store.episodes() else ("record",)
    return OperatorInput(
        motion=np.array([0.3, 0, 0, 0, 0, 0]), engaged=person.reads % 20 > 1, events=events,
        received_ns=time.monotonic_ns(),
    )  # fmt: skip


@pytest.mark.parametrize("where", ["reset", "step", "nan", "review"])
def test_a_coach_that_fails_says_nothing_and_an_alarm_says_so(tmp_path: Path, where: str):
    alarms: list[str] = []
    opened = Session(tmp_path / "data", "review", events=("accept",), coach=Unwell(where))
    opened.board.watch(lambda: alarms.append(opened.board.snapshot.alarm))
    (episode,) = opened.run()
    assert any("the coach failed" in alarm for alarm in alarms)
    assert (episode.failure, opened.board.snapshot.kept) == ("not_reached", 1)
    assert "compatibility" not in episode.extra


def test_an_unreviewed_take_remembers_what_the_coach_said(tmp_path: Path):
    (episode,) = Session(tmp_path / "data", "review", events=("stop",), coach=Unwell("nowhere")).run()
    score = episode.extra["compatibility"]
    assert (score["accepted"], score["overridden"], score["bad_steps"]) == (False, False, 9)


@pytest.mark.parametrize("error", [DiskError("full"), DatasetError("odd"), OSError("gone"), MemoryError()])
@pytest.mark.parametrize("state", ["recording", "review"])
def test_a_take_that_cannot_be_stored_stays_for_recovery(
    tmp_path: Path, state: str, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writer, "write_episode", raising(error))
    opened = Session(tmp_path / "data", state, events=("stop",))
    assert opened.run() == []
    (part,) = opened.parts()
    info, arrays = read_part(part)
    assert info.failure == "aborted"
    assert len(arrays["actions"]) >= STEPS
    assert "data recover" in opened.board.snapshot.note


def test_a_take_that_cannot_be_looked_at_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teleop_take, "strip", raising(ValueError("no picture")))
    alarms: list[str] = []
    opened = Session(tmp_path / "data", "review", events=("accept",), coach=Unwell("nowhere"))
    opened.board.watch(lambda: alarms.append(opened.board.snapshot.alarm))
    assert len(opened.run()) == 1
    assert any("cannot be looked at" in alarm for alarm in alarms)


CHILD = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from test_teleop_exits import Session
from simtoreal.robot.deployment import interruptible
opened = Session(pathlib.Path({folder!r}), {state!r}, lambda: print("there", flush=True))
opened.person.read = (lambda read: lambda: None if opened.person.done else read())(opened.person.read)
with interruptible():
    try:
        opened.run()
    except KeyboardInterrupt:
        print("ended", flush=True)
"""


@pytest.mark.parametrize(("state", "number"), [("recording", signal.SIGTERM), ("review", signal.SIGINT)])
def test_a_signal_from_outside_stores_the_take(tmp_path: Path, state: str, number: int):
    folder = tmp_path / "data"
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder), state=state)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        child.send_signal(number)
        assert child.communicate(timeout=60)[0] == "ended\n"
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0
    (episode,) = Dataset.open(folder).episodes
    assert episode.failure == {"recording": "aborted", "review": "unreviewed"}[state]
    assert episode.steps >= STEPS
    assert sorted(path.name for path in (folder / "episodes").iterdir()) == ["000000.hdf5"]


# ---- what a review needs and says


def test_a_running_take_is_on_disk_and_not_in_memory(tmp_path: Path):
    embodiment, steps = panda_embodiment(128, cameras=("front",)), 200
    frame = np.zeros((128, 128, 3), np.uint8)
    with DatasetWriter(tmp_path / "data", embodiment, {}) as writer:
        info = EpisodeInfo(task="reach", seed=0, success=False, operator="Ada", source="teleop", embodiment="")
        take = teleop_take._ReviewedTake(writer.part_path(), writer.add, info)
        take.append({"obs/front_image": frame, "actions": np.zeros(7, np.float32)})
        tracemalloc.start()
        for step in range(1, steps):
            take.append({"obs/front_image": frame + np.uint8(step), "actions": np.full(7, step, np.float32)})
        take.finish()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 5 * frame.nbytes
        arrays = take.arrays()
        np.testing.assert_array_equal(arrays["actions"][:, 0], np.arange(steps))
        np.testing.assert_array_equal(arrays["obs/front_image"][:, 0, 0, 0], np.arange(steps) % 256)
        take.discard()


def test_takes_that_nobody_judges_say_so(tmp_path: Path):
    notes: set[tuple[str, str]] = set()
    opened = Session(tmp_path / "data", "review", events=("accept",), unjudged={False: "not judged: no base"})
    opened.board.watch(lambda: notes.add((opened.board.snapshot.state, opened.board.snapshot.note)))
    opened.run()
    assert ("recording", "not judged: no base") in notes
    assert ("review", "goal not reached; not judged: no base") in notes


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"robot": "ros"}, "belong to --backend ros"),
        ({"gap": "hard"}, "belong to --backend ros"),
        ({"topics": "my_robot.yaml"}, "belong to --backend ros"),
        ({"backend": "ros", "randomization": "hard"}, "--randomization belongs to --backend sim"),
        ({"backend": "ros", "robot": "ros", "gap": "hard"}, "--gap belongs to --robot twin"),
    ],
)
def test_who_names_a_robot_does_not_get_a_simulation(flags: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        teleop.Config(**flags)


def test_base_data_of_one_mode_only_leave_the_other_unjudged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    config = teleop.Config(
        task="push", output=tmp_path / "new", port=0, coach=tmp_path / "data", image_size=16, view_size=0
    )
    embodiment = panda_embodiment(16)
    DatasetWriter(tmp_path / "data", embodiment, {}).close()

    def only_at_rest(base: Path, *, mode: str, **more: Any) -> Unwell:
        if mode != "static":
            raise DatasetError("the base has no takes in motion")
        return Unwell("nowhere")

    monkeypatch.setattr(CompatibilityCoach, "open", only_at_rest)
    with teleop.open_collection(config) as collection:
        session = collection.session
        assert set(session._coaches) == {False}
        assert session._remark() == ""
        session._move = True
        assert "in motion are not judged: the base has no takes in motion" in session._remark("goal reached")
    assert "in motion are not judged" in caplog.text


async def drive_until_recorded(url: str, steps: int) -> None:
    """What the page does: press record, hold, drive; returns when so many steps are recorded."""
    headers = {"Origin": url.rsplit("/", 2)[0]}
    async with aiohttp.ClientSession() as client, client.ws_connect(url + "ws", headers=headers) as socket:
        status: dict[str, Any] = {"state": "", "steps": 0, "stage": -1}
        for number in range(3000):
            held = {"engaged": number % 20 > 1, "motion": [0.2, 0, 0, 0, 0, 0], "drag": None, "gripper": None}
            held["stage"] = status["stage"]
            message = {"type": "input", **held, "at": None, "sent": time.monotonic_ns() * 1e-6}
            if status["state"] == "ready":
                message = {"type": "event", "name": "record", "stage": status["stage"]}
            await socket.send_json({"n": number, **message})
            with contextlib.suppress(TimeoutError):
                while True:
                    received = await socket.receive(0.02)
                    assert received.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), received
                    told = json.loads(received.data) if received.type == aiohttp.WSMsgType.TEXT else {}
                    status = told if told.get("type") == "status" else status
            if status["state"] == "recording" and status["steps"] >= steps:
                return
        raise AssertionError(f"nothing was recorded: {status}")


def test_the_command_stores_a_running_take_on_sigterm(tmp_path: Path):
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "simtoreal", "teleop", "--task", "reach", "--output", str(folder), "--port", "0"]
    options = ["--view-size", "0", "--image-size", "16", "--operator", "Ada"]
    child = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        url = next(line.strip() for line in child.stdout if line.strip().startswith("http"))
        asyncio.run(drive_until_recorded(url, STEPS))
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=60)[0]
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0
    assert "Collected 0 episodes of reach" in said
    assert "episode 000000 is stored" in said
    (episode,) = Dataset.open(folder).episodes
    assert (episode.failure, episode.success, episode.operator) == ("aborted", False, "Ada")
    assert episode.steps >= STEPS
