"""The teleoperation page in real Chromium: demonstrations through it, and everything that must stop the arm."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page
from teleop_browser import (
    GamepadOperator,
    browser_context,
    descendants,
    look,
    open_page,
    running,
    start_recording,
    state,
    wait_for,
)

from simtoreal.commands.teleop import Collection, Config
from simtoreal.data_collection import teleop_command, teleop_page, teleop_server
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.teleop_hub import InputHub
from simtoreal.data_collection.teleop_loop import SessionOptions, TeleopSession
from simtoreal.data_collection.teleop_page import PageDevice
from simtoreal.data_collection.teleop_pictures import jpeg
from simtoreal.data_collection.teleop_server import TeleopServer
from simtoreal.data_collection.teleop_session import Board
from simtoreal.envs import panda_embodiment

# Longer than any of these takes on a busy machine; a browser that hangs fails its own test only.
pytestmark = pytest.mark.timeout(200)
# The arm's last motion begins at most this long after the last sign of life of whoever moves it.
STOP_WITHIN_NS = 150_000_000


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chromium")


@pytest.fixture(scope="module")
def browser(profile: Path) -> Iterator[Any]:
    with browser_context(profile, viewport={"width": 1280, "height": 820}) as context:
        yield context


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    folder = tmp_path_factory.mktemp("teleop") / "data"
    with running(Config(task="push", output=folder, port=0, view_size=0, image_size=32, seconds=600)) as opened:
        yield opened


class Log:
    """When the operator was heard with the dead-man held, and what the environment was told to do."""

    def __init__(self, collection: Collection) -> None:
        self.heard: list[int] = []
        self.events: list[str] = []
        self.steps: list[tuple[int, np.ndarray]] = []
        self.feed, self.env = collection.page.feed, collection.session._env
        self.step, self.page = self.env.step, collection.page
        self.page.feed, self.env.step = self._listen, self._watch

    def _listen(self, message: dict[str, Any]) -> bool:
        if message.get("engaged"):
            self.heard.append(time.monotonic_ns())
        if message["type"] == "event":
            self.events.append(message["name"])
        return self.feed(message)

    def _watch(self, action: np.ndarray) -> Any:
        self.steps.append((time.monotonic_ns(), action.copy()))
        return self.step(action)

    def remove(self) -> None:
        self.page.feed, self.env.step = self.feed, self.step

    def moving(self) -> list[tuple[int, np.ndarray]]:
        return [(at, action) for at, action in list(self.steps) if action[:6].any()]

    def check(self) -> None:
        """Every motion is explained by somebody who was there."""
        heard = np.array(self.heard)
        assert all(at - heard[heard <= at].max() <= STOP_WITHIN_NS for at, _ in self.moving())

    def rests(self, steps: int = 8) -> bool:
        """Whether the next control steps do nothing."""
        begin = len(self.steps)
        wait_for(lambda: len(self.steps) >= begin + steps, "control steps")
        return not any(action[:6].any() for _, action in self.steps[begin + 1 :])

    def sum(self) -> np.ndarray:
        return np.sum([action[:6] for _, action in list(self.steps)], axis=0) * np.array([0.02] * 3 + [0.1] * 3)


@dataclass
class Drive:
    page: Page
    collection: Collection
    log: Log

    @property
    def active(self) -> bool:
        return self.collection.session.board.snapshot.active

    def press(self) -> None:
        """Press the dead-man, again if contact was lost before the arm followed (on a busy machine it may be)."""
        for _ in range(20):
            self.page.keyboard.up("Space")
            self.page.keyboard.down("Space")
            with contextlib.suppress(AssertionError):
                wait_for(lambda: self.active, "the arm follows", 0.5)
                return
        raise AssertionError("the arm never followed")

    def drive_forward(self) -> None:
        self.page.keyboard.down("KeyW")
        self.moves_after_a_press()

    def moves_after_a_press(self) -> None:
        seen = len(self.log.moving())
        for _ in range(40):  # a busy machine may be too late for the dead-man, again and again
            self.press()
            with contextlib.suppress(AssertionError):
                wait_for(lambda: len(self.log.moving()) > seen + 2, "motion", 1.0)
                return
        raise AssertionError("nothing moved")


@pytest.fixture
def drive(browser: Any, collection: Collection) -> Iterator[Drive]:
    page = open_page(browser, collection)
    log = Log(collection)
    try:
        page.locator("#view").select_option("1")
        if teleop_command.SILENCE_NS > STOP_WITHIN_NS:  # patient
            page.evaluate("pictureMs = 30000")
        start_recording(page, collection)
        yield Drive(page, collection, log)
        if teleop_command.SILENCE_NS < STOP_WITHIN_NS:
            log.check()
    finally:  # whatever went wrong, the next test finds a session that is ready for it
        log.remove()
        page.close()
        collection.session._hub.events.append("next")
        wait_for(lambda: state(collection) == "ready", "ready again")


# ---- what stops the arm


def test_releasing_the_dead_man_stops_and_pressing_it_moves(drive: Drive):
    drive.drive_forward()
    assert all(action[0] == np.float32(0.5) for _, action in drive.log.moving()), "half speed, straight ahead"
    drive.page.keyboard.up("Space")
    wait_for(lambda: not drive.active, "rest")
    assert drive.log.rests()
    drive.moves_after_a_press()


@pytest.mark.parametrize("loss", ["blur", "typing", "connection"])
def test_losing_focus_or_connection_stops_and_needs_a_fresh_press(drive: Drive, loss: str):
    drive.drive_forward()
    if loss == "blur":
        drive.page.evaluate("window.dispatchEvent(new Event('blur'))")
    elif loss == "typing":
        drive.page.locator("#operator").focus()
    else:
        drive.page.evaluate("socket.close()")
    wait_for(lambda: not drive.active, "rest")
    # Both keys are still held, and the page is soon connected again.
    wait_for(lambda: drive.page.evaluate("socket.readyState") == 1, "connection")
    assert drive.log.rests()
    if loss == "typing":
        drive.page.locator("#operator").blur()
    drive.page.keyboard.down("Space")  # the keyboard repeats a key that is held
    wait_for(lambda: "press again" in drive.page.locator("#hint").inner_text(), "what to do")
    drive.page.keyboard.up("KeyW")
    drive.drive_forward()


def test_closing_the_page_stops(drive: Drive, browser: Any):
    drive.drive_forward()
    drive.page.close()
    wait_for(lambda: not drive.active, "rest")
    assert drive.log.rests()
    with contextlib.closing(open_page(browser, drive.collection)):
        assert drive.log.rests()


def browser_processes(profile: Path) -> list[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if f"--user-data-dir={profile}".encode() in command and b"--type=" not in command:
                    return descendants(int(entry.name))
    raise AssertionError("Chromium is not running")


@contextlib.contextmanager
def frozen(processes: list[int]) -> Iterator[None]:
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


def test_a_frozen_browser_stops_and_needs_a_fresh_press(drive: Drive, profile: Path):
    processes, hub = browser_processes(profile), drive.collection.session._hub
    for _ in range(10):
        drive.drive_forward()
        before, connections = hub.losses, drive.collection.server.connections
        with frozen(processes):
            wait_for(lambda: not drive.active, "rest")
            lost = hub.losses > before
            assert drive.log.rests()
        if lost:
            break
        drive.page.keyboard.up("KeyW")  # contact was lost before, as on a busy machine it may be
    assert lost
    shown = drive.collection.session.board
    # Frozen for more than the server's patience on a busy machine, it connects anew and holds nothing.
    renewed = lambda: drive.collection.server.connections > connections  # noqa: E731
    wait_for(lambda: shown.snapshot.needs_release or renewed(), "the page speaks again, key held")
    assert drive.log.rests()
    drive.page.keyboard.up("KeyW")
    drive.drive_forward()


def test_an_open_list_lets_go_and_its_keys_move_nothing(drive: Drive):
    drive.drive_forward()
    box = drive.page.locator("#view").bounding_box()
    drive.page.mouse.click(box["x"] + 20, box["y"] + box["height"] / 2)
    wait_for(lambda: not drive.active, "rest")
    for key in ("Space", "KeyW"):  # the list gets these releases
        drive.page.keyboard.up(key)
    drive.page.keyboard.down("KeyW")
    drive.page.keyboard.down("Space")
    assert drive.log.rests()
    for key in ("Space", "KeyW"):
        drive.page.keyboard.up(key)
    drive.page.locator("#view").blur()
    drive.drive_forward()


def test_the_command_key_lets_go(drive: Drive):
    drive.drive_forward()
    drive.page.keyboard.down("Meta")  # from here on, macOS does not tell that other keys are released
    wait_for(lambda: not drive.active, "rest")
    drive.page.keyboard.up("Meta")
    assert drive.log.rests()
    drive.page.keyboard.up("KeyW")
    drive.drive_forward()


def test_there_is_no_menu_that_could_swallow_a_release(drive: Drive):
    drive.page.evaluate("addEventListener('contextmenu', (event) => { window.menu = !event.defaultPrevented; })")
    for place in ("header", "#cameras", "#hold", "#view", "#pill"):
        drive.page.evaluate("window.menu = null")
        drive.page.locator(place).click(button="right", force=True)
        wait_for(lambda: drive.page.evaluate("window.menu !== null"), f"a right click on {place}")
        assert drive.page.evaluate("window.menu") == (place == "#view")
    drive.page.locator("#view").blur()


def test_pictures_that_cannot_be_read_do_not_end_the_view(drive: Drive, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teleop_server, "IN_FLIGHT_S", 1e9)  # the page confirms also what it cannot show
    broken = [b"no picture"] * 2 * len(drive.collection.embodiment.cameras)
    monkeypatch.setattr(teleop_server, "jpeg", lambda image: broken.pop() if broken else jpeg(image))
    wait_for(lambda: not broken, "two broken pictures on their way")
    shown = drive.page.evaluate("window.teleop.shown")
    wait_for(lambda: drive.page.evaluate("window.teleop.shown") > shown + 5, "pictures")


def test_nobody_drives_without_pictures(drive: Drive, monkeypatch: pytest.MonkeyPatch):
    drive.drive_forward()
    assert not drive.page.locator("#blind").is_visible()
    with monkeypatch.context() as patch:
        patch.setattr(teleop_server, "jpeg", lambda image: b"no picture")
        wait_for(lambda: drive.page.locator("#blind").is_visible(), "the alarm")
        wait_for(lambda: not drive.active, "rest")
        before = len(drive.log.moving())
        for key in ("KeyW", "Space") * 5:
            drive.page.keyboard.up(key)
            drive.page.keyboard.down(key)
        assert drive.log.rests()
        assert len(drive.log.moving()) == before
    wait_for(lambda: not drive.page.locator("#blind").is_visible(), "pictures")
    assert drive.log.rests(), "a press before there were pictures does not count"
    drive.page.keyboard.up("KeyW")
    drive.drive_forward()


# ---- what a pointer and the keys mean


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact amounts are not about lost contact, which a busy test machine may have at any time."""
    for module in (teleop_command, teleop_page):
        monkeypatch.setattr(module, "SILENCE_NS", 5_000_000_000)


