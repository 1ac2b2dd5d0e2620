"""The actor of a rollout that is a person."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from simtoreal.data_collection.teleop_hub import InputHub
from simtoreal.data_collection.teleop_pace import RealTimePace
from simtoreal.data_collection.teleop_page import PageDevice
from simtoreal.envs.rollout import Observation


class TeleopActor:
    """Actor of a rollout that does what the operator does, in chunks of one action.

    Args:
        hub: the operator's devices.
        page: told when a command is handed over, for the measurement of latency.
        pace: waits until a simulation's step is due; None where the environment itself keeps time.
        on_change: called when the operator did something while the actor waits.
    """

    observation_steps = 1
    execute_steps = 1
    ensembling: float | None = None

    def __init__(
        self, hub: InputHub, page: PageDevice, pace: RealTimePace | None, on_change: Callable[[], None]
    ) -> None:
        self._hub, self._page, self._pace, self._on_change = hub, page, pace, on_change

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        """Ask for a fresh press; see :class:`~simtoreal.envs.rollout.Actor`."""
        self._hub.interrupt()
        self._hub.open_gripper()
        if self._pace is not None:
            self._pace.restart()

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        """Return the newest command ``(1, 1, 7)``, read as late as possible."""
        if self._pace is not None:
            self._pace.wait(self._hub, self._on_change)
        else:
            self._hub.poll()
        now_ns = time.monotonic_ns()
        action = self._hub.begin(now_ns)
        self._page.commanded(now_ns, moving=self._hub.active)
        return action[None, None]
