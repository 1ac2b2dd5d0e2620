"""Counts the frames of a sensor, and those that are missing between them."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

# Gaps from which the period is estimated; fewer say too little about it.
_PERIOD_GAPS, _FEWEST_GAPS = 64, 8


@dataclass(frozen=True, kw_only=True)
class FrameCounts:
    """Frames of a sensor since the last :meth:`StreamCounter.restart`.

    Attributes:
        received: frames that arrived and were accepted.
        dropped: frames missing between those, by the gaps of their capture stamps.
    """

    received: int
    dropped: int


class StreamCounter:
    """Compares gaps between capture stamps with the usual one: a gap of k periods is a loss of k - 1 frames.

    The period is the median of recent gaps, so it needs no configuration and ignores jitter below half a period; a
    sensor that loses more frames than it delivers looks like one of a lower rate.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gaps: deque[int] = deque(maxlen=_PERIOD_GAPS)
        self._unjudged: list[int] = []
        self._newest_ns: int | None = None
        self._received = self._dropped = 0

    def note(self, capture_ns: int) -> None:
        """Count a frame captured at ``capture_ns``, which is later than those before."""
        with self._lock:
            self._received += 1
            if self._newest_ns is not None:
                gap = capture_ns - self._newest_ns
                self._gaps.append(gap)
                self._unjudged.append(gap)
            self._newest_ns = capture_ns
            if len(self._gaps) >= _FEWEST_GAPS:
                period = max(1, sorted(self._gaps)[len(self._gaps) // 2])
                self._dropped += sum(max(0, round(gap / period) - 1) for gap in self._unjudged)
                self._unjudged.clear()

    def counts(self) -> FrameCounts:
        """Return the counts so far."""
        with self._lock:
            return FrameCounts(received=self._received, dropped=self._dropped)

    def restart(self) -> None:
        """Count from zero, e.g. for another episode; what is known about the period stays."""
        with self._lock:
            self._received = self._dropped = 0
            self._unjudged.clear()
