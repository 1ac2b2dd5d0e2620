"""Terminal keyboard on a real pseudo-terminal, SpaceMouse reports through the real pyspacemouse library."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import pty
import struct
import subprocess
import sys
import termios
from collections import deque

import numpy as np
import pytest

from simtoreal.data_collection.teleop_command import CommandShaper
from simtoreal.data_collection.teleop_device import open_device
from simtoreal.data_collection.teleop_hub import InputHub
from simtoreal.data_collection.teleop_keyboard import HOLD_NS, MOTION_KEYS, TerminalKeyboard
from simtoreal.data_collection.teleop_spacemouse import SpaceMouse
from simtoreal.envs.errors import ConfigError, MissingDependencyError, RobotError
from simtoreal.envs.panda import panda_embodiment

MS = 1_000_000


class Clock:
    """Monotonic time that a test turns."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now

    def wait(self, milliseconds: float) -> None:
        self.now += round(milliseconds * MS)


class Terminal:
    """A pseudo-terminal with a keyboard on it; ``type`` is what the other end sends."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        os.write(self.master, b"wwww")  # typed before the device was opened
        self.device = TerminalKeyboard(self.slave, clock_ns=self.clock)

    def type(self, text: str):
        os.write(self.master, text.encode())
        return self.device.read()


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    terminal.device.close()
    for descriptor in (terminal.master, terminal.slave):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_a_key_moves_until_it_stops_repeating(terminal) -> None:
    first = terminal.device.read()
    assert not first.engaged, "what was typed before does not count"
    pressed = terminal.type("w")
    assert pressed.engaged
    np.testing.assert_array_equal(pressed.motion, [0.5, 0, 0, 0, 0, 0])
    terminal.clock.wait(HOLD_NS / MS - 1)
    assert terminal.device.read().engaged
    terminal.clock.wait(1)
    rested = terminal.device.read()
    assert not rested.engaged
    assert not rested.motion.any()
    for _ in range(10):  # the keyboard repeats every 33 ms
        assert terminal.type("w").engaged
        terminal.clock.wait(33)
    terminal.clock.wait(HOLD_NS / MS)
    assert not terminal.device.read().engaged


def test_every_key_is_one_axis_and_the_newest_counts(terminal) -> None:
    seen = []
    for key, (axis, sign) in MOTION_KEYS.items():
        motion = terminal.type(key).motion
        assert np.flatnonzero(motion).tolist() == [axis]
        assert np.sign(motion[axis]) == sign
        seen.append(tuple(motion))
    assert len(set(seen)) == 12
    assert terminal.type("wwa").motion.tolist() == [0, 0.5, 0, 0, 0, 0]
    assert terminal.type("3d").motion.tolist() == [0, -0.3, 0, 0, 0, 0]
    assert terminal.type("0d").motion.tolist() == [0, -1.0, 0, 0, 0, 0]


def test_gripper_and_events(terminal) -> None:
    assert terminal.type("g").gripper == -1
    assert terminal.device.read().gripper is None
    assert terminal.type("g").gripper == 1
    terminal.type("g")
    assert terminal.type("\x1b[C\x1bOD").events == ("right", "left")
    assert terminal.type("g").gripper == 1, "the session may ignore an event, and then the fingers are still closed"
    terminal.type("g")
    hub = InputHub([terminal.device], panda_embodiment(16))
    hub.open_gripper()
    assert terminal.type("g").gripper == -1, "a new attempt begins with open fingers"
    assert terminal.type("\rnx").events == ("right", "next", "discard")
    assert terminal.device.read().events == (), "events are delivered once"


@pytest.mark.parametrize(("key", "event"), [("\x1b[C", "right"), ("\x1b[D", "left"), ("\r", "right"), ("y", "agree")])
def test_a_key_that_is_held_says_it_once(terminal, key: str, event: str) -> None:
    said = list(terminal.type(key).events)
    terminal.clock.wait(660)  # the longest usual delay before a keyboard repeats
    for _ in range(20):
        said += terminal.type(key).events
        terminal.clock.wait(33)
    assert said == [event]
    terminal.clock.wait(700)
    assert terminal.type(key).events == (event,), "pressed again after a rest"
    assert terminal.type("x" + key).events == ("discard", event), "with another key in between it is no repetition"
    assert terminal.type("\x1bw\x1bw\x1bw").events == ("stop",) * 3, "a stop is never too much"


def test_sequences_in_pieces_and_escape_alone(terminal) -> None:
    assert terminal.type("\x1b").events == ()
    terminal.clock.wait(20)
    assert terminal.type("[").events == ()
    assert terminal.type("D").events == ("left",)
    for unknown in ("\x1b[15~", "\x1b[1;5A", "\x1bOP", "\x1b[3~"):
        given = terminal.type(unknown)
        assert (given.events, given.engaged) == ((), False), "letters and digits in a sequence are no keys"
    assert terminal.type("w").motion[0] == 0.5, "nor do they change the speed"
    terminal.type("\x1b")
    terminal.clock.wait(49)
    assert terminal.device.read().events == ()
    terminal.clock.wait(1)
    assert terminal.device.read().events == ("stop",)
    assert terminal.type("\x1bw").events == ("stop",)


def test_the_terminal_gets_its_settings_back(terminal) -> None:
    during = termios.tcgetattr(terminal.slave)
    assert not during[3] & (termios.ECHO | termios.ICANON)
    assert during[3] & termios.ISIG, "Ctrl-C works"
    assert during[6][termios.VSUSP] == b"\0", "Ctrl-Z does not"
    terminal.device.close()
    assert termios.tcgetattr(terminal.slave) == terminal.before
    terminal.device.close()


def test_a_closed_terminal_is_a_lost_device(terminal) -> None:
    assert terminal.type("w").engaged
    os.close(terminal.master)
    assert terminal.device.read() is None
    assert terminal.device.read() is None


def test_the_session_moves_and_stops_the_arm_by_the_keyboard(terminal) -> None:
    shaper = CommandShaper(panda_embodiment(16))
    shaper.update(terminal.device.read(), terminal.clock.now)
    shaper.update(terminal.type("w"), terminal.clock.now)
    assert shaper.active
    assert shaper.begin(terminal.clock.now)[0] > 0
    terminal.clock.wait(HOLD_NS / MS)
    shaper.update(terminal.device.read(), terminal.clock.now)
    assert not shaper.active
    assert not shaper.begin(terminal.clock.now).any()
    shaper.update(terminal.type("w"), terminal.clock.now)
    assert shaper.active, "the next press is a fresh one"
    os.close(terminal.master)
    assert terminal.device.read() is None
    terminal.clock.wait(150)
    assert shaper.check(terminal.clock.now), "silence of a device that is gone stops the arm"


OPENED = """
import sys
from simtoreal.data_collection.teleop_device import open_device
device = open_device("keyboard")
print("ready", flush=True)
while "stop" not in (given := device.read()).events:
    if given.engaged:
        print(given.motion.tolist(), flush=True)
