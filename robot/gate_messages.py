"""What the runtime and the safety gate say to each other: fixed binary requests one way, JSON status the other."""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TARGET, ARM, WATCH, REST, CLOSE = range(1, 6)
# kind, sequence number, at_ns, episode, observation_ns or process id, 10 target values
_REQUEST = struct.Struct("<IIqqq10d")
MAX_BYTES = 65536


class Request(NamedTuple):
    """One message of the runtime.

    Attributes:
        kind: ``TARGET``, ``ARM``, ``WATCH``, ``REST`` (the episode is over) or ``CLOSE``.
        sequence: counts the messages; the status names the last one that was handled.
        at_ns: monotonic time at which the target should be reached.
        episode: episode the target belongs to.
        extra: ``TARGET``: monotonic arrival time of the oldest camera image the runtime goes by (0: not reported).
            ``WATCH``: process id.
        target: position (m), 6-D rotation, gripper opening; base frame.
    """

    kind: int
    sequence: int
    at_ns: int = 0
    episode: int = 0
    extra: int = 0
    target: tuple[float, ...] = (0.0,) * 10

    def pack(self) -> bytes:
        """Bytes of fixed length."""
        return _REQUEST.pack(self.kind, self.sequence, self.at_ns, self.episode, self.extra, *self.target)

    @classmethod
    def unpack(cls, content: bytes) -> Request:
        """Inverse of :meth:`pack`.

        Raises:
            ValueError: wrong length or unknown kind.
        """
        if len(content) != _REQUEST.size:
            raise ValueError(f"message of {len(content)} bytes; expected {_REQUEST.size}")
        kind, sequence, at_ns, episode, extra, *target = _REQUEST.unpack(content)
        if not TARGET <= kind <= CLOSE:
            raise ValueError(f"message of unknown kind {kind}")
        return cls(kind, sequence, at_ns, episode, extra, tuple(target))


@dataclass(frozen=True, kw_only=True)
class GateStatus:
    """What the safety gate does and why.

    Attributes:
        state: ``idle`` (publishes nothing), ``armed`` (moves), ``hold`` (an input is late; braked, resumes by
            itself), ``stopped`` (by a fault or the end of an episode; braked, needs
            :meth:`SafetyGate.begin_episode`) or ``estopped``.
        latched: whether the re-arm service has to be called before it can be armed again: after an emergency stop,
            and after faults that say that something is wrong with the arm or its surroundings.
        reason: why it is not armed, for people.
        kind: kind of the fault that stopped it, without numbers; empty when it was not a fault.
        late_input: kind of the fault that it holds for; ``command_silent`` when it only waits for the next target.
        handled: sequence number of the last message handled.
        refusal: why the last request to arm was refused, or empty.
        fault_counts: kind of fault -> number of times.
        published: poses published.
        publish_hz: mean rate of publishing poses while not idle.
        limited: published poses that had to differ from the interpolated targets.
        at_rest: whether the commanded pose stands still.
        stamp_ns: monotonic time of this status.
        realtime: whether the system granted the gate's loop real-time scheduling.
        timing: period errors of the gate's own loop; only in the status that :meth:`SafetyGate.close` returns.
    """

    state: str
    latched: bool = False
    reason: str = ""
    kind: str = ""
    late_input: str = ""
    handled: int = 0
    refusal: str = ""
    fault_counts: dict[str, int] = field(default_factory=dict)
    published: int = 0
    publish_hz: float = 0.0
    limited: int = 0
    at_rest: bool = True
    stamp_ns: int = 0
    realtime: bool = False
    timing: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible dictionary."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One line of JSON, as published on the status topic."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> GateStatus:
        """Inverse of :meth:`to_json`."""
        return cls(**json.loads(text))
