"""A robot that a person operates: what they do reaches the safety gate at once, not at the next control period."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from simtoreal.data_collection.teleop_hub import InputHub
from simtoreal.envs.action import action_towards, integrate_action
from simtoreal.envs.errors import SafetyError
from simtoreal.envs.rollout import Observation
from simtoreal.robot.ros2_env import Ros2Env
from simtoreal.robot.timing import PeriodicClock


class _AttentiveClock(PeriodicClock):
    """Absolute deadlines; instead of sleeping until the next one it listens to the operator."""

    def __init__(self, period_s: float, listen: Callable[[int], None]) -> None:
        super().__init__(period_s)
        self._listen = listen

    def wait(self) -> int:
        self._listen(self.deadline_ns - round(self.spin_s * 1e9))
        return super().wait()


class TeleopRos2Env(Ros2Env):
    """:class:`Ros2Env` whose action can still be corrected while it is executed.

    A step begins with the action that the operator's state at that moment means for a whole period. When they do
    something else meanwhile, the action is computed anew (speeds count for the time they were held, drags at once) and
    the target that follows from it replaces the one sent before; the gate moves smoothly between them. The action that
    was executed in the end is ``info["executed_action"]``; the target after a step is exactly the one before it moved
    by this action, so a recording with it is what the robot was told.

    Args:
        hub: the operator's devices; its period begins with the actor's ``begin``.
        commanded: told when a corrected target has been handed to the gate (monotonic ns).
        others: see :class:`Ros2Env`.

    Attributes:
        reactive: False leaves every action as it was at the beginning of its step.
    """

    def __init__(
        self, *arguments: Any, hub: InputHub, commanded: Callable[[int], None] = lambda now_ns: None, **others: Any
    ) -> None:
        super().__init__(*arguments, **others)
        self.reactive = True
        self._hub, self._commanded = hub, commanded
        self._executed = np.zeros(self.embodiment.action.dim, dtype=np.float32)
        self._correctable = False
        self._refused = ""
        self.clock = _AttentiveClock(self.embodiment.control_period_s, self._listen)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """See :class:`Ros2Env`."""
        self._before, self._refused = self._target.copy(), ""
        # While an input is stale nothing is sent, so nothing is executed.
        held = bool(self._fault)
        still = np.append(np.zeros(6), action[-1]).astype(np.float32)
        self._executed = still if self._fault else np.array(action, dtype=np.float32)
        self._correctable = not self._fault
        try:
            observation, reward, terminated, truncated, info = super().step(action)
        finally:
            self._correctable = False
        info["executed_action"] = self._executed.copy()
        if not held and not np.array_equal(
            self._target, integrate_action(self._before, self._executed, self.embodiment)
        ):
            # The gate's limits are slower than the operator: what was executed is what the target did.
            info["executed_action"] = action_towards(self._before, self._target, self.embodiment)
        if self._refused and not info["sim_fault"]:
            info["sim_fault"] = self._refused
            return observation, 0.0, False, True, info
        return observation, reward, terminated, truncated, info

    def _listen(self, deadline_ns: int) -> None:
        self._hub.wait(deadline_ns, self._correct)

    def _correct(self, changed: bool) -> bool:
        """Send the target that the operator's newest input means; never ends the wait."""
        if not (self._correctable and self.reactive):
            return False
        action = self._hub.action()
        if (action == self._executed).all():
            return False
        target = self._next_target(self._before, action)
        try:
            self._gate.send_target(target.copy(), time.monotonic_ns(), self._episode)
        except SafetyError as error:
            self._refused, self._correctable = str(error), False
            return False
        self._target, self._executed = target, action
        if self._hub.active:
            self._commanded(time.monotonic_ns())
        return False
