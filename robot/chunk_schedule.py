"""Which of the predicted actions belongs to this moment: chunks are placed on the time axis and blended there.

Actions are absolute targets here. Action ``i`` of a chunk belongs to the control step that begins ``i`` periods
after the observation it was computed from. What is computed late therefore starts in its middle, and what is too
late is never executed: in particular there is no jump to the end of a late chunk. Control steps in which the arm does
not get on are no periods: chunks wait for it (:meth:`ChunkSchedule.pause`), though no longer than they are fresh.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from simtoreal.envs import rotation


@dataclass(frozen=True)
class _Chunk:
    """Its first action belongs to ``begin_ns``; like ``adopted_ns`` this is time without pauses."""

    targets: np.ndarray
    observation_ns: int
    begin_ns: int
    adopted_ns: int


class ChunkSchedule:
    """The actions still worth executing in one running episode.

    Args:
        period_ns: control period.
        blend_steps: control steps over which a new chunk takes over from the one before it; 1 switches at once.
        max_age_ns: actions are dropped when their observation is older than this, even if the chunk goes on.

    Attributes:
        paused_ns: time of this episode in which the arm did not get on.
        dropped: why chunks were not taken over -> how many.
    """

    def __init__(self, period_ns: int, *, blend_steps: int, max_age_ns: int) -> None:
        if period_ns <= 0 or blend_steps < 1 or max_age_ns <= 0:
            raise ValueError(f"period {period_ns} ns, blend_steps {blend_steps}, max_age {max_age_ns} ns")
        self.period_ns, self.blend_steps, self.max_age_ns = period_ns, blend_steps, max_age_ns
        self.dropped: Counter[str] = Counter()
        self.begin(0)

    def begin(self, episode: int) -> None:
        """Forget everything: only chunks of ``episode`` count from now on."""
        self.episode, self.paused_ns = episode, 0
        self._chunks: list[_Chunk] = []
        self._newest_ns: int | None = None

    def pause(self, duration_ns: int) -> None:
        """The arm did not get on for this long: what it had to do then, it has to do now."""
        self.paused_ns += duration_ns

    def add(
        self, targets: np.ndarray, observation_ns: int, episode: int, now_ns: int, *, paused_ns: int | None = None
    ) -> bool:
        """Take over a chunk, unless it is of another episode, out of order, or has no action left for ``now_ns``.

        Args:
            targets: ``(horizon, 10)`` absolute targets, finite.
            observation_ns: monotonic time of the control step whose observation they were computed from.
            episode: that the observation belongs to.
            now_ns: monotonic time of the control step that begins now.
            paused_ns: the attribute of that name at the time of the observation; None: there was no pause since.

        Returns:
            Whether it was taken over; otherwise the reason is counted in ``dropped``.

        Raises:
            ValueError: not finite, or of another shape.
        """
        if targets.ndim != 2 or targets.shape[1] != 10 or not np.isfinite(targets).all():
            raise ValueError(f"a chunk of targets must be finite with shape (horizon, 10), got {targets.shape}")
        if episode != self.episode:
            self.dropped["other_episode"] += 1
            return False
        if observation_ns > now_ns or (self._newest_ns is not None and observation_ns <= self._newest_ns):
            self.dropped["out_of_order"] += 1
            return False
        begin_ns = observation_ns - (self.paused_ns if paused_ns is None else paused_ns)
        chunk = _Chunk(targets, observation_ns, begin_ns, now_ns - self.paused_ns)
        if self._at(chunk, now_ns) is None:
            self.dropped["too_late"] += 1
            return False
        self._newest_ns = observation_ns
        self._chunks = [*self._chunks[-1:], chunk]
        return True

    def target_at(self, now_ns: int) -> np.ndarray | None:
        """Target ``(10,)`` for the control step that begins at ``now_ns``; None when there is none: hold."""
        candidates = [(chunk, target) for chunk in self._chunks if (target := self._at(chunk, now_ns)) is not None]
        if not candidates:
            return None
        chunk, newest = candidates[-1]
        steps = (now_ns - self.paused_ns - chunk.adopted_ns) / self.period_ns
        share = min(1.0, (steps + 1) / self.blend_steps)
        if len(candidates) == 1 or share >= 1.0:
            return newest
        mixed = (1 - share) * candidates[0][1] + share * newest
        mixed[3:9] = rotation.to_6d(rotation.from_6d(mixed[3:9]))
        mixed[9] = newest[9]  # half open is neither of two decisions
        return mixed

    def _at(self, chunk: _Chunk, now_ns: int) -> np.ndarray | None:
        age_ns = now_ns - chunk.observation_ns
        index = (now_ns - self.paused_ns - chunk.begin_ns + self.period_ns // 2) // self.period_ns
        if age_ns > self.max_age_ns or not 0 <= index < len(chunk.targets):
            return None
        return chunk.targets[index].copy()
