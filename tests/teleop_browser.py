"""A person at the teleoperation page: real Chromium, real keys, pointers and gamepads (not a test)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, sync_playwright

from simtoreal.commands.teleop import Collection, Config, open_collection
from simtoreal.data_collection.expert import OperatorStyle, ScriptedExpert

PATIENCE_S = 30.0
# Of Chromium: to start on a busy machine, to do one thing, and to close everything.
LAUNCH_MS, ACTION_MS, CLOSE_S = 90_000, 15_000, 20.0
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
# A gamepad as the browser would report it; `window.pad` is what its user's hands do.
GAMEPAD = """
window.pad = { axes: [0, 0, 0, 0], buttons: new Array(17).fill(0) };
navigator.getGamepads = () => [{ connected: true, id: "test", index: 0, mapping: "standard", axes: window.pad.axes,
  buttons: window.pad.buttons.map((value) => ({ value, pressed: value > 0.5 })) }];
"""
TRIGGER, BUTTON_A = 7, 0
GRIPS = 20
# Somebody who sees and acts a tenth of a second late must not correct as eagerly as the expert inside the loop.
HUMAN = OperatorStyle(name="human", speed=0.8, gain=0.15)
DEAD_ZONE = 0.12


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "the browser tests need Chromium: apt-get install -y --no-install-recommends chromium"
    return found


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for: {what}"
        time.sleep(0.01)
    return found


def descendants(pid: int) -> list[int]:
    """``pid``, its children, theirs, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for known in found:
        found += parents.get(known, [])
    return found