def test_drags_move_exactly_and_reclutching_does_not_jump(patient: None, drive: Drive):
    box = drive.page.locator("#padxy").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    mouse = drive.page.mouse

    def stroke() -> None:
        mouse.move(x, y)
        mouse.down()
        wait_for(lambda: drive.active, "clutch")
        for part in (20, 40, 60):
            mouse.move(x + part, y - part / 2)
            assert_follows(part)
        mouse.up()
        wait_for(lambda: not drive.active, "clutch open")

    def assert_follows(part: float) -> None:
        # Half speed: 0.5 mm per pixel; to the right is -y, upwards +x, seen from behind the robot.
        expected = start + np.array([part / 2, -part, 0, 0, 0, 0]) * 0.0005
        wait_for(lambda: np.allclose(drive.log.sum(), expected, atol=1e-6), f"{expected}, is {drive.log.sum()}", 5)

    for _ in range(2):
        start = drive.log.sum()
        stroke()
        mouse.move(x - 50, y + 30)  # moving on without the button moves nothing
        assert drive.log.rests(4)


def test_a_repeating_key_toggles_the_gripper_once(patient: None, drive: Drive):
    drive.press()
    for _ in range(4):
        drive.page.keyboard.down("KeyG")  # held: from the second on the browser marks it as a repetition
    wait_for(lambda: drive.log.steps and drive.log.steps[-1][1][6] == -1, "closed gripper")
    drive.page.keyboard.up("KeyG")
    assert drive.log.rests()
    assert drive.log.steps[-1][1][6] == -1


