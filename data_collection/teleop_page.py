"""The browser page as an input device: what its messages may say, and what of them counts."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from simtoreal.data_collection.teleop_command import SILENCE_NS
from simtoreal.data_collection.teleop_device import EVENTS, OperatorInput, join_inputs
from simtoreal.data_collection.teleop_session import Board
from simtoreal.envs.errors import ConfigError

MAX_MESSAGE_BYTES = 2048
MAX_NAME_LENGTH = 64
# A page that is silent for longer, as a hidden one is, has nobody who could stop an arm that moves by itself.
PRESENT_NS = 500_000_000
# Latest events whose way to the arm is timed.
LATENCY_HISTORY = 4096


class MessageError(ConfigError):
    """The page said something it must not say; its connection is closed."""


def parse_message(text: str) -> dict[str, Any]:
    """Check one message of the page.

    Every message is a JSON object with ``type`` and a number ``n`` that grows within a connection:

    * ``input``: ``engaged`` bool, ``motion`` six numbers in [-1, 1], ``drag`` ``[clutch, six numbers]`` or null: metres
      and radians since the clutch of that number closed, ``gripper`` 1, -1 or null, ``sent`` the server's time in ms
      at which the page sent it (null until its pings have told it), ``at`` that of the browser event that caused it,
      or null for a sign of life;
    * ``event``: ``name``, one of ``EVENTS``;
    * both: ``stage``, the newest one of a ``Snapshot`` that the page shows, -1 before the first;
    * ``set``: ``operator`` text and/or ``move`` bool;
    * ``ping``: ``at`` a number that is sent back; ``shown``: ``frame``, the number of an image that was drawn.

    Raises:
        MessageError: anything else.
    """
    if len(text) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(text)} characters, at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        message = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError("message is not JSON") from error
    if not isinstance(message, dict) or not isinstance(message.get("n"), int) or isinstance(message["n"], bool):
        raise MessageError("message is not an object with a number 'n'")
    check = _CHECKS.get(message.get("type", "")) if isinstance(message.get("type"), str) else None
    if check is None:
        raise MessageError("message has an unknown type")
    if not check(message):
        raise MessageError(f"message of type '{message['type']}' has a wrong value")
    return message


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _number(value: Any, limit: float = 1e15) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= limit


def _six(value: Any, limit: float) -> bool:
    return isinstance(value, list) and len(value) == 6 and all(_number(item, limit) for item in value)


def _check_input(message: dict[str, Any]) -> bool:
    drag, gripper, at = message.get("drag"), message.get("gripper"), message.get("at")
    clutched = isinstance(drag, list) and len(drag) == 2 and isinstance(drag[0], int) and _six(drag[1], 100.0)
    return (
        isinstance(message.get("engaged"), bool)
        and _six(message.get("motion"), 1.0)
        and (drag is None or clutched)
        and (gripper is None or (_number(gripper) and gripper in (1, -1)))
        and (at is None or _number(at))
        and (message.get("sent") is None or _number(message["sent"]))
        and type(message.get("stage")) is int
    )


def _check_event(message: dict[str, Any]) -> bool:
    return isinstance(message.get("name"), str) and message["name"] in EVENTS and type(message.get("stage")) is int


def _check_set(message: dict[str, Any]) -> bool:
    name, move = message.get("operator"), message.get("move")
    named = name is None or (isinstance(name, str) and len(name) <= MAX_NAME_LENGTH)
    return named and (move is None or isinstance(move, bool))


_CHECKS: dict[str, Any] = {
    "input": _check_input,
    "event": _check_event,
    "set": _check_set,
    "ping": lambda message: _number(message.get("at")),
    "shown": lambda message: type(message.get("frame")) is int,
}


def _clean_name(name: str) -> str:
    """``name`` with a space for what is not printable, like the no-break space and the joiners of emoji."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


