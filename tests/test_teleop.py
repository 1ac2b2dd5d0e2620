"""What keeps a teleoperated arm safe and its recordings exact: dead-man, watchdog, clutch, pace, messages, takes."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simtoreal.data_collection import teleop_pace
from simtoreal.data_collection.coaching import Review, Snippet
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.teleop_command import BACKLOG_STEPS, SILENCE_NS, CommandShaper
from simtoreal.data_collection.teleop_device import (
    EVENTS,
    OperatorInput,
    device_types,
    join_inputs,
    open_device,
)
from simtoreal.data_collection.teleop_hub import InputHub
from simtoreal.data_collection.teleop_loop import SessionEnd, SessionOptions, TeleopSession
from simtoreal.data_collection.teleop_pace import RealTimePace
from simtoreal.data_collection.teleop_page import MAX_MESSAGE_BYTES, MessageError, PageDevice, parse_message
from simtoreal.data_collection.teleop_session import TRANSITIONS, Board
from simtoreal.data_collection.teleop_take import TakeReview, TakeStore
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import load_task, panda_embodiment
from simtoreal.envs.action import integrate_action
from simtoreal.envs.errors import ConfigError, RobotError
from simtoreal.envs.tabletop import TabletopEnv

EMBODIMENT = panda_embodiment()
PERIOD_NS = 50_000_000
LIMITS = np.array(EMBODIMENT.action.limits[:6])
FORWARD = np.array([0.5, 0, 0, 0, 0, 0])


def given(at_ms: float, *, engaged: bool = True, motion=FORWARD, displacement=None, **more) -> OperatorInput:
    moved = None if displacement is None else np.asarray(displacement, dtype=float)
    return OperatorInput(
        motion=np.asarray(motion, dtype=float), displacement=moved, engaged=engaged,
        received_ns=round(at_ms * 1e6), **more,
    )  # fmt: skip


def pressed(at_ms: float = 0.0, **more) -> CommandShaper:
    """A shaper whose dead-man was released and pressed."""
    shaper = CommandShaper(EMBODIMENT)
    for engaged in (False, True):
        shaper.update(given(at_ms, engaged=engaged, **more), round(at_ms * 1e6))
    return shaper


# ---- dead-man and watchdog


def test_nothing_moves_until_the_dead_man_was_seen_released_and_then_pressed():
    shaper = CommandShaper(EMBODIMENT)
    shaper.update(given(0, engaged=True), 0)
    assert not shaper.active
    assert not shaper.begin(0).any()
    shaper.update(given(10, engaged=False), 10_000_000)
    assert not shaper.begin(10_000_000).any()
    assert shaper.update(given(20), 20_000_000), "a press is a reason to react at once"
    np.testing.assert_array_equal(shaper.begin(20_000_000), FORWARD)


def test_silence_stops_and_asks_for_a_fresh_press():
    shaper = pressed()
    assert not shaper.check(SILENCE_NS)
    assert shaper.check(SILENCE_NS + 1)
    assert (shaper.active, shaper.needs_release, shaper.losses) == (False, True, 1)
    # The same hand is still on the key when the network is back.
    shaper.update(given(300), 300_000_000)
    assert not shaper.begin(300_000_000).any()
    shaper.update(given(310, engaged=False), 310_000_000)
    shaper.update(given(320), 320_000_000)
    assert shaper.begin(320_000_000)[0] == 0.5


def test_an_input_that_was_old_when_it_was_read_does_not_move():
    shaper = pressed()
    shaper.update(given(10), 10_000_000 + SILENCE_NS + 1)
    assert not shaper.active


def test_the_end_of_an_interrupted_episode_is_no_press():
    shaper = pressed()
    shaper.interrupt(1_000_000)
    shaper.update(given(2), 2_000_000)
    assert not shaper.begin(2_000_000).any()


# ---- exact amounts


def test_speeds_count_for_the_time_that_they_were_held():
    shaper = pressed()
    shaper.begin(0)
    shaper.update(given(20, motion=[-0.5, 0, 0, 0, 0, 1.0]), 20_000_000)
    np.testing.assert_allclose(shaper.action()[[0, 5]], [0.5 * 0.4 - 0.5 * 0.6, 0.6])
    shaper.update(given(30, engaged=False), 30_000_000)
    np.testing.assert_allclose(shaper.action()[[0, 5]], [0.5 * 0.4 - 0.5 * 0.2, 0.2])
    assert not shaper.begin(PERIOD_NS).any()


def test_a_lost_device_counts_until_it_is_lost():
    shaper = pressed(0)
    shaper.begin(80_000_000)
    shaper.check(120_000_000)
    np.testing.assert_allclose(shaper.action()[0], 0.5 * 20 / 50)


def test_drags_sum_up_exactly_whatever_the_limits_make_of_them():
    shaper = pressed(motion=np.zeros(6))
    rng = np.random.default_rng(0)
    dragged, executed = np.zeros(6), np.zeros(6)
    for step in range(60):
        now = step * PERIOD_NS
        for part in range(3):
            move = rng.uniform(-0.4, 0.4, 6) * LIMITS if step < 50 else np.zeros(6)
            dragged += move
            at = now + part * 10_000_000
            shaper.update(given(at * 1e-6, motion=np.zeros(6), displacement=move), at)
            if part == 0:
                shaper.begin(now)
            action = shaper.action()
            assert np.abs(action).max() <= 1
        executed += action * LIMITS
    np.testing.assert_allclose(executed, dragged, atol=1e-12)


def test_a_flick_beyond_the_limits_keeps_its_direction_and_is_cut():
    shaper = pressed(motion=np.zeros(6), displacement=[0.3, 0.15, 0, 0, 0, 0])
    total = np.zeros(6)
    for step in range(5):
        shaper.update(given(step * 50, motion=np.zeros(6)), step * PERIOD_NS)
        action = shaper.begin(step * PERIOD_NS)
        if action.any():
            np.testing.assert_allclose(action[0], 2 * action[1])
        total += action
    np.testing.assert_allclose(total[0], BACKLOG_STEPS)


def test_what_waits_is_forgotten_with_the_press():
    shaper = pressed(motion=np.zeros(6), displacement=[0.04, 0, 0, 0, 0, 0])
    assert shaper.begin(0)[0] == 1
    shaper.update(given(10, engaged=False, motion=np.zeros(6)), 10_000_000)
    assert shaper.action()[0] == 1, "what was sent is not taken back"
    assert not shaper.begin(PERIOD_NS).any()


def test_reclutching_moves_nothing():
    page = PageDevice(Board())
    page.connect()
    hub = InputHub([page], EMBODIMENT)
    number = iter(range(1000))

    def say(engaged: bool, drag=None) -> None:
        page.feed(message(n=next(number), engaged=engaged, drag=drag))

    def stroke(clutch: int) -> float:
        """Drag 4 mm to the front and let go; returns what the arm did, in metres."""
        moved = 0.0
        for dragged in (0.0, 0.002, 0.004):
            say(True, [clutch, [dragged, 0, 0, 0, 0, 0]])
            hub.poll()
            moved += hub.begin(time.monotonic_ns())[0] * 0.02
        say(False, [clutch, [0.004, 0, 0, 0, 0, 0]])
        hub.poll()
        return moved + hub.begin(time.monotonic_ns())[0] * 0.02

    say(False)
    for clutch in (1, 2, 3):
        assert stroke(clutch) == pytest.approx(0.004)
    # The pad was dragged on without the dead-man: the arm does not catch up.
    say(False, [4, [0.5, 0, 0, 0, 0, 0]])
    say(True, [4, [0.5, 0, 0, 0, 0, 0]])
    hub.poll()
    assert not hub.begin(time.monotonic_ns())[:6].any()


# ---- several devices


class Hand:
    """A device played by the test."""

    name = "hand"

    def __init__(self) -> None:
        self.queue: list[OperatorInput] = []

    def say(self, **what) -> None:
        self.queue.append(given(time.monotonic_ns() * 1e-6, **what))

    def read(self) -> OperatorInput | None:
        return self.queue.pop(0) if self.queue else None

    def close(self) -> None:
        self.queue.clear()


def test_the_arm_follows_one_device_until_it_lets_go():
    first, second = Hand(), Hand()
    hub = InputHub([first, second], EMBODIMENT)
    for hand in (first, second):
        hand.say(engaged=False)
    second.say(motion=FORWARD)
    hub.poll()
    first.say(motion=-FORWARD)
    hub.poll()
    np.testing.assert_allclose(hub.begin(time.monotonic_ns())[0], 0.5)
    # The other one still holds: it does not take over by itself.
    second.say(engaged=False)
    first.say(motion=-FORWARD)
    hub.poll()
    assert not hub.begin(time.monotonic_ns())[:6].any()
    assert hub.needs_release


def test_gripper_is_latched_and_needs_the_dead_man():
    hand = Hand()
    hub = InputHub([hand], EMBODIMENT)
    hand.say(engaged=False, gripper=-1.0)
    hub.poll()
    assert hub.begin(0)[6] == 1
    hand.say(gripper=-1.0)
    hub.poll()
    hand.say(engaged=False)
    hub.poll()
    assert hub.begin(0)[6] == -1


def test_inputs_join_without_losing_displacements_events_or_releases():
    a = given(1, engaged=False, displacement=np.ones(6), events=("record",), gripper=-1.0)
    b = given(2, displacement=2 * np.ones(6), events=("finish",))
    joined = join_inputs(a, b)
    np.testing.assert_array_equal(joined.displacement, 3 * np.ones(6))
    assert (joined.events, joined.engaged, joined.gripper, joined.received_ns) == (
        ("record", "finish"), False, -1.0, 2_000_000,
    )  # fmt: skip


@pytest.mark.parametrize("motion", [np.full(6, 1.5), np.zeros(5), np.full(6, np.nan)])
def test_impossible_inputs_are_refused(motion):
    with pytest.raises(ValueError, match="motion"):
        OperatorInput(motion=motion)


def test_devices_are_known_by_name():
    assert {"keyboard", "spacemouse"} <= set(device_types())
    with pytest.raises(ConfigError, match="Did you mean 'keyboard'"):
        open_device("keybord")


# ---- the page's messages


def message(**changes) -> dict:
    return {
        "type": "input", "n": 1, "engaged": True, "motion": [0.0] * 6, "drag": None, "gripper": None, "at": None,
        "stage": 0, "sent": time.monotonic_ns() * 1e-6, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "nonsense", "[]", "5", '"input"', "[" * 5000, json.dumps(message()) + " " * MAX_MESSAGE_BYTES,
        json.dumps(message(n="1")), json.dumps(message(n=True)), json.dumps(message(type=["input"])),
        json.dumps(message(type="command")), json.dumps(message(engaged=1)), json.dumps(message(motion=[0.0] * 5)),
        json.dumps(message(motion=[2.0, 0, 0, 0, 0, 0])), json.dumps(message(motion=[float("nan")] * 6)),
        json.dumps(message(motion=[True] * 6)), json.dumps(message(drag=[1, [1e9] * 6])),
        json.dumps(message(drag=[1.5, [0] * 6])), json.dumps(message(gripper=0.5)),
        json.dumps({"type": "event", "n": 1, "name": "explode", "stage": 0}),
        json.dumps({"type": "event", "n": 1, "name": [], "stage": 0}),
        json.dumps({"type": "event", "n": 1, "name": "right"}), json.dumps(message(stage=True)),
        json.dumps({"type": "set", "n": 1, "operator": "x" * 65}),
        json.dumps({"type": "set", "n": 1, "operator": 5}),
        json.dumps({"type": "set", "n": 1, "move": "yes"}), json.dumps({"type": "ping", "n": 1, "at": "now"}),
        '{"type": "ping", "n": 1, "at": 1e999}',
    ],
)  # fmt: skip
def test_malformed_messages_are_refused_by_one_error(text):
    with pytest.raises(MessageError):
        parse_message(text)


def test_repeated_and_late_messages_are_ignored():
    page = PageDevice(Board())
    page.connect()
    assert page.feed(parse_message(json.dumps(message(n=5, engaged=False))))
    assert not page.feed(parse_message(json.dumps(message(n=5))))
    assert not page.feed(parse_message(json.dumps(message(n=4))))
    assert page.rejected == 2
    assert not page.read().engaged
    assert page.read() is None


def test_a_release_and_a_press_between_two_reads_are_both_seen():
    page = PageDevice(Board())
    page.connect()
    for n, engaged in enumerate([False, True, False, False, True]):
        page.feed(message(n=n, engaged=engaged))
    assert [page.read().engaged, page.read().engaged, page.read()] == [False, True, None]


def test_an_event_says_nothing_about_the_dead_man():
    page = PageDevice(Board())
    page.connect()
    page.feed(message(n=1, engaged=False))
    page.feed(message(n=2, motion=FORWARD.tolist()))
    page.read(), page.read()
    page.feed({"type": "event", "n": 3, "name": "finish", "stage": 0})
    heard = page.read()
    assert heard.events == ("finish",)
    assert heard.engaged
    np.testing.assert_array_equal(heard.motion, FORWARD)


@pytest.mark.parametrize("break_contact", ["disconnect", "silence"])
def test_contact_that_was_lost_needs_a_fresh_press_on_the_page(break_contact, monkeypatch):
    page = PageDevice(Board())
    page.connect()
    page.feed(message(n=1, engaged=False))
    page.feed(message(n=2))
    if break_contact == "disconnect":
        page.disconnect()
        page.connect()
    else:
        page._heard_ns -= SILENCE_NS + 1
    while page.read() is not None:
        pass
    page.feed(message(n=3))
    assert not page.read().engaged
    assert page.needs_release
    page.feed(message(n=4, engaged=False))
    page.feed(message(n=5))
    assert [page.read().engaged, page.read().engaged] == [False, True]


@pytest.mark.parametrize("late_ms", [150.0, 5000.0, -150.0, None])
def test_what_was_long_on_its_way_is_not_followed(late_ms):
    page = PageDevice(Board())
    page.connect()
    page.feed(message(n=1, engaged=False))
    page.feed(message(n=2, sent=None if late_ms is None else time.monotonic_ns() * 1e-6 - late_ms))
    assert not page.read().engaged
    assert page.stale == 1
    page.feed(message(n=3))
    assert not page.read().engaged, "a fresh press is needed"


def test_the_watchdog_counts_from_when_the_page_sent_an_input():
    page = PageDevice(Board())
    page.connect()
    sent = time.monotonic_ns() - 60_000_000
    page.feed(message(n=1, sent=sent * 1e-6))
    assert page.read().received_ns == pytest.approx(sent, abs=1000)


# ---- time


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def monotonic_ns(self) -> int:
        return self.now


class Waiting:
    """Stands in for a hub: each wait lasts to its end, or to the next of ``presses`` (ms)."""

    def __init__(self, clock: Clock, presses: list[float]) -> None:
        self.clock, self.presses = clock, [round(1e9 + press * 1e6) for press in presses]

    def wait(self, deadline_ns, on_input) -> None:
        while self.presses and self.presses[0] <= deadline_ns:
            self.clock.now = max(self.clock.now, self.presses.pop(0))
            if on_input(True):
                return
        self.clock.now = max(self.clock.now, deadline_ns)


def steps_at(monkeypatch, presses: list[float], count: int, work_ms: float = 0.0) -> tuple[list[float], int]:
    clock = Clock()
    monkeypatch.setattr(teleop_pace, "time", clock)
    pace, hub = RealTimePace(0.05), Waiting(clock, presses)
    pace.restart()
    times = []
    for _ in range(count):
        times.append((pace.wait(hub) - 1e9) * 1e-6)
        clock.now += round(work_ms * 1e6)
    return times, pace.missed


def test_steps_keep_absolute_deadlines(monkeypatch):
    times, missed = steps_at(monkeypatch, [], 40, work_ms=7.3)
    np.testing.assert_allclose(times, 50.0 * np.arange(1, 41))
    assert missed == 0


def test_a_press_steps_at_once_and_the_time_is_paid_back(monkeypatch):
    times, _ = steps_at(monkeypatch, [110.0], 40)
    assert times[2] == 110.0
    assert max(np.diff(times)) <= 60.0
    ahead = 50.0 * np.arange(1, 41) - times
    assert (np.diff(ahead[2:]) <= 0).all()
    assert ahead[-1] == pytest.approx(0, abs=0.01)


def test_presses_in_a_row_all_step_at_once(monkeypatch):
    presses = np.cumsum(np.random.default_rng(0).uniform(60.0, 140.0, 200))
    times, _ = steps_at(monkeypatch, list(presses), 420, work_ms=8.0)
    waited = [min(time - press for time in times if time > press - 1e-6) for press in presses]
    assert max(waited) <= 8.0, "no longer than the step before takes"


def test_hammering_on_a_key_cannot_make_the_simulation_run_away(monkeypatch):
    times, _ = steps_at(monkeypatch, list(np.arange(5.0, 4000.0, 3.0)), 70)
    ahead = 50.0 * np.arange(1, 71) - times
    assert ahead.max() <= teleop_pace.MOST_AHEAD_PERIODS * 50.0


def test_time_lost_while_ahead_is_no_missed_period(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(teleop_pace, "time", clock)
    pace, hub = RealTimePace(0.05), Waiting(clock, [10.0, 20.0, 30.0])
    pace.restart()
    for _ in range(3):
        pace.wait(hub)
    clock.now = round(1.18e9)  # the machine stands still for two periods, less than the simulation is ahead
    pace.wait(hub)
    assert pace.missed == 0
    clock.now += 200_000_000
    pace.wait(hub)
    assert pace.missed >= 2


def test_a_slow_machine_skips_periods_and_says_so(monkeypatch):
    times, missed = steps_at(monkeypatch, [], 10, work_ms=120.0)
    assert missed >= 9
    assert np.diff(times).min() >= 50.0


# ---- takes: the session with a real simulation


class Script:
    """An operator who does the next thing of a list whenever the state of the session, seen before, says so.

    Before the first motion it lets ``waiting`` steps pass.
    """

    def __init__(self, hand: Hand, board: Board, lines: list[tuple], waiting: int) -> None:
        self.hand, self.board, self.lines = hand, board, list(lines)
        self.stage = -1
        board.watch(self.look)
        self.held, self.last, self.last_steps, self.waiting = 0, None, 0, waiting

    def look(self) -> None:
        shown = self.board.snapshot
        stage, self.stage = self.stage, shown.stage
        if not self.lines or stage != shown.stage:
            return
        scene = (shown.state, shown.seed, shown.note)
        if scene != self.last or shown.steps < self.last_steps:
            self.last = None  # what was said last has had its effect
        state, steps, events = self.lines[0]
        if self.last is None and shown.state == state and shown.steps >= steps:
            self.lines.pop(0)
            self.last, self.last_steps = scene, shown.steps
            self.hand.say(engaged=False, events=events)
        elif shown.state == "recording":
            self.waiting -= 1
            if self.waiting >= 0:
                return
            self.hand.say(engaged=self.held % 10 > 0, motion=[0.3, 0, 0, 0, 0, 0])
            self.held += 1


class Judge:
    """A coach that dislikes the first ``bad`` takes."""

    def __init__(self, bad: int) -> None:
        self.bad, self.asked, self.resets = bad, [], 0

    def reset(self) -> None:
        self.resets += 1

    def step(self, observation, action) -> float:
        assert observation["proprio"].shape == (20,)
        assert action.shape == (7,)
        return 0.25

    def review(self, arrays) -> Review:
        self.asked.append(arrays)
        accepted = len(self.asked) > self.bad
        snippet = Snippet(
            start=1, stop=4, compatibility=0.1, reference_episode="000000", reference_start=0, reference_stop=3
        )
        return Review(
            accepted=accepted, compatibility=0.2 + 0.7 * accepted, bad_steps=9, tolerance=3,
            snippets=() if accepted else (snippet,),
        )  # fmt: skip


def run_session(
    folder: Path, lines: list[tuple], *, coach: Judge | None = None, waiting: int = 0, **options
) -> tuple[Board, TeleopSession]:
    written = load_task("reach")
    task = dataclasses.replace(written, horizon=400)
    embodiment = panda_embodiment(16, cameras=("front",))
    env = TabletopEnv(task, embodiment=embodiment, record_state=True)
    hand, board = Hand(), Board()
    page = PageDevice(board)
    with DatasetWriter(folder, embodiment, {"reach": written.to_dict()}) as writer:
        hub = InputHub([hand, page], embodiment)
        reference = Dataset.open(folder) if coach else None
        store = TakeStore(writer, task="reach", embodiment=embodiment, reference=reference)
        session = TeleopSession(
            SessionOptions(task="reach", first_seed=3, operator="Ada", **options), env, hub, page, store, board,
            coaches={False: coach} if coach else None,
        )  # fmt: skip
        script = Script(hand, board, lines, waiting)
        thread = threading.Timer(30.0, session.end)
        thread.start()
        session.run()
        assert thread.is_alive(), "the script never came to its end"
        thread.cancel()
        assert not script.lines
    env.close()
    return board, session


def test_takes_are_kept_repeated_and_discarded(tmp_path):
    lines = [
        ("ready", 0, ("record",)),
        ("recording", 5, ("finish",)),
        ("review", 5, ("accept",)),  # seed 3 is kept
        ("ready", 0, ("right",)),
        ("recording", 6, ("left",)),  # seed 4 again
        ("recording", 7, ("right",)),
        ("review", 7, ("right",)),  # seed 4 is kept
        ("ready", 0, ("record",)),
        ("recording", 3, ("discard",)),  # seed 5 is skipped
        ("ready", 0, ("next",)),  # and 6
        ("ready", 0, ("record",)),
        ("recording", 4, ("finish",)),
        ("review", 4, ("left",)),
        ("recording", 9, ("stop",)),  # seed 7 ends with the session
    ]
    board, _ = run_session(tmp_path / "data", lines)
    stored = Dataset.open(tmp_path / "data")
    assert [(e.seed, e.steps >= n, e.operator, e.source) for e, n in zip(stored.episodes, (5, 7, 9), strict=True)] == [
        (3, True, "Ada", "teleop"), (4, True, "Ada", "teleop"), (7, True, "Ada", "teleop"),
    ]  # fmt: skip
    assert [(e.success, e.failure) for e in stored.episodes] == [
        (False, "not_reached"), (False, "not_reached"), (False, "aborted"),
    ]  # fmt: skip
    names = ["000000", "000001", "000002"]
    assert sorted(path.name for path in (tmp_path / "data/episodes").iterdir()) == [f"{name}.hdf5" for name in names]
    assert [row["name"] for row in board.episodes] == names
    assert (board.snapshot.state, board.snapshot.kept) == ("finished", 2)


def test_a_take_lasts_from_its_first_motion_on_and_needs_one(tmp_path):
    notes, original = [], Board.post

    def watch(self, **changes) -> None:
        original(self, **changes)
        notes.append((self.snapshot.state, self.snapshot.note))

    lines = [
        ("ready", 0, ("record",)),
        ("recording", 0, ("finish",)),  # nothing has happened yet
        ("review", 12, ("accept",)),  # it has lasted as long as it may
        ("ready", 0, ("stop",)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Board, "post", watch)
        run_session(tmp_path / "data", lines, waiting=30, longest_steps=12)
    (episode,) = Dataset.open(tmp_path / "data").episodes
    assert (episode.steps, episode.failure) == (12, "not_reached")
    assert any(state == "recording" and "nothing to finish" in note for state, note in notes)
    assert not any(state == "review" and "nothing to finish" in note for state, note in notes)


def test_nothing_is_called_ready_or_recording_before_the_scene_is(tmp_path, monkeypatch):
    states, original = [], Board.post

    def watch(self, **changes) -> None:
        original(self, **changes)
        if states[-1:] != [self.snapshot.state]:
            states.append(self.snapshot.state)

    monkeypatch.setattr(Board, "post", watch)
    lines = [
        ("ready", 0, ("record",)),
        ("recording", 3, ("finish",)),
        ("review", 0, ("left",)),
        ("recording", 3, ("finish",)),
        ("review", 0, ("accept",)),
        ("ready", 0, ("stop",)),
    ]
    run_session(tmp_path / "data", lines)
    take = ["preparing", "recording", "review"]
    assert states == ["preparing", "ready", *take, *take, "preparing", "ready", "finished"]


def test_recorded_actions_explain_recorded_targets_and_replay_exactly(tmp_path):
    lines = [
        ("ready", 0, ("record",)),
        ("recording", 25, ("finish",)),
        ("review", 0, ("accept",)),
        ("ready", 0, ("stop",)),
    ]
    run_session(tmp_path / "data", lines)
    stored = Dataset.open(tmp_path / "data")
    arrays = stored.read(stored.episodes[0])
    actions, targets, states = arrays["actions"], arrays["step/target"], arrays["states"]
    assert np.abs(actions[:, 0]).max() > 0.2
    assert (actions[:, 0] == 0).any(), "the dead-man was let go now and then"
    expected = integrate_action(targets[:-1], actions[1:], stored.embodiment)
    np.testing.assert_array_equal(expected[:, :3], targets[1:, :3])
    env = TabletopEnv(dataclasses.replace(load_task("reach"), horizon=400), embodiment=stored.embodiment)
    env.reset(seed=stored.episodes[0].seed, options={"init": states[0]})
    for step in range(len(actions) - 1):
        env.step(actions[step])
        np.testing.assert_array_equal(env.get_state(), states[step + 1])
    env.close()


def test_on_a_robot_the_operator_judges_by_accepting(tmp_path):
    lines = [
        ("ready", 0, ("record",)), ("recording", 5, ("finish",)), ("review", 0, ("accept",)), ("ready", 0, ("stop",)),
    ]  # fmt: skip
    run_session(tmp_path / "data", lines, judge="operator", practice=False)
    dataset = Dataset.open(tmp_path / "data")
    (episode,) = dataset.episodes
    assert episode.success
    arrays, ends = dataset.read(episode), [0] * (episode.steps - 1) + [1]
    assert arrays["rewards"].tolist() == arrays["dones"].tolist() == ends
    assert (arrays["rewards"].dtype, arrays["dones"].dtype) == (np.float32, np.int8)


def test_a_rejected_take_is_shown_beside_a_reference_and_kept_only_on_purpose(tmp_path):
    first = [
        ("ready", 0, ("record",)),
        ("recording", 5, ("finish",)),
        ("review", 0, ("accept",)),
        ("ready", 0, ("stop",)),
    ]
    run_session(tmp_path / "data", first)
    seen: list[dict] = []
    lines = [
        ("ready", 0, ("record",)),
        ("recording", 5, ("finish",)),
        ("review", 0, ("accept",)),  # not enough
        ("review", 0, ("accept_anyway",)),
        ("ready", 0, ("record",)),
        ("recording", 5, ("finish",)),
        ("review", 0, ("accept",)),
        ("ready", 0, ("stop",)),
    ]
    coach = Judge(bad=1)
    board = Board
    original = board.post

    def watch(self, **changes) -> None:
        original(self, **changes)
        if self.snapshot.review and (not seen or seen[-1] != self.snapshot.review):
            verdict = self.snapshot.review["verdict"]
            for snippet in verdict["snippets"]:
                assert self.media[snippet["take"]].startswith(b"\xff\xd8")
                assert self.media[snippet["reference"]].startswith(b"\xff\xd8")
            seen.append(self.snapshot.review)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Board, "post", watch)
        shown, _ = run_session(tmp_path / "data", lines, coach=coach)
    assert [review["verdict"]["accepted"] for review in seen] == [False, True]
    assert len(seen[0]["verdict"]["snippets"]) == 1
    kept = Dataset.open(tmp_path / "data").episodes[1:]
    assert [e.extra["compatibility"]["overridden"] for e in kept] == [True, False]
    assert [e.extra["compatibility"]["accepted"] for e in kept] == [False, True]
    assert shown.episodes[-1]["compatibility"] == pytest.approx(0.9)
    assert coach.resets == 2
    assert coach.asked[0]["obs/front_image"].shape[1:] == (16, 16, 3)


# ---- what is pressed counts for what was shown


def asking(*devices) -> tuple[TeleopSession, PageDevice]:
    """A session at a real robot that has no robot, with the page as its last device."""
    board = Board()
    page = PageDevice(board)
    store: Any = SimpleNamespace(counters=dict, alarm="")
    options = SessionOptions(task="reach", first_seed=0, judge="operator", practice=False)
    return TeleopSession(options, None, InputHub([*devices, page], EMBODIMENT), page, store, board), page  # type: ignore[arg-type]


def test_the_arm_goes_home_when_somebody_agrees_to_what_the_page_shows():
    hand = Hand()
    session, page = asking(hand)
    number = iter(range(1000))

    def shows(stage: int) -> None:
        page.feed(message(n=next(number), engaged=False, stage=stage))

    def press(name: str, stage: int) -> None:
        page.feed({"type": "event", "n": next(number), "name": name, "stage": stage})

    def say(*events: str) -> None:
        hand.say(engaged=False, events=events)

    page.connect()
    shows(0)
    # Waiting in the devices when the question comes.
    press("agree", 0)
    say("right", "agree")
    steps = [
        lambda stage: say("agree"),  # at the moment of the question
        lambda stage: say("agree"),  # somebody who cannot have read it: the page does not show it yet
        lambda stage: press("agree", stage - 1),  # on its way when the question came
        lambda stage: shows(stage),
        lambda stage: [press(name, stage) for name in ("right", "accept", "record", "finish")],
        lambda stage: say("right", "accept", "record", "finish"),
        lambda stage: (page.disconnect(), say("agree")),
        lambda stage: (shows(stage), press("agree", stage)),
    ]
    left = list(steps)

    def act() -> None:
        shown = session.board.snapshot
        if shown.prompt and left:
            left.pop(0)(shown.stage)

    session.board.watch(act)
    session.ask("The arm will move home.")
    assert not left, f"agreed after {len(steps) - len(left)} of {len(steps)} steps"
    assert session.board.snapshot.prompt == ""


@pytest.mark.parametrize("event", ["left", "stop"])
def test_a_person_who_does_not_want_the_arm_to_move_is_heard(event: str):
    session, page = asking()
    page.connect()
    session.board.watch(
        lambda: page.feed(
            {"type": "event", "n": page._newest + 1, "name": event, "stage": session.board.snapshot.stage}
        )
    )
    with pytest.raises(RobotError if event == "left" else SessionEnd):
        session.ask("The arm will move home.")


def test_a_finish_that_comes_after_the_end_of_the_take_does_not_accept_it():
    hand = Hand()
    session, page = asking(hand)
    page.connect()
    session._state = "recording"
    session._enter(state="recording")
    pressed_at = session.board.snapshot.stage

    def press(number: int, stage: int) -> None:
        page.feed({"type": "event", "n": number, "name": "right", "stage": stage})

    def review(coach: object) -> TakeReview:
        press(1, pressed_at)  # while the take is read back, the page shows that it is still recorded
        hand.say(engaged=False, events=("right",))
        return TakeReview()

    session._store.review = review
    session._finish_take()
    press(2, pressed_at)  # on its way meanwhile
    session._hub.poll()
    assert session.board.snapshot.state == "review"
    assert not session._stopped()
    press(3, session.board.snapshot.stage)
    session._hub.poll()
    assert session._stopped()
    assert session._decision == "accept"


def test_an_end_of_the_session_counts_whatever_is_shown():
    session, page = asking()
    page.connect()
    page.feed({"type": "event", "n": 1, "name": "stop", "stage": -1})
    session._enter(state="review")
    assert list(session._hub.events) == ["stop"]


@pytest.mark.parametrize(
    ("typed", "cleaned"), [("Ana\u00a0 Ruiz ", "Ana Ruiz"), ("\u200dAda\n", "Ada"), ("\ud83d", "")]
)
def test_names_are_cleaned_instead_of_refused(typed: str, cleaned: str):
    page = PageDevice(Board())
    page.connect()
    page.feed(parse_message(json.dumps({"type": "set", "n": 1, "operator": typed})))
    assert page.settings() == {"operator": cleaned}


def test_every_event_means_something_somewhere():
    assert {event for _, event in TRANSITIONS} | {"agree"} == set(EVENTS)
