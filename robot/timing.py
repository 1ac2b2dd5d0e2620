"""Periodic loops with absolute deadlines on the monotonic clock, and an honest record of how well they were kept.

A relative ``sleep(period)`` drifts by the duration of the work; sleeping to absolute deadlines does not. The last
fraction of a millisecond is spun, because the scheduler wakes a sleeper up to ~0.1 ms late.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SPIN_S = 0.0002  # covers the usual lateness of sleep() at 2 % of a core for 100 wake-ups per second
HISTORY = 100_000  # wake-ups kept for percentiles: 80 min at 20 Hz, 13 min at 125 Hz
HISTOGRAM_EDGES_MS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def sleep_until(deadline_ns: int, spin_s: float = SPIN_S) -> None:
    """Return at ``deadline_ns`` of ``time.monotonic_ns()``; returns at once when it has passed."""
    remaining_s = (deadline_ns - time.monotonic_ns()) * 1e-9 - spin_s
    if remaining_s > 0:
        time.sleep(remaining_s)
    while time.monotonic_ns() < deadline_ns:
        pass


@dataclass(frozen=True, kw_only=True)
class TimingSummary:
    """How well a periodic loop kept its deadlines.

    Attributes:
        periods: number of deadlines waited for.
        missed: deadlines that had already passed when the loop came to wait for them (its work took too long).
        p50_ms, p99_ms, max_ms: lateness of the wake-ups after their deadlines; 0 when there were none.
        histogram: wake-ups per lateness class, ``edges_ms`` and ``counts`` (the last class is open).

    Percentiles, maximum and histogram are those of the last ``HISTORY`` wake-ups.
    """

    periods: int
    missed: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    histogram: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible dictionary, as stored in results.json."""
        return {
            "periods": self.periods,
            "missed_periods": self.missed,
            "p50_period_error_ms": self.p50_ms,
            "p99_period_error_ms": self.p99_ms,
            "max_period_error_ms": self.max_ms,
            "period_error_histogram": self.histogram,
        }


class PeriodicClock:
    """Absolute deadlines every ``period_s`` seconds.

    Call :meth:`restart` where the loop begins (again), then :meth:`wait` once per period. A missed deadline is
    counted, and the schedule continues from now on the same grid: periods are skipped, never made up in a burst.

    Args:
        period_s: seconds between deadlines, > 0.
        spin_s: last part of each wait that is spun instead of slept.
    """

    def __init__(self, period_s: float, *, spin_s: float = SPIN_S) -> None:
        if not period_s > 0:
            raise ValueError(f"period must be positive, not {period_s}")
        self.period_ns = round(period_s * 1e9)
        self.spin_s = spin_s
        self.missed = 0
        self.periods = 0
        self._lateness_ns: deque[int] = deque(maxlen=HISTORY)
        self.deadline_ns = 0
        self.restart()

    def restart(self) -> int:
        """Put the next deadline one period from now, without counting anything; returns now (monotonic ns)."""
        now = time.monotonic_ns()
        self.deadline_ns = now + self.period_ns
        return now

    def wait(self) -> int:
        """Wait for the next deadline and return it (monotonic ns); returns at once if it has passed."""
        deadline = self.deadline_ns
        self.periods += 1
        late = time.monotonic_ns() - deadline
        if late > 0:
            self.missed += 1 + late // self.period_ns
            self._lateness_ns.append(late)
            deadline += late // self.period_ns * self.period_ns
        else:
            sleep_until(deadline, self.spin_s)
            self._lateness_ns.append(time.monotonic_ns() - deadline)
        self.deadline_ns = deadline + self.period_ns
        return deadline

    def summary(self) -> TimingSummary:
        """What was recorded since construction (see :class:`TimingSummary`)."""
        return summarize_lateness(self._lateness_ns, self.missed, self.periods)


def summarize_lateness(lateness_ns: Sequence[int], missed: int, periods: int) -> TimingSummary:
    """Percentiles and histogram of wake-up lateness in nanoseconds; ``periods`` may be more than were kept."""
    late_ms = np.asarray(list(lateness_ns) or [0], dtype=np.float64) * 1e-6
    edges = [*HISTOGRAM_EDGES_MS, np.inf]
    counts = np.histogram(np.maximum(late_ms, 0.0), edges)[0] if lateness_ns else np.zeros(len(edges) - 1, dtype=int)
    p50, p99 = np.percentile(late_ms, [50, 99])
    return TimingSummary(
        periods=periods,
        missed=missed,
        p50_ms=float(p50),
        p99_ms=float(p99),
        max_ms=float(late_ms.max()),
        histogram={"edges_ms": list(HISTOGRAM_EDGES_MS), "counts": [int(count) for count in counts]},
    )


@contextlib.contextmanager
def realtime(priority: int) -> Iterator[bool]:
    """Run with SCHED_FIFO where the system allows it; yields whether it was granted.

    Threads and processes started inside inherit it. That is wanted for the threads of the middleware: one that is
    suspended while it holds a lock (or the interpreter's) would stall the control loop. Start processes that may
    wait before. Not being allowed is normal for an ordinary user and changes nothing but jitter.
    """
    granted = False
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        granted = True
    try:
        yield granted
    finally:
        if granted:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