class PageDevice:
    """What the page's operator does; fed by the server's thread, read by the control thread.

    Args:
        board: what the page shows: an event counts in the stage for which the operator meant it, a stop always.
    """

    name = "page"

    def __init__(self, board: Board) -> None:
        self._board = board
        self.shown_stage = -1
        """Newest stage that the page is known to show; -1 without a page."""
        self.wake = threading.Event()
        self.rejected = 0
        """Messages that were repeated or out of order."""
        self.stale = 0
        """Inputs that were too long on their way to be followed."""
        self._lock = threading.Lock()
        self._waiting: list[OperatorInput] = []
        self._last = OperatorInput(motion=np.zeros(6))
        self._newest = -1
        self._clutch: tuple[int, np.ndarray] = (-1, np.zeros(6))
        self._released = False
        self._heard_ns = 0
        self.needs_release = False
        """Whether the page holds a dead-man that does not count, because messages stayed away meanwhile."""
        self._stamps: list[int] = []
        self._read_stamps: list[int] = []
        self._settings: dict[str, Any] = {}
        self.latencies_ns: deque[int] = deque(maxlen=LATENCY_HISTORY)
        """From browser events to the commands that contain them, newest last."""

    # ---- server thread

    def connect(self) -> None:
        """A page takes control: numbers begin anew, and its dead-man has to be seen released."""
        with self._lock:
            self._newest, self._released, self._clutch = -1, False, (-1, np.zeros(6))

    def disconnect(self) -> None:
        """The page has gone: the dead-man is released."""
        with self._lock:
            self._released = self.needs_release = False
            self.shown_stage = -1
            self._add(OperatorInput(motion=np.zeros(6), received_ns=time.monotonic_ns()))
        self.wake.set()

    def feed(self, message: dict[str, Any]) -> bool:
        """Take over a message of :func:`parse_message`; returns False if it is old and was ignored."""
        now_ns = time.monotonic_ns()
        with self._lock:
            if message["n"] <= self._newest:
                self.rejected += 1
                return False
            self._newest = message["n"]
            self.shown_stage = message.get("stage", self.shown_stage)
            if message["type"] == "set":
                if message.get("operator") is not None:
                    self._settings["operator"] = _clean_name(message["operator"])
                if message.get("move") is not None:
                    self._settings["move"] = message["move"]
            elif message["type"] == "event":
                if message["name"] == "stop" or message["stage"] == self._board.snapshot.stage:
                    # Says nothing about the motion, which goes on as it is, and is no sign that the dead-man is alive.
                    self._add(
                        dataclasses.replace(self._last, displacement=None, gripper=None, events=(message["name"],))
                    )
            elif message["type"] == "input":
                self._add(self._as_input(message, now_ns))
        self.wake.set()
        return True

    def _as_input(self, message: dict[str, Any], now_ns: int) -> OperatorInput:
        # What waited in the network is not what the operator does now. Without a common clock nobody knows.
        sent_ns = -1 if message.get("sent") is None else round(message["sent"] * 1e6)
        stale = abs(now_ns - sent_ns) > SILENCE_NS
        self.stale += stale and message["engaged"]
        # The control thread may have been busy, so a gap is noticed where messages arrive.
        if not message["engaged"]:
            self._released = True
        elif stale or now_ns - self._heard_ns > SILENCE_NS:
            self._released = False
        self._heard_ns = now_ns
        self.needs_release = message["engaged"] and not self._released
        displacement = None
        if message.get("drag") is not None:
            clutch, total = message["drag"][0], np.array(message["drag"][1], dtype=np.float64)
            displacement = total - self._clutch[1] if clutch == self._clutch[0] else total
            self._clutch = (clutch, total)
        if message.get("at") is not None:
            self._stamps.append(round(message["at"] * 1e6))
        return OperatorInput(
            motion=np.array(message["motion"], dtype=np.float64),
            displacement=displacement,
            gripper=message.get("gripper"),
            engaged=message["engaged"] and self._released,
            received_ns=now_ns if stale else min(now_ns, sent_ns),
        )

    def _add(self, given: OperatorInput) -> None:
        """Join with what waits, but keep a release apart from the press after it: both count."""
        self._last = dataclasses.replace(given, events=())
        if not self._waiting or (given.engaged and not self._waiting[-1].engaged):
            self._waiting.append(given)
            return
        self._waiting[-1] = join_inputs(self._waiting[-1], given)
        if len(self._waiting) > 1 and not self._waiting[-1].engaged:
            last = self._waiting.pop()
            self._waiting[-1] = join_inputs(self._waiting[-1], last)

    # ---- control thread

    def read(self) -> OperatorInput | None:
        """See :class:`~simtoreal.data_collection.teleop_device.Device`."""
        with self._lock:
            self._read_stamps += self._stamps
            self._stamps.clear()
            return self._waiting.pop(0) if self._waiting else None

    def commanded(self, now_ns: int, *, moving: bool = True) -> None:
        """A command with everything that was read has been handed over; only those that may move the arm are timed."""
        with self._lock:
            if moving:
                self.latencies_ns.extend(now_ns - stamp for stamp in self._read_stamps)
            self._read_stamps.clear()

    @property
    def present(self) -> bool:
        """Whether a page is open and has spoken within the last ``PRESENT_NS``."""
        return self.shown_stage >= 0 and time.monotonic_ns() - self._heard_ns <= PRESENT_NS

    def settings(self) -> dict[str, Any]:
        """Changed settings (``operator``, ``move``) since the last call."""
        with self._lock:
            changed, self._settings = self._settings, {}
            return changed

    def close(self) -> None:
        """Nothing to give back."""
