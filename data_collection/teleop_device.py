"""Input devices of teleoperation: a browser page, a keyboard, a SpaceMouse, or one of an installed package."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from simtoreal.envs.errors import ConfigError, MissingDependencyError, closest

ENTRY_POINT_GROUP = "simtoreal.teleop_devices"

BUILTIN = {
    "keyboard": "simtoreal.data_collection.teleop_keyboard:TerminalKeyboard",
    "spacemouse": "simtoreal.data_collection.teleop_spacemouse:SpaceMouse",
}

# What a device may ask of the session besides motion; a session ignores what does not fit its state.
EVENTS = (
    "record",  # begin to record a take
    "finish",  # end the take and look at it
    "accept",  # keep the take under review
    "accept_anyway",  # keep it although the coach rejects it
    "discard",  # leave nothing of it behind, go on with the next initial condition
    "rerecord",  # discard, and begin again at the same initial condition
    "reset",  # the same initial condition again, without recording
    "next",  # another initial condition
    "stop",  # end the session; a running take is stored as aborted
    "right",  # LeRobot's right arrow: whatever goes forward (record, finish, accept)
    "left",  # LeRobot's left arrow: discard and record again
    "agree",  # to what a real arm is about to do by itself; nothing else does
)


@dataclass(frozen=True, kw_only=True, eq=False)
class OperatorInput:
    """What a person wants at one moment.

    Attributes:
        motion: ``(6,)`` float64 in [-1, 1]: speed as a share of the embodiment's action limits (translation xyz,
            rotation xyz, base frame). It goes on until another input says otherwise.
        displacement: ``(6,)`` metres and radians, base frame, moved since the previous input that the device
            returned (drags, a tracked hand); None if the device only gives speeds. Added to ``motion``.
        gripper: above 0 opens, below 0 closes, None leaves it as it is.
        engaged: the dead-man is held. Nothing moves without it, and after any interruption it has to be let go and
            pressed again.
        events: members of ``EVENTS``, in order; each is delivered once.
        received_ns: monotonic time at which the input arrived in this process.
    """

    motion: np.ndarray
    displacement: np.ndarray | None = None
    gripper: float | None = None
    engaged: bool = False
    events: tuple[str, ...] = ()
    received_ns: int = 0

    def __post_init__(self) -> None:
        if self.motion.shape != (6,) or not np.isfinite(self.motion).all() or np.abs(self.motion).max() > 1:
            raise ValueError(f"motion is {self.motion}, expected 6 numbers in [-1, 1]")
        moved = self.displacement
        if moved is not None and (moved.shape != (6,) or not np.isfinite(moved).all()):
            raise ValueError(f"displacement is {moved}, expected 6 finite numbers (m, rad)")
        unknown = set(self.events) - set(EVENTS)
        if unknown:
            raise ValueError(f"unknown events {sorted(unknown)}; valid: {', '.join(EVENTS)}")


class Device(Protocol):
    """Something a person moves a robot with.

    A device is silent, not blocked, when nothing happens: the session takes an input older than 100 ms for a lost
    device, so one that is alive reports at least every 50 ms.

    Attributes:
        name: shown to the operator, and stored with the episodes.

    A device with an attribute ``gripper_open`` (because one button closes and opens) has it set to True whenever an
    attempt begins with open fingers.
    """

    name: str

    def read(self) -> OperatorInput | None:
        """Return everything since the previous call as one input, or None if nothing has arrived. Never blocks.

        Displacements and events of several arrivals are joined; motion, gripper and dead-man are the newest. A
        dead-man that was released in between, however briefly, is reported as released by one call.
        """

    def close(self) -> None:
        """Give the hardware back (terminal settings, sockets). May be called twice."""


def join_inputs(earlier: OperatorInput | None, later: OperatorInput) -> OperatorInput:
    """Join two inputs that arrived between two calls of :meth:`Device.read`, as it promises."""
    if earlier is None:
        return later
    moved = [item.displacement for item in (earlier, later) if item.displacement is not None]
    return dataclasses.replace(
        later,
        displacement=np.sum(moved, axis=0) if moved else None,
        gripper=earlier.gripper if later.gripper is None else later.gripper,
        engaged=earlier.engaged and later.engaged,
        events=(*earlier.events, *later.events),
    )


def device_types() -> dict[str, str]:
    """Return the name of every device, ours and those of installed packages, and the ``module:callable`` behind it."""
    found = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return {**found, **BUILTIN}


def open_device(name: str) -> Device:
    """Open a device by its name.

    Raises:
        ConfigError: there is no such device.
        MissingDependencyError: its module cannot be imported.
    """
    known = device_types()
    if name not in known:
        raise ConfigError(f"unknown teleoperation device '{name}'. {closest(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        opened: Callable[[], Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(f"device '{name}' ({known[name]}) cannot be imported: {error}") from error
    device: Device = opened()
    return device