device.close()
"""


def test_opened_by_name_in_a_process_of_its_own() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", OPENED], stdin=slave, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    os.write(master, b"r")
    assert process.stdout.readline() == "[0.0, 0.0, 0.5, 0.0, 0.0, 0.0]\n"
    os.write(master, b"\x1b")
    process.communicate(timeout=30)
    assert process.returncode == 0
    os.close(master)
    os.close(slave)


def test_without_a_terminal() -> None:
    reading, writing = os.pipe()
    with pytest.raises(ConfigError, match="needs a terminal"):
        TerminalKeyboard(reading)
    os.close(reading)
    os.close(writing)


# -- SpaceMouse ------------------------------------------------------------------------------------------------------


class Reports:
    """The HID device below pyspacemouse: USB reports as the hardware sends them."""

    product_string = manufacturer_string = serial_number = ""
    release_number = 0

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.unplugged = self.closed = False

    def open(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def read(self, size: int) -> bytes:
        if self.unplugged:
            from easyhid import HIDException

            raise HIDException("Failed to read from HID device: -1")
        return self.waiting.popleft()[:size] if self.waiting else b""


class Mouse:
    """A SpaceNavigator whose hardware is played by the test; in between is pyspacemouse itself."""

    def __init__(self) -> None:
        library = pytest.importorskip("pyspacemouse")
        spec = library.apply_axis_convention(library.get_device_specs()["SpaceNavigator"], library.AxisConvention.ROS)
        self.reports, self.clock = Reports(), Clock()
        opened = library.SpaceMouseDevice(spec, self.reports)
        opened.open()
        self.device = SpaceMouse(opened, clock_ns=self.clock)

    def push(self, x: int = 0, y: int = 0, z: int = 0) -> None:
        """HID axes: x right, y towards the user, z down; full deflection is 350."""
        self.reports.waiting.append(struct.pack("<Bhhh", 1, x, y, z))

    def turn(self, x: int = 0, y: int = 0, z: int = 0) -> None:
        self.reports.waiting.append(struct.pack("<Bhhh", 2, x, y, z))

    def press(self, buttons: int) -> None:
        self.reports.waiting.append(struct.pack("<BB", 3, buttons))


@pytest.mark.parametrize(
    ("report", "axis", "sign"),
    [
        (("push", {"y": -350}), 0, 1),  # away from the user
        (("push", {"x": -350}), 1, 1),  # left
        (("push", {"z": -350}), 2, 1),  # up
        (("turn", {"y": -350}), 3, 1),  # about the axis that points away: HID's y points to the user
        (("turn", {"x": -350}), 4, 1),  # about the axis that points left
        (("turn", {"z": -350}), 5, 1),  # counterclockwise from above: HID counts clockwise
        (("push", {"y": 350}), 0, -1),
        (("turn", {"z": 380}), 5, -1),  # a little more than the data sheet says
    ],
)
def test_the_puck_moves_in_the_base_frame(report, axis: int, sign: int) -> None:
    mouse = Mouse()
    assert not mouse.device.read().engaged
    kind, values = report
    getattr(mouse, kind)(**values)
    given = mouse.device.read()
    assert given.engaged
    np.testing.assert_array_equal(given.motion, np.eye(6)[axis] * sign)


def test_letting_the_puck_go_or_pulling_the_plug_stops() -> None:
    mouse = Mouse()
    mouse.push(y=-175)
    given = mouse.device.read()
    assert 0.4 < given.motion[0] < 0.5
    mouse.push()
    released = mouse.device.read()
    assert (released.engaged, released.motion.any()) == (False, False)
    mouse.push(x=10, y=-20, z=5)
    assert not mouse.device.read().engaged, "a puck at rest is not quite at zero"
    mouse.push(y=-350)
    mouse.push()
    mouse.push(y=-350)
    assert not mouse.device.read().engaged, "a release in between, however brief, is seen"
    mouse.push(y=-350)
    assert mouse.device.read().engaged
    mouse.clock.wait(HOLD_NS / MS)
    silent = mouse.device.read()
    assert (silent.engaged, silent.motion.any()) == (False, False), "a deflected puck that says nothing is unplugged"
    mouse.reports.unplugged = True
    assert mouse.device.read() is None
    assert mouse.device.read() is None


def test_buttons() -> None:
    mouse = Mouse()
    mouse.press(1)
    given = mouse.device.read()
    assert (given.gripper, given.engaged) == (-1.0, True)
    mouse.press(1)
    assert mouse.device.read().gripper is None, "still held"
    mouse.press(0)
    mouse.press(1)
    assert mouse.device.read().gripper == 1.0
    mouse.press(2)
    assert mouse.device.read().events == ("right",)
    mouse.device.close()
    assert mouse.reports.closed
    assert mouse.device.read() is None
    mouse.device.close()


def test_a_missing_spacemouse_says_what_to_do() -> None:
    pytest.importorskip("pyspacemouse")
    if ctypes.util.find_library("hidapi-hidraw") is None and ctypes.util.find_library("hidapi") is None:
        with pytest.raises(MissingDependencyError, match="apt install libhidapi-hidraw0"):
            open_device("spacemouse")
    else:
        with pytest.raises(RobotError, match="no SpaceMouse is connected"):
            open_device("spacemouse")
