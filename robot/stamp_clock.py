"""When something was measured, on this computer's clock, told from stamps of another clock."""

from __future__ import annotations

from collections import deque

# Quartz clocks differ by up to ~100 ppm; a transport delay that grows faster than this is a queue filling up.
CLOCK_DRIFT = 200e-6
# Less than this is the jitter of stamps, more is a clock being set.
CLOCK_STEP_NS = 50_000_000
# Stamps that are remembered: half a minute of images, a second of joint states.
KNOWN_STAMPS = 1000


class StampClock:
    """Translates stamps of another clock into this computer's monotonic clock.

    The offset between the clocks is unknown, so the least delay between stamp and arrival seen so far counts as
    zero: a constant part of the delay stays invisible, any growth of it shows as age.

    A clock that is set back makes the delay grow, too. What tells it from late messages is that its stamps go back:
    messages of one sender wait in a queue, but do not overtake each other. The offset then moves by as much as the
    delay did, so that what was late before remains late. A step smaller than the time between two messages, or than
    ``CLOCK_STEP_NS``, cannot be told from lateness, and shows as age until the drift has made up for it. A stamp that
    was seen before is an old message again, as from a driver that is stuck in its buffers, and no step of the clock.
    """

    def __init__(self) -> None:
        self._offset_ns = self._delay_ns = self._arrived_ns = self._stamp_ns = 0
        self._started = False
        self._known: deque[int] = deque(maxlen=KNOWN_STAMPS)

    def to_monotonic(self, stamp_ns: int, arrived_ns: int) -> int:
        """Return the monotonic time of ``stamp_ns``, at most ``arrived_ns`` (both nanoseconds)."""
        if self._started and stamp_ns == self._stamp_ns:
            # A repeated stamp is the same moment, whatever the drift allowed since.
            return stamp_ns + self._offset_ns
        delay = arrived_ns - stamp_ns
        if not self._started:
            self._started, self._offset_ns = True, delay
        else:
            grown = delay - self._delay_ns
            set_back = stamp_ns < self._stamp_ns and grown > CLOCK_STEP_NS and stamp_ns not in self._known
            moved = grown if set_back else 0
            drift = int(CLOCK_DRIFT * (arrived_ns - self._arrived_ns))
            self._offset_ns = min(delay, self._offset_ns + moved + drift)
        self._delay_ns, self._arrived_ns, self._stamp_ns = delay, arrived_ns, stamp_ns
        self._known.append(stamp_ns)
        return stamp_ns + self._offset_ns