def test_touch_cancelled_by_the_system_lets_go(patient: None, drive: Drive):
    hold = drive.page.locator("#hold")
    drive.page.mouse.move(*[hold.bounding_box()[key] + 20 for key in ("x", "y")])
    drive.page.mouse.down()
    wait_for(lambda: drive.active, "hold button")
    hold.dispatch_event("pointercancel", {"pointerId": 1})
    wait_for(lambda: not drive.active, "rest")
    drive.page.mouse.up()


class Fingers:
    """Touches of a screen, each with a number."""

    def __init__(self, page: Page) -> None:
        self.page, self.session, self.down = page, page.context.new_cdp_session(page), {}

    def on(self, finger: int, place: str, right: float = 0.0) -> None:
        """Put down ``finger``, or move it: ``right`` pixels from the middle of ``place``."""
        box = self.page.locator(place).bounding_box()
        kind = "touchMove" if finger in self.down else "touchStart"
        self.down[finger] = {"x": box["x"] + box["width"] / 2 + right, "y": box["y"] + box["height"] / 2, "id": finger}
        self.send(kind, *self.down.values())

    def off(self, finger: int) -> None:
        self.send("touchEnd", self.down.pop(finger))

    def send(self, kind: str, *points: dict[str, float]) -> None:
        self.session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


