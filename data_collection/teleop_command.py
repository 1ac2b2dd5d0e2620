"""From what a person does to what the arm is told: dead-man, watchdog, clutch, speed limit, gripper latch.

No threads, sockets or clocks here: times are arguments, so every rule can be tested.
"""

from __future__ import annotations

import numpy as np

from simtoreal.data_collection.teleop_device import OperatorInput
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError

# A device reports at least every 50 ms. Two missed reports are a lost device; with a control period of 50 ms the arm's
# target then rests less than 150 ms after the last sign of life.
SILENCE_NS = 100_000_000
# Drags faster than the action limits are made up for, but never by more than this many steps.
BACKLOG_STEPS = 2.0


class CommandShaper:
    """Turns the inputs of one device into ``ee_delta`` actions.

    Nothing moves unless the dead-man is held *and* was seen released since the last interruption: at the start, after
    :meth:`interrupt`, and after a silence longer than ``SILENCE_NS``. What was dragged without it never moves the arm.

    An action is what the target does during one control period. Where commands can be corrected within the period
    (:meth:`action` asked again), speeds count for the time that they were held, and displacements at once; the last
    answer is the one that was executed and belongs into a recording.

    Args:
        embodiment: gives action limits and period; its action mode must be ``ee_delta``.

    Raises:
        ConfigError: another action mode.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        if embodiment.action.mode != "ee_delta":
            raise ConfigError(f"teleoperation needs action mode 'ee_delta', not '{embodiment.action.mode}'")
        self._limits = np.asarray(embodiment.action.limits[:6], dtype=np.float64)
        self._period_ns = round(embodiment.control_period_s * 1e9)
        self.active = False
        """Whether the arm follows this device at the moment."""
        self.engaged = False
        """Whether the dead-man is held, whatever that counts for."""
        self.needs_release = True
        """Whether the dead-man has to be let go before it counts again."""
        self.losses = 0
        """Times that the device fell silent while the arm followed it."""
        self._received_ns = 0
        self._motion = np.zeros(6)
        self._pending = np.zeros(6)  # displacement not executed yet, as a share of the limits
        self._executed = np.zeros(6)  # part of it in the last answer of ``action``
        self._moved = np.zeros(6)  # share of this period's motion that lies in the past
        self._since_ns = self._end_ns = 0

    @property
    def silent_at_ns(self) -> int:
        """When the device counts as lost if it says nothing more."""
        return self._received_ns + SILENCE_NS

    def update(self, given: OperatorInput, now_ns: int) -> bool:
        """Take over an input; returns whether a person would expect the arm to react at once.

        That is the beginning, end or change of direction of a motion, not its every variation.
        """
        before = (self.active, *np.sign(self._motion * self.active))
        self._received_ns = given.received_ns
        self.check(now_ns)
        if not given.engaged:
            self.needs_release = False
        self.engaged = given.engaged
        active = given.engaged and not self.needs_release
        if self.active and not active:
            self._rest(now_ns)
        self.active = active
        if active:
            self._advance(now_ns)
            self._motion = given.motion.astype(np.float64)
            if given.displacement is not None:
                self._pending += given.displacement / self._limits
                self._pending = _bounded(self._pending, BACKLOG_STEPS)
        return before != (self.active, *np.sign(self._motion * self.active))

    def check(self, now_ns: int) -> bool:
        """Notice a silence; returns whether the arm was following and has to stop now."""
        if now_ns <= self.silent_at_ns or self.needs_release:
            return False
        was_active = self.active
        self.losses += was_active
        self.interrupt(min(now_ns, self.silent_at_ns))
        return was_active

    def interrupt(self, now_ns: int) -> None:
        """Stop, and ask for a fresh press of the dead-man."""
        if self.active:
            self._rest(now_ns)
        self.active, self.needs_release = False, True

    def begin(self, now_ns: int) -> np.ndarray:
        """Begin a control period and return its action, see :meth:`action`."""
        self._pending -= self._executed
        self._moved[:], self._executed[:] = 0.0, 0.0
        self._since_ns, self._end_ns = now_ns, now_ns + self._period_ns
        return self.action()

    def action(self) -> np.ndarray:
        """Translation and rotation ``(6,)`` of this period in [-1, 1], as far as is known by now.

        Translation and rotation keep their direction when they are too fast for the limits.
        """
        remaining = max(0, self._end_ns - self._since_ns) / self._period_ns
        wanted = self._moved + self._motion * remaining + self._pending
        bounded = _bounded(wanted, 1.0)
        length = np.abs(wanted)
        share = np.divide(np.abs(bounded), length, out=np.ones(6), where=length > 0)
        self._executed = self._pending * share
        return bounded

    def _advance(self, now_ns: int) -> None:
        """Motion up to now lies in the past."""
        now_ns = min(max(now_ns, self._since_ns), self._end_ns)
        self._moved += self._motion * ((now_ns - self._since_ns) / self._period_ns)
        self._since_ns = now_ns

    def _rest(self, now_ns: int) -> None:
        """End the motion here: what was commanded stays commanded, what was waiting is forgotten."""
        self._advance(now_ns)
        self._motion = np.zeros(6)
        self._pending = self._executed.copy()


def _bounded(wanted: np.ndarray, limit: float) -> np.ndarray:
    """Scale translation and rotation, each as a whole, into [-limit, limit]."""
    parts = wanted.reshape(2, 3)
    excess = np.maximum(np.abs(parts).max(axis=1, keepdims=True) / limit, 1.0)
    return (parts / excess).reshape(6)
