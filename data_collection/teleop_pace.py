"""Real time for a simulation that a person operates: when the next control step is due."""

from __future__ import annotations

import time
from collections.abc import Callable

from simtoreal.data_collection.teleop_hub import InputHub

# How far the simulation may run ahead of the wall clock, and which share of its lead it waits after every step. So a
# person who presses or releases something 10 times a second never waits for the bound; at 20 times they reach it.
MOST_AHEAD_PERIODS = 4.0
PAYBACK = 0.25


class RealTimePace:
    """Absolute deadlines, one control period apart; a reaction of the operator brings the next one forward.

    A simulated step takes a few milliseconds, so there is no reason to let somebody who has just pressed a key wait for
    the end of a 50 ms period: the step begins as soon as the one before it has been computed. The simulation is then
    ahead of the wall clock; every following period is longer by a quarter of the lead, until it has gone. In simulated
    time nothing changes: every step is one period long, its action counts from its beginning, and a recording replays
    exactly.

    Args:
        period_s: control period.

    Attributes:
        reactive: False takes every step at its deadline.
    """

    def __init__(self, period_s: float) -> None:
        self.reactive = True
        self._period_ns = round(period_s * 1e9)
        self.restart()
        self.missed = 0
        """Periods that were skipped because the machine was too slow."""

    def restart(self) -> None:
        """The next step is due one period from now."""
        self._due_ns = time.monotonic_ns() + self._period_ns
        self._ahead_ns = 0

    def wait(self, hub: InputHub, on_change: Callable[[], None] = lambda: None) -> int:
        """Wait until the next step is due; returns the time (monotonic ns).

        Args:
            hub: polled meanwhile, and a last time at the end.
            on_change: called when something changed.
        """

        def early(changed: bool) -> bool:
            if not changed:
                return False
            on_change()
            if not self.reactive:
                return False
            lead = self._ahead_ns + self._due_ns - time.monotonic_ns()
            return lead <= MOST_AHEAD_PERIODS * self._period_ns

        hub.wait(self._due_ns, early)
        now_ns = time.monotonic_ns()
        # Early lengthens the lead; late shortens it, and is late only as far as there was none.
        earlier = max(self._due_ns - now_ns, -self._ahead_ns)
        self._ahead_ns += earlier
        self._due_ns -= earlier
        payback = round(PAYBACK * self._ahead_ns)
        self._ahead_ns -= payback
        self._due_ns += self._period_ns + payback
        if now_ns > self._due_ns:
            skipped = (now_ns - self._due_ns) // self._period_ns + 1
            self.missed += skipped
            self._due_ns += skipped * self._period_ns
        return now_ns