@pytest.mark.parametrize("held", ["#hold", "#padxy"])
def test_a_second_finger_closes_the_gripper_while_the_first_one_drives(patient: None, drive: Drive, held: str):
    fingers = Fingers(drive.page)
    fingers.on(1, held)
    wait_for(lambda: drive.active, "the arm follows the first finger")
    fingers.on(2, "#gripper")
    fingers.off(2)
    wait_for(lambda: drive.log.steps[-1][1][6] == -1, "closed gripper")
    assert drive.active
    fingers.off(1)
    wait_for(lambda: not drive.active, "rest")


def test_a_click_toggles_the_gripper_once_whatever_makes_it(patient: None, drive: Drive):
    drive.press()
    shown = lambda: drive.page.locator("#gripperstate").inner_text()  # noqa: E731
    drive.page.locator("#gripper").hover()
    drive.page.mouse.down()
    wait_for(lambda: shown() == "closed", "closed gripper")
    drive.page.mouse.up()
    assert drive.log.rests(12), "until the page has forgotten it"
    assert shown() == "closed"
    drive.page.locator("#gripper").evaluate("(button) => button.click()")  # as a screen reader does
    wait_for(lambda: shown() == "open", "open gripper")


def test_a_finger_that_was_let_go_of_drags_nothing_when_another_one_comes(patient: None, drive: Drive):
    fingers = Fingers(drive.page)
    fingers.on(1, "#padxy")
    wait_for(lambda: drive.active, "the arm follows the first finger")
    drive.page.evaluate("window.dispatchEvent(new Event('blur'))")
    wait_for(lambda: not drive.active, "rest")
    fingers.on(1, "#padxy", right=40)  # is not seen
    fingers.on(2, "#padz")
    wait_for(lambda: drive.active, "the arm follows the second finger")
    fingers.on(1, "#padxy", right=41)
    fingers.on(2, "#padz", right=-4)  # half speed: 5 mrad per pixel
    expected = np.array([0, 0, 0, 0, 0, 0.02])
    wait_for(lambda: np.allclose(drive.log.sum(), expected, atol=1e-6), f"{expected}, is {drive.log.sum()}", 10)
    fingers.off(1)
    fingers.off(2)


