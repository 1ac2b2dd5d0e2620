"""A collection session: what happens from one take to the next, and what its operator is shown."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simtoreal.data_collection.coaching import Review

PREPARING, READY, RECORDING, REVIEW, FINISHED = "preparing", "ready", "recording", "review", "finished"

# (state, event) -> what to do; what is not listed is ignored.
TRANSITIONS: dict[tuple[str, str], str] = {
    (READY, "record"): "record",
    (READY, "right"): "record",
    (READY, "rerecord"): "record",
    (READY, "next"): "next",
    (READY, "reset"): "reset",
    (RECORDING, "finish"): "finish",
    (RECORDING, "right"): "finish",
    (RECORDING, "left"): "rerecord",
    (RECORDING, "rerecord"): "rerecord",
    (RECORDING, "discard"): "next",
    (RECORDING, "next"): "next",
    (RECORDING, "reset"): "reset",
    (REVIEW, "accept"): "accept",
    (REVIEW, "right"): "accept",
    (REVIEW, "accept_anyway"): "accept_anyway",
    (REVIEW, "left"): "rerecord",
    (REVIEW, "rerecord"): "rerecord",
    (REVIEW, "discard"): "next",
    (REVIEW, "next"): "next",
    (REVIEW, "reset"): "reset",
    **{(state, "stop"): "stop" for state in (PREPARING, READY, RECORDING, REVIEW)},
}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the operator is shown; replaced as a whole, so that other threads read it without a lock.

    Attributes:
        state: ``preparing``, ``ready``, ``recording``, ``review`` or ``finished``.
        note: what the operator should know, e.g. why nothing moves.
        prompt: a question to the person at a real robot; empty when nothing is asked.
        stage: grows whenever events begin to mean something else: with another state or prompt.
        live: while ready or recording, new pictures come all the time.
        active: the arm follows the operator.
        needs_release: a dead-man is held that does not count, because it was interrupted.
        steps, seconds: of the running take.
        success: the goal is reached, as far as the simulation or the twin judges.
        gauge: compatibility of the last step in [0, 1]; None without a coach.
        review: verdict on the take under review, as shown on the page.
        kept: episodes kept in this session.
        alarm: something is lost if nobody acts (disk full).
        counters: name -> number (missed periods, lost devices, ...).
        move: whether the scene moves in the next episodes; None when this backend cannot.
    """

    state: str = PREPARING
    task: str = ""
    instruction: str = ""
    operator: str = ""
    seed: int = 0
    note: str = ""
    prompt: str = ""
    stage: int = 0
    live: bool = False
    active: bool = False
    needs_release: bool = False
    steps: int = 0
    seconds: float = 0.0
    success: bool = False
    gripper_open: bool = True
    gauge: float | None = None
    review: dict[str, Any] | None = None
    kept: int = 0
    alarm: str = ""
    counters: Mapping[str, float] = field(default_factory=dict)
    move: bool | None = None
    version: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible dictionary."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """Newest images: ``number`` grows with every one; arrays ``(H, W, 3)`` uint8 RGB by camera, never written again."""

    number: int = 0
    images: Mapping[str, np.ndarray] = field(default_factory=dict)


class Board:
    """Where the control thread posts what others read. Every posting replaces an immutable value."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self.frames = Frames()
        self.episodes: tuple[dict[str, Any], ...] = ()
        """Stored episodes, oldest first: name, operator, steps, seconds, success, compatibility."""
        self.media: Mapping[str, bytes] = {}
        """JPEG pictures that the snapshot refers to."""
        self._watchers: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Call ``watcher`` (from the control thread, must not block) after every posting; returns how to end that."""
        with self._lock:
            self._watchers.append(watcher)

        def unwatch() -> None:
            with self._lock:
                self._watchers.remove(watcher)

        return unwatch

    def post(self, **changes: Any) -> None:
        """Change fields of the snapshot."""
        before = self.snapshot
        after = dataclasses.replace(before, **changes, version=before.version + 1)
        if (after.state, after.prompt) != (before.state, before.prompt):
            after = dataclasses.replace(after, stage=before.stage + 1)
        self.snapshot = after
        self._tell()

    def post_frames(self, images: Mapping[str, np.ndarray]) -> None:
        """Show images."""
        self.frames = Frames(number=self.frames.number + 1, images=images)
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher()


def describe_review(review: Review, pictures: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows of a coach's verdict.

    Args:
        review: the verdict.
        pictures: id of the animated strip by ``"<index>/take"`` and ``"<index>/reference"``.
    """
    snippets = [
        {**dataclasses.asdict(snippet), "take": pictures.get(f"{index}/take", ""),
         "reference": pictures.get(f"{index}/reference", "")}
        for index, snippet in enumerate(review.snippets)
    ]  # fmt: skip
    return {
        "accepted": review.accepted, "compatibility": round(float(review.compatibility), 3),
        "bad_steps": int(review.bad_steps), "tolerance": int(review.tolerance), "snippets": snippets,
    }  # fmt: skip
