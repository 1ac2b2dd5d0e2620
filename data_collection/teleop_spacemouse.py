"""3Dconnexion SpaceMouse as an input device of teleoperation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from simtoreal.data_collection.teleop_device import OperatorInput
from simtoreal.envs.errors import MissingDependencyError, RobotError, require

# At rest the puck reads a few per cent off zero.
DEAD_ZONE = 0.08
# A deflected puck reports every 8 to 16 ms; one that has been unplugged says nothing, and its last word must not count.
HOLD_NS = 150_000_000
# Reports taken at once, so that a device that never stops cannot hold the loop.
_MOST_REPORTS = 64
_AXES = ("x", "y", "z", "roll", "pitch", "yaw")


class SpaceMouse:
    """Pushing the puck moves the arm, letting it go is the dead-man: a spring brings it back to the middle.

    The first button closes and opens the gripper, the second goes forward (record, finish, accept). Axes are those of
    ROS REP 103 (x forward, y left, z up; rotations right-handed), which is the robot's base frame for a person who
    stands behind it.

    Args:
        device: an opened ``pyspacemouse.SpaceMouseDevice`` in the ROS convention; by default the first one connected.
        clock_ns: monotonic time.

    Raises:
        MissingDependencyError: pyspacemouse or the system library hidapi is missing.
        RobotError: no SpaceMouse is connected, or this user may not open it.
    """

    name = "spacemouse"

    def __init__(self, device: Any = None, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._device = open_spacemouse() if device is None else device
        self._clock_ns = clock_ns
        self._reported_ns = self._gripper_until_ns = 0
        self._state = self._device.read()
        self._buttons = tuple(bool(button) for button in self._state.buttons)
        self._report = self._state.t
        self.gripper_open = True

    def read(self) -> OperatorInput | None:
        """See :class:`~simtoreal.data_collection.teleop_device.Device`; None for good once it is unplugged."""
        if self._device is None:
            return None
        now = self._clock_ns()
        events: list[str] = []
        gripper: float | None = None
        released = False
        for _ in range(_MOST_REPORTS):
            try:
                self._state = state = self._device.read()
            except Exception:
                # easyhid raises HIDException, hidapi OSError: either way the device is gone.
                self._device = None
                return None
            # The library changes one state object at every report; its time tells whether there was one.
            if state.t == self._report:
                break
            self._report, self._reported_ns = state.t, now
            released = released or not self._deflected(state)
            for pressed in self._pressed(state):
                if pressed == 0:
                    self.gripper_open = not self.gripper_open
                    gripper = 1.0 if self.gripper_open else -1.0
                    self._gripper_until_ns = now + HOLD_NS
                elif pressed == 1:
                    events.append("right")
        deflected = now - self._reported_ns < HOLD_NS and self._deflected(self._state)
        motion = self._axes(self._state) if deflected else np.zeros(6)
        return OperatorInput(
            motion=motion,
            gripper=gripper,
            engaged=(deflected and not released) or now < self._gripper_until_ns,
            events=tuple(events),
            received_ns=now,
        )

    @staticmethod
    def _axes(state: Any) -> np.ndarray:
        axes = np.array([getattr(state, name) for name in _AXES])
        # The scale of the data sheet is exceeded by a few per cent; the dead zone is taken out without a jump.
        beyond = np.clip((np.abs(axes) - DEAD_ZONE) / (1 - DEAD_ZONE), 0.0, 1.0)
        return np.sign(axes) * beyond

    def _deflected(self, state: Any) -> bool:
        return bool(np.any(self._axes(state)))

    def _pressed(self, state: Any) -> list[int]:
        """Buttons that are down now and were not at the report before."""
        buttons = tuple(bool(button) for button in state.buttons)
        before, self._buttons = self._buttons, buttons
        return [index for index, (old, new) in enumerate(zip(before, buttons, strict=True)) if new and not old]

    def close(self) -> None:
        """Give the device back; may be called twice."""
        if self._device is not None:
            self._device.close()
            self._device = None


def open_spacemouse() -> Any:
    """Open the first SpaceMouse that is connected, with axes as in ROS.

    Raises:
        MissingDependencyError: pyspacemouse or the system library hidapi is missing.
        RobotError: none is connected, or this user may not open it.
    """
    try:
        module: Any = require("pyspacemouse", "spacemouse")
        connected = module.get_connected_devices()
    except (AttributeError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"the SpaceMouse needs the system library hidapi, which cannot be loaded ({error}). "
            "Install it with: apt install libhidapi-hidraw0"
        ) from error
    if not connected:
        raise RobotError(
            "no SpaceMouse is connected. Plug it in; if it is, allow your user to read it: "
            'echo \'KERNEL=="hidraw*", ATTRS{idVendor}=="256f", MODE="0666"\' > /etc/udev/rules.d/99-spacemouse.rules, '
            "then plug it in again (older devices: idVendor 046d)."
        )
    try:
        return module.open(device=connected[0], axis_convention=module.AxisConvention.ROS)
    except (RuntimeError, OSError) as error:
        raise RobotError(
            f"the {connected[0]} is connected but cannot be opened ({error}). Is another program (spacenavd) using it, "
            "or may this user not read /dev/hidraw*?"
        ) from error