# A pad that is not there yet; `see` returns when the page has read what it does.
PADS = """
window.pads = [];
navigator.getGamepads = () => window.pads;
window.pressing = (pressed, mapping = "standard", index = 0, axes = [0, 0, 0, 0]) => ({
  connected: true, id: "Odd Stick", index, mapping, axes,
  buttons: [...Array(17).keys()].map((button) => ({ value: Number(pressed.includes(button)), pressed: false })),
});
window.see = (...pads) => { window.pads = pads; return new Promise((done) => setTimeout(done, 100)); };
"""


def test_the_press_that_wakes_a_gamepad_and_keys_of_the_cross_say_nothing(drive: Drive):
    look(drive.page, drive.collection)
    drive.log.events.clear()
    drive.page.evaluate(PADS)
    for buttons in ("[0, 2, 3, 9]", "[]", "[14]", "[]", "[15]"):
        drive.page.evaluate(f"see(pressing({buttons}))")
    drive.page.evaluate("see()")  # unplugged
    drive.page.evaluate("see(pressing([2, 7], 'standard', 0, [0, -1, 0, 0]))")
    assert drive.log.rests(), "a trigger that was held when the pad came"
    drive.page.evaluate("see(pressing([]))")
    assert drive.log.events == []
    for _ in range(20):  # on a busy machine pictures may be late, and a page without them lets go
        with contextlib.suppress(AssertionError):
            drive.page.evaluate("see(pressing([]))")
            drive.page.evaluate("see(pressing([2]))")
            wait_for(lambda: drive.log.events, "and now it does", 0.5)
            break
    assert set(drive.log.events) == {"left"}


def test_a_gamepad_of_unknown_layout_moves_nothing_and_the_page_says_so(drive: Drive):
    drive.page.evaluate(PADS)
    odd = "pressing({}, '', 0, [1, 1, -1, 0])"
    drive.page.evaluate(f"see({odd.format('[]')})")
    drive.page.evaluate(f"see({odd.format('[6, 7]')})")
    assert drive.log.rests()
    wait_for(lambda: "layout is unknown: Odd Stick" in drive.page.locator("#hint").inner_text(), "the hint")
    drive.page.evaluate("see(null, pressing([], 'standard', 1))")
    for _ in range(20):
        with contextlib.suppress(AssertionError):
            drive.page.evaluate(f"see({odd.format('[]')}, pressing([], 'standard', 1))")
            drive.page.evaluate(f"see({odd.format('[]')}, pressing([7], 'standard', 1, [0, -1, 0, 0]))")
            wait_for(drive.log.moving, "motion of the other one", 0.5)
            break
    assert {np.sign(action[0]) for _, action in drive.log.moving()} == {1.0}
    drive.page.evaluate("see()")


def test_what_is_pressed_in_the_moment_of_the_review_does_not_accept(drive: Drive):
    drive.drive_forward()
    look(drive.page, drive.collection)
    drive.log.events.clear()
    drive.page.evaluate(
        """new MutationObserver((_, observer) => {
          if (status.state !== "review") return;
          observer.disconnect(); // every status sets it again
          dispatchEvent(new KeyboardEvent("keydown", { code: "ArrowRight" }));
        }).observe(document.body, { attributeFilter: ["data-state"] })"""
    )
    kept = drive.collection.session.board.snapshot.kept
    drive.page.keyboard.press("ArrowRight")
    wait_for(lambda: state(drive.collection) == "review", "review")
    look(drive.page, drive.collection)
    assert (drive.log.events, state(drive.collection)) == (["right"], "review")
    assert drive.collection.session.board.snapshot.kept == kept


def test_the_switch_of_the_scene_shows_what_is_so(drive: Drive):
    move = lambda: drive.collection.session.board.snapshot.move  # noqa: E731
    assert move() is False
    drive.page.evaluate("socket.close(); $('move').checked = true; $('move').dispatchEvent(new Event('change'))")
    wait_for(lambda: not drive.page.evaluate("$('move').checked"), "the switch is off again")
    assert move() is False
    drive.page.locator("#moverow").click()  # during a take: for the next one
    wait_for(move, "the switch on the server")
    drive.page.evaluate("$('pill').textContent = ''")
    wait_for(lambda: drive.page.locator("#pill").inner_text(), "the next status")
    assert drive.page.evaluate("$('move').checked"), "also after the next status"
    assert state(drive.collection) == "recording"
    drive.page.locator("#moverow").click()
    wait_for(lambda: not move(), "the switch is off")


