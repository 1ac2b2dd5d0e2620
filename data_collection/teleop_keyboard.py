"""The keyboard of a terminal, also over SSH, as an input device of teleoperation."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable

import numpy as np

from simtoreal.data_collection.teleop_device import OperatorInput
from simtoreal.envs.errors import ConfigError

# The same keys as on the page: key -> axis (x y z rx ry rz, base frame, seen from behind the robot), sign.
MOTION_KEYS = {
    "w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1),
    "u": (3, 1), "o": (3, -1), "i": (4, -1), "k": (4, 1), "j": (5, 1), "l": (5, -1),
}  # fmt: skip
GRIPPER_KEY = "g"
EVENT_KEYS = {
    "\x1b[C": "right", "\x1bOC": "right", "\x1b[D": "left", "\x1bOD": "left", "\r": "right", "\n": "right",
    "\x1b": "stop", "n": "next", "x": "discard", "y": "agree",
}  # fmt: skip
DEFAULT_SPEED = 0.5

# A terminal says that a key is pressed, again and again after the keyboard's repeat delay (250 to 600 ms on most
# systems), every 30 to 90 ms, and never that it is released. Motion ends this long after the last of them.
HOLD_NS = 150_000_000
# Longer than the repeat delay: the same key again within this time after the last one may be one that is held.
REPEAT_NS = 700_000_000
# Esc alone is the beginning of an arrow key until nothing follows.
_ESCAPE_NS = 50_000_000
_READ_BYTES = 4096


class TerminalKeyboard:
    """Moves the arm while a key repeats.

    Without key-up events the dead-man can only be the stream of repetitions: the first press moves for at most
    ``HOLD_NS`` (a nudge), then the arm rests until the keyboard begins to repeat, and from then on it moves until
    ``HOLD_NS`` after the last repetition. A terminal repeats one key at a time, so motion is along one axis. What the
    network holds back and delivers late moves the arm late, by the same rule; for more than that use the page.

    Keys: ``w s a d r f`` move along x, y, z, ``u o i k j l`` turn, ``g`` closes and opens the gripper, ``1`` to ``9``
    and ``0`` set the speed (10 to 90 and 100 %), right arrow or return goes forward (record, finish, accept), left
    arrow discards and records again, ``x`` discards, ``n`` takes the next initial condition, ``y`` agrees to what the
    page asks, Esc stops. A key that is held does these once, so the same one counts again only after a rest of
    ``REPEAT_NS``. Ctrl-C works as ever; Ctrl-Z is switched off, because a suspended process drops the arm's targets.

    Args:
        descriptor: of the terminal; standard input by default.
        clock_ns: monotonic time.

    Raises:
        ConfigError: standard input is not a terminal.
    """

    name = "keyboard"

    def __init__(self, descriptor: int | None = None, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        self._clock_ns = clock_ns
        if not os.isatty(self._descriptor):
            raise ConfigError(
                "the keyboard needs a terminal as standard input. Start the command in one (ssh -t host ...), "
                "or use the page."
            )
        self._before: list[object] | None = termios.tcgetattr(self._descriptor)
        tty.setcbreak(self._descriptor, termios.TCSANOW)
        changed = termios.tcgetattr(self._descriptor)
        # Byte 0 is "no such key" (_POSIX_VDISABLE); return is to arrive as it is.
        changed[6][termios.VSUSP] = b"\0"
        changed[0] &= ~(termios.ICRNL | termios.IXON)
        termios.tcsetattr(self._descriptor, termios.TCSANOW, changed)
        # What was typed before the arm was under control must not move it.
        termios.tcflush(self._descriptor, termios.TCIFLUSH)
        self._motion = np.zeros(6)
        self._speed = DEFAULT_SPEED
        self._until_ns = 0
        self._escape, self._escape_ns = "", 0
        self._last_key, self._last_key_ns = "", 0
        self.gripper_open = True
        self._lost = False

    def read(self) -> OperatorInput | None:
        """See :class:`~simtoreal.data_collection.teleop_device.Device`; None for good once the terminal is gone."""
        now = self._clock_ns()
        text = self._typed()
        if self._lost:
            return None
        events: list[str] = []
        gripper: float | None = None
        if self._until_ns <= now:
            self._motion = np.zeros(6)
        for key in self._keys(text, now):
            repeated = key == self._last_key and now - self._last_key_ns < REPEAT_NS
            self._last_key, self._last_key_ns = key, now
            if key in MOTION_KEYS:
                axis, sign = MOTION_KEYS[key]
                self._motion = np.zeros(6)
                self._motion[axis] = sign * self._speed
                self._until_ns = now + HOLD_NS
            elif key == GRIPPER_KEY:
                self.gripper_open = not self.gripper_open
                gripper = 1.0 if self.gripper_open else -1.0
                # Pressing it is a wish to move like any other key.
                self._motion, self._until_ns = np.zeros(6), now + HOLD_NS
            elif key.isdigit():
                self._speed = int(key) / 10 or 1.0
            elif key in EVENT_KEYS and (not repeated or EVENT_KEYS[key] == "stop"):
                events.append(EVENT_KEYS[key])
        return OperatorInput(
            motion=self._motion.copy(),
            gripper=gripper,
            engaged=now < self._until_ns,
            events=tuple(events),
            received_ns=now,
        )

    def _typed(self) -> str:
        content = b""
        try:
            while not self._lost and select.select([self._descriptor], [], [], 0)[0]:
                chunk = os.read(self._descriptor, _READ_BYTES)
                content += chunk
                self._lost = not chunk
                if len(content) >= _READ_BYTES:
                    break
        except OSError:
            # The terminal was closed (EIO after a hang-up).
            self._lost = True
        return content.decode("ascii", "ignore")

    def _keys(self, text: str, now: int) -> list[str]:
        """Split what was typed into keys; sequences that begin with Esc may come in pieces."""
        if self._escape and not text:
            if now - self._escape_ns < _ESCAPE_NS:
                return []
            alone, self._escape = self._escape, ""
            return [alone]
        text, self._escape = self._escape + text, ""
        keys: list[str] = []
        while text:
            if text[0] != "\x1b":
                keys.append(text[0])
                text = text[1:]
            elif len(text) >= 2 and text[1] in "[O":
                end = next((index for index, letter in enumerate(text[2:], 2) if "@" <= letter <= "~"), None)
                if end is None:
                    self._escape, self._escape_ns = text, now
                    break
                keys.append(text[: end + 1])
                text = text[end + 1 :]
            elif len(text) == 1:
                self._escape, self._escape_ns = text, now
                break
            else:
                keys.append(text[0])
                text = text[1:]
        return keys

    def close(self) -> None:
        """Give the terminal its settings back; may be called twice."""
        if self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)
            self._before = None
