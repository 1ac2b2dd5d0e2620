"""Joins the devices of an operator into one stream of actions and events, and waits for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from simtoreal.data_collection.teleop_command import CommandShaper
from simtoreal.data_collection.teleop_device import Device, OperatorInput
from simtoreal.envs.embodiment import Embodiment

# Devices that cannot wake the loop are asked this often.
POLL_S = 0.004
# A device has at most a release and a press to tell apart.
MOST_READS = 3


class InputHub:
    """Reads devices, and says what the arm should do.

    The arm follows one device at a time: the one that engaged first keeps it until it lets go. Events are taken from
    all. Everything here runs in the control thread; only ``wake`` is for others.

    Args:
        devices: in order of precedence.
        embodiment: of the environment.
    """

    def __init__(self, devices: Sequence[Device], embodiment: Embodiment) -> None:
        self.wake = threading.Event()
        """Set by a device's own thread when there is something to read."""
        self.events: deque[str] = deque()
        """Events that nobody has handled yet."""
        self.gripper = 1.0
        """Latched command of the gripper: 1 open, -1 closed."""
        self.heard = False
        """Whether the last poll brought an input."""
        self._devices = [(device, CommandShaper(embodiment)) for device in devices]
        self._leader: CommandShaper | None = None
        for device in devices:
            if hasattr(device, "wake"):
                device.wake = self.wake

    @property
    def active(self) -> bool:
        """Whether the arm follows somebody."""
        return self._leader is not None

    @property
    def needs_release(self) -> bool:
        """Whether somebody holds a dead-man that does not count, because it was interrupted."""
        return any(
            (shaper.engaged and shaper.needs_release) or getattr(device, "needs_release", False)
            for device, shaper in self._devices
        )

    @property
    def losses(self) -> int:
        """Times that a device fell silent while the arm followed it."""
        return sum(shaper.losses for _, shaper in self._devices)

    def poll(self) -> bool:
        """Read every device; returns whether the arm should react at once, see :meth:`CommandShaper.update`."""
        self.wake.clear()
        changed = self.heard = False
        for device, shaper in self._devices:
            for _ in range(MOST_READS):
                given = device.read()
                if given is None:
                    break
                self.heard = True
                changed |= self._take(given, shaper)
            changed |= shaper.check(time.monotonic_ns())
            self._elect()
        return changed

    def _take(self, given: OperatorInput, shaper: CommandShaper) -> bool:
        now_ns = time.monotonic_ns()
        changed = shaper.update(given, now_ns) or bool(given.events)
        if self._leader not in (None, shaper) and shaper.active:
            shaper.interrupt(now_ns)
        if given.gripper is not None and shaper.active:
            latched = 1.0 if given.gripper > 0 else -1.0
            changed |= latched != self.gripper
            self.gripper = latched
        self.events.extend(given.events)
        self._elect()
        return changed

    def wait(self, deadline_ns: int, on_input: Callable[[bool], bool]) -> None:
        """Poll until ``deadline_ns``; ``on_input`` is called after every poll that brought something.

        Args:
            deadline_ns: monotonic time.
            on_input: gets the answer of :meth:`poll`; returns True to end the wait early.
        """
        while True:
            changed = self.poll()
            if (changed or self.heard) and on_input(changed):
                return
            now_ns = time.monotonic_ns()
            if now_ns >= deadline_ns:
                return
            self.wake.wait(min(POLL_S, (deadline_ns - now_ns) * 1e-9))

    def begin(self, now_ns: int) -> np.ndarray:
        """Begin a control period; returns its action ``(7,)`` float32."""
        moves = [shaper.begin(now_ns) for _, shaper in self._devices]
        return self._complete(moves)

    def action(self) -> np.ndarray:
        """Action ``(7,)`` float32 of this period with everything that has arrived since its beginning."""
        return self._complete([shaper.action() for _, shaper in self._devices])

    def interrupt(self) -> None:
        """Stop; every dead-man has to be pressed afresh."""
        now_ns = time.monotonic_ns()
        for _, shaper in self._devices:
            shaper.interrupt(now_ns)
        self._leader = None

    def open_gripper(self) -> None:
        """Latch the gripper open, as it is after a reset, and say so to devices whose button closes and opens it."""
        self.gripper = 1.0
        for device, _ in self._devices:
            if hasattr(device, "gripper_open"):
                device.gripper_open = True

    def close(self) -> None:
        """Close every device."""
        for device, _ in self._devices:
            device.close()

    def _elect(self) -> None:
        if self._leader is None or not self._leader.active:
            self._leader = next((shaper for _, shaper in self._devices if shaper.active), None)

    def _complete(self, moves: list[np.ndarray]) -> np.ndarray:
        # One that has just let go still owns what it did in this period.
        total = np.clip(np.sum(moves, axis=0), -1.0, 1.0) if moves else np.zeros(6)
        return np.append(total, self.gripper).astype(np.float32)