def test_a_name_with_odd_spaces_does_not_end_the_connection(drive: Drive):
    connections = drive.collection.server.connections
    drive.page.locator("#operator").fill("Ana\u00a0Ruiz \U0001f469\u200d\U0001f52c")
    drive.page.locator("#operator").press("Enter")
    wait_for(lambda: drive.collection.session.board.snapshot.operator == "Ana Ruiz \U0001f469 \U0001f52c", "the name")
    assert drive.collection.server.connections == connections


@pytest.mark.parametrize("way", ["key", "button", "gamepad"])
def test_a_person_agrees_on_the_page_before_an_arm_moves_by_itself(browser: Any, tmp_path: Path, way: str):
    board = Board()
    device = PageDevice(board)
    store: Any = SimpleNamespace(counters=dict, alarm="")
    options = SessionOptions(task="reach", first_seed=0, judge="operator", practice=False)
    session = TeleopSession(options, None, InputHub([device], panda_embodiment(16)), device, store, board)  # type: ignore[arg-type]
    with contextlib.closing(TeleopServer(board, device, tmp_path)) as server:
        asking = threading.Thread(target=session.ask, args=("The arm will move home.",))
        page = browser.new_page()
        try:
            page.goto(server.url)
            page.evaluate(PADS)
            opened: Any = SimpleNamespace(session=session)
            look(page, opened)
            page.keyboard.press("y")  # before there is a question
            page.evaluate("see(pressing([]))")
            asking.start()
            wait_for(lambda: page.locator("#prompttext").inner_text() == "The arm will move home.", "the question")
            look(page, opened)
            for key in ("ArrowRight", "ArrowRight", "Space", "Enter"):
                page.keyboard.press(key)
            for buttons in ("[0, 9]", "[]"):
                page.evaluate(f"see(pressing({buttons}))")
            assert board.snapshot.prompt
            {
                "key": lambda: page.keyboard.press("y"),
                "button": lambda: page.locator("#prompt .primary").click(),
                "gamepad": lambda: page.evaluate("see(pressing([1]))"),
            }[way]()
            asking.join(10)
            assert not asking.is_alive(), "the answer was heard"
        finally:
            session.end()
            page.close()


# ---- whole sessions


def test_a_demonstration_through_the_page_is_accepted_into_a_dataset(patient: None, browser: Any, tmp_path: Path):
    config = Config(task="pick_place", output=tmp_path / "data", port=0, view_size=96, operator="nobody")
    with running(config) as opened:
        page = open_page(browser, opened, gamepad=True)
        page.locator("#operator").fill("Grace Hopper")
        page.locator("#operator").press("Enter")
        person = GamepadOperator(page, opened)
        start_recording(page, opened)
        person.demonstrate()
        assert state(opened) == "review"
        wait_for(lambda: page.locator("#reviewnote").inner_text() == "goal reached", "the review")
        page.reload()  # a page that comes anew finds the take that waits
        wait_for(lambda: page.locator("#reviewnote").inner_text() == "goal reached", "the review again")
        assert page.locator("#takes .strip").count() == len(opened.embodiment.cameras)
        look(page, opened)
        page.locator("#accept").click()
        wait_for(lambda: page.locator("#episodes li").count() == 1, "the episode in the list")
        assert "Grace Hopper" in page.locator("#episodes li").inner_text()
        wait_for(lambda: page.evaluate("document.querySelector('#episodes img').naturalWidth") > 0, "thumbnail")
        assert opened.server.frames_sent > 20
        page.keyboard.press("Escape")
        wait_for(lambda: state(opened) == "finished", "the end")
        page.close()
    stored = Dataset.open(tmp_path / "data")
    (episode,) = stored.episodes
    assert (episode.success, episode.operator, episode.source, episode.seed) == (True, "Grace Hopper", "teleop", 0)
    assert all(episode.milestones.values())
    assert stored.read(episode)["actions"].shape == (episode.steps, 7)