@contextlib.contextmanager
def browser_context(profile: Path, **options: Any) -> Iterator[Any]:
    """Chromium and Playwright's driver, which are both gone afterwards, even if one of them hangs.

    For a module, not for a session: while Playwright's synchronous interface is open this thread cannot run another
    event loop, and other tests do.
    """
    before = set(descendants(os.getpid()))
    started: list[int] = []
    hung = threading.Event()

    def end_what_was_started() -> None:
        hung.set()
        for pid in [pid for root in started for pid in descendants(root)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    watchdog = threading.Timer(CLOSE_S, end_what_was_started)
    watchdog.daemon = True
    try:
        with sync_playwright() as playwright:
            started += [pid for pid in descendants(os.getpid()) if pid not in before]
            try:
                context = playwright.chromium.launch_persistent_context(
                    str(profile), executable_path=chromium(), args=ARGUMENTS, timeout=LAUNCH_MS, **options
                )
                context.set_default_timeout(ACTION_MS)
                yield context
            finally:
                watchdog.start()
                if "context" in locals():
                    with contextlib.suppress(Exception):  # a browser that has gone is closed
                        context.close()
    finally:
        watchdog.cancel()
    assert not hung.is_set(), f"Chromium or its driver did not close within {CLOSE_S:g} s and was killed"


@contextlib.contextmanager
def running(config: Config) -> Iterator[Collection]:
    """A session whose control loop runs in another thread; ends when the context does."""
    opened: list[Any] = []
    ready, stop = threading.Event(), threading.Event()

    def control() -> None:
        try:
            with open_collection(config) as collection:
                opened.append(collection)
                ready.set()
                collection.session.run()
                stop.wait(PATIENCE_S)
        except BaseException as error:
            opened.append(error)
            ready.set()
            raise

    thread = threading.Thread(target=control, name="control")
    thread.start()
    assert ready.wait(60)
    if isinstance(opened[0], BaseException):
        raise opened[0]
    try:
        yield opened[0]
    finally:
        opened[0].session.end()
        stop.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def open_page(context: Any, collection: Collection, *, gamepad: bool = False) -> Page:
    page = context.new_page()
    try:
        if gamepad:
            page.add_init_script(GAMEPAD)
        page.goto(collection.server.url)
        wait_for(lambda: page.evaluate("window.teleop.shown > 0"), "live images")
    except BaseException:
        page.close()  # or every page after it would be refused
        raise
    return page


def state(collection: Collection) -> str:
    return collection.session.board.snapshot.state


def look(page: Page, collection: Collection) -> None:
    """Wait until the page has shown for a moment what the session asks; what is pressed earlier does not count."""
    seen = "[status.stage, performance.now() - stageSince > REACTION_MS]"
    wait_for(lambda: page.evaluate(seen) == [collection.session.board.snapshot.stage, True], "the page shows it")


def start_recording(page: Page, collection: Collection) -> None:
    wait_for(lambda: state(collection) == "ready", "ready")
    look(page, collection)
    page.keyboard.press("ArrowRight")
    wait_for(lambda: state(collection) == "recording", "recording")


class GamepadOperator:
    """Demonstrates with both sticks and the trigger, looking at the scene as a person would, about 30 times a second.

    The browser's dead zone and the page's speed slider (100 %) are known to it, as they are to hands.
    """

    def __init__(self, page: Page, collection: Collection, style: OperatorStyle | None = None) -> None:
        self.page, self.collection = page, collection
        self.expert = ScriptedExpert(collection.task, collection.embodiment, style=style or HUMAN)
        page.locator("#speed").fill("100")
        page.locator("#view").select_option("1")

    def pad(self, axes: list[float], buttons: dict[int, float]) -> None:
        full = [float(buttons.get(index, 0)) for index in range(17)]
        self.page.evaluate("([axes, buttons]) => { window.pad = { axes, buttons }; }", [axes, full])

    def grip(self) -> None:
        """Let go and press until the arm follows, as a person does when contact was lost for a moment."""
        for _ in range(GRIPS):
            self.pad([0.0] * 4, {})
            time.sleep(0.06)
            self.pad([0.0] * 4, {TRIGGER: 1})
            with contextlib.suppress(AssertionError):
                wait_for(lambda: self.following or state(self.collection) != "recording", "the arm follows", 1.0)
                return
        raise AssertionError(f"the arm never followed: {self.collection.session.board.snapshot}")

    @property
    def following(self) -> bool:
        return self.collection.session.board.snapshot.active

    def see(self) -> dict[str, np.ndarray]:
        """The newest observation; what a camera shows a person of the twin's scene is read from its truth."""
        session = self.collection.session
        observation = dict(session.latest[0])
        if "object_state" not in observation:
            observation["object_state"] = np.array(session._env._twin.truth()["object_state"], dtype=np.float32)
        return observation

    def demonstrate(self, until: Callable[[], bool] = lambda: False, seconds: float = PATIENCE_S) -> None:
        """Until the take has ended or ``until`` says so; ``seconds`` of the take, which a busy machine makes longer."""
        session = self.collection.session
        self.expert.reset(np.array([0]), [session.board.snapshot.seed])
        while state(self.collection) == "recording" and not until():
            assert session.board.snapshot.seconds < seconds, f"no end of the demonstration: {session.board.snapshot}"
            if not self.following:
                self.grip()
            observation = {key: value[None, None] for key, value in self.see().items()}
            # It looks at the hand again instead of trusting that its earlier actions were executed.
            self.expert.memories[0].quaternion = None
            action = self.expert.act(observation, [""], np.array([0]))[0, 0]
            is_open = session.board.snapshot.gripper_open
            # The other rotation axes are hardly needed: the stick turns about the vertical one.
            # It turns as patiently as it moves, which the style does not cover.
            x, y, z, turn = (float(action[index]) for index in (0, 1, 2, 5))
            turn *= 2 * self.expert.style.gain
            axes = [
                float(np.sign(v) * (abs(v) * (1 - DEAD_ZONE) + DEAD_ZONE) if v else 0.0) for v in (-y, -x, -turn, -z)
            ]
            if (action[6] > 0) != is_open:  # first the fingers, then on
                self.pad([0.0] * 4, {TRIGGER: 1, BUTTON_A: 1})
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: session.board.snapshot.gripper_open != is_open, "fingers", 0.5)  # noqa: B023
                self.pad([0.0] * 4, {TRIGGER: 1})
                time.sleep(0.03)
            else:
                self.pad(axes, {TRIGGER: 1})
            time.sleep(0.03)
        self.pad([0.0] * 4, {})
