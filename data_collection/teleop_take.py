"""Takes of a collection session: recorded while they run, reviewed, then kept, or gone if the operator says so.

Only :meth:`TakeStore.discard` removes anything; whatever else ends a take stores it (:meth:`TakeStore.rescue`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simtoreal.data_collection.coaching import Coach
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import ABORTED, Arrays, EpisodeInfo
from simtoreal.data_collection.recorder import Recorder
from simtoreal.data_collection.takes import StreamTake, read_part
from simtoreal.data_collection.teleop_pictures import strip
from simtoreal.data_collection.teleop_session import describe_review
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError, DiskError
from simtoreal.envs.rollout import EpisodeResult, Listener, Observation, Step

UNREVIEWED = "unreviewed"
"""``EpisodeInfo.failure`` of a finished take whose session ended before the operator decided about it."""
_log = logging.getLogger(__name__)


class _ReviewedTake(StreamTake):
    """A take on disk whose steps can be looked at before it is kept, and which then learns what the review said."""

    verdict: Mapping[str, Any] = {}

    def keep(self, info: EpisodeInfo) -> None:
        super().keep(dataclasses.replace(info, extra={**info.extra, **self.verdict}))

    def arrays(self) -> Arrays:
        """All steps on disk, as in an episode file; read back, because a long take would fill the memory.

        Raises:
            DatasetError, OSError: they cannot be read.
        """
        with contextlib.suppress(DiskError):  # what was written before is there all the same
            self.finish()
        return read_part(self._part)[1] if self.flushed else {}


@dataclass(kw_only=True)
class TakeReview:
    """What there is to see of a finished take.

    Attributes:
        verdict: of the coach, as the page shows it; None without one.
        pictures: ids of pictures of the take by camera.
        media: the pictures (JPEG) by id.
        problem: why something of this is missing; empty if nothing is.
    """

    verdict: dict[str, Any] | None = None
    pictures: dict[str, str] = field(default_factory=dict)
    media: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""


class TakeStore(Listener):
    """Records one take at a time into a dataset.

    Args:
        writer: of the dataset.
        task: name of the task.
        embodiment: of the environment.
        source: ``teleop``.
        reference: the dataset that a coach compares with, for the pictures of its demonstrations.
        motion: settings of the scene's motion, stored with the takes in which it moves.
    """

    def __init__(
        self,
        writer: DatasetWriter,
        *,
        task: str,
        embodiment: Embodiment,
        source: str = "teleop",
        reference: Dataset | None = None,
        motion: Mapping[str, Any] | None = None,
    ) -> None:
        self._writer, self._task, self._embodiment, self._source = writer, task, embodiment, source
        self._reference, self._motion = reference, dict(motion or {})
        self._recorder: Recorder | None = None
        self._take: _ReviewedTake | None = None
        self._seed = 0
        self._milestones: dict[str, bool] = {}
        stored = Dataset.open(writer.path).episodes
        self._known = [_row(info) for info in stored]
        self.seeds = [info.seed for info in stored]
        """Initial conditions in the dataset."""
        self._number = 0
        self.alarm = ""
        """What the operator has to know about the recording at once (a full disk); empty when all is well."""

    def episodes(self) -> tuple[dict[str, Any], ...]:
        """Stored episodes, oldest first."""
        return tuple(self._known)

    def begin(self, operator: str, *, move: bool = False) -> None:
        """The next rollout is a take of ``operator``, with the scene in motion or at rest."""
        self.discard()
        self.alarm = ""
        self._recorder = Recorder(
            self._open, task=self._task, embodiment=self._embodiment, source=self._source, operator=operator,
            keep=lambda result: True, extra={"motion": self._motion} if move else {}, on_alarm=self._raise,
        )  # fmt: skip

    def _raise(self, text: str) -> None:
        self.alarm = text

    @property
    def steps(self) -> int:
        """Steps of the take that runs or waits for a decision."""
        return 0 if self._take is None else self._take.flushed + self._take.waiting

    def counters(self) -> dict[str, float]:
        """Numbers about the recording and its sensors to show."""
        if self._recorder is None:
            return {}
        health = self._recorder.health
        found: dict[str, float] = {"unwritten_steps": health["waiting"]}
        sensors = list(health["sensors"].values())
        if sensors:
            ages = [sensor["age_ms"] for sensor in sensors]
            found["sensor_skew_ms"] = max(ages) - min(ages)
            found["late_images"] = sum(sensor["late_steps"] for sensor in sensors)
            found["dropped_images"] = sum(sensor["dropped"] for sensor in sensors)
        return found

    def _open(self, info: EpisodeInfo) -> _ReviewedTake:
        self._take = _ReviewedTake(self._writer.part_path(), self._store, info)
        return self._take

    def _store(self, arrays: Arrays, info: EpisodeInfo) -> None:
        if info.success and not arrays["dones"].any():
            # Only the operator saw the goal reached, at the end of the take.
            last = np.arange(len(arrays["dones"])) == len(arrays["dones"]) - 1
            arrays = {
                **arrays,
                "rewards": np.where(last, np.float32(1), arrays["rewards"]),
                "dones": last.astype(np.int8),
            }
        path = self._writer.add(arrays, info)
        self._known.append(_row(dataclasses.replace(info, path=path, steps=len(arrays["actions"]))))

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        if self._recorder is not None:
            self._recorder.on_reset(slot, episode, seed, observation, info)
            self._seed, self._milestones = seed, {}

    def on_step(self, step: Step) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        if self._recorder is not None:
            self._recorder.on_step(step)
            for name, reached in step.info.get("milestones", {}).items():
                self._milestones[name] = self._milestones.get(name, False) or bool(reached[0])

    def review(self, coach: Coach | None) -> TakeReview:
        """Look at the finished take; what cannot be read, shown or judged is a problem to report, and no more."""
        found = TakeReview()
        self._number += 1
        try:
            arrays = self._take.arrays() if self._take is not None else {}
            for camera in self._cameras(arrays):
                found.pictures[camera] = self._picture(found.media, arrays[f"obs/{camera}_image"])
        except Exception as error:
            _log.exception("a take cannot be looked at")
            found.problem = f"this take cannot be looked at: {error}"
            return found
        if coach is not None and arrays:
            try:
                found.verdict = self._judge(coach, arrays, found.media)
            except Exception as error:
                _log.exception("the coach failed")
                found.problem = f"no verdict on this take, the coach failed: {error or type(error).__name__}"
        return found

    def _judge(self, coach: Coach, arrays: Arrays, media: dict[str, bytes]) -> dict[str, Any]:
        verdict = coach.review(arrays)
        if not np.isfinite(verdict.compatibility):
            raise ValueError(f"its compatibility is {verdict.compatibility}")
        pictures: dict[str, str] = {}
        for index, snippet in enumerate(verdict.snippets):
            for camera in self._cameras(arrays)[:1]:
                shown = arrays[f"obs/{camera}_image"][snippet.start : snippet.stop]
                pictures[f"{index}/take"] = self._picture(media, shown)
                other = self._reference_images(snippet.reference_episode, camera)
                if other is not None:
                    part = other[snippet.reference_start : snippet.reference_stop]
                    pictures[f"{index}/reference"] = self._picture(media, part)
        described = describe_review(verdict, pictures)
        if self._take is not None:
            score = {key: described[key] for key in ("accepted", "compatibility", "bad_steps", "tolerance")}
            self._take.verdict = {"compatibility": score}
        return described

    def keep(self, *, success: bool, failure: str, overridden: bool) -> tuple[bool, str]:
        """Store the take.

        Args:
            success: whether it reached the goal.
            failure: why not.
            overridden: the operator keeps it although the coach rejected it.

        Returns:
            Whether it is stored, and a sentence for the operator.
        """
        steps = self.steps
        if self._recorder is None or self._take is None or not steps:
            self.discard()
            return False, "the take has no steps, so there is nothing to keep"
        if score := self._take.verdict.get("compatibility"):
            self._take.verdict = {**self._take.verdict, "compatibility": {**score, "overridden": overridden}}
        ended = EpisodeResult(
            episode=0, seed=self._seed, success=success, steps=steps,
            duration_s=steps * self._embodiment.control_period_s,
            milestones=dict(self._milestones), instruction="", failure=failure,
        )  # fmt: skip
        before = len(self._known)
        try:
            self._recorder.on_episode(0, ended)
        except DatasetError as error:
            return False, str(error)
        finally:
            self._recorder = self._take = None
        if len(self._known) == before:
            return False, self.alarm or "nothing of the take could be stored"
        return True, self.alarm or f"episode {self._known[-1]['name']} is stored"

    def rescue(self, *, finished: bool, goal_reached: bool | None) -> str:
        """Store a take that nobody decided about; call it on every way out, it never raises an ``Exception``.

        Args:
            finished: it was waiting for the operator's decision.
            goal_reached: what the environment says of a finished one; None where it cannot judge. Stored as
                ``extra["goal_reached"]``: a success, which policies learn from, is what somebody has accepted.

        Returns:
            A sentence about it; empty if there was none.
        """
        if not self.steps:
            self.discard()
            return ""
        failure = UNREVIEWED if finished else ABORTED
        if finished and self._take is not None and goal_reached is not None:
            self._take.verdict = {**self._take.verdict, "goal_reached": goal_reached}
        try:
            kept, message = self.keep(success=False, failure=failure, overridden=False)
        except Exception as error:  # its journal stays
            _log.exception("a take could not be stored")
            kept, message = False, str(error) or type(error).__name__
        if kept:
            return f"{message} (not discarded: {failure})"
        return f"{message}; what is on disk of the take stays for 'simtoreal data recover'"

    def discard(self) -> None:
        """Leave nothing behind of a running take: the operator does not want it."""
        if self._recorder is not None:
            self._recorder.discard()
        self._recorder = self._take = None

    def _cameras(self, arrays: Arrays) -> list[str]:
        return [camera.name for camera in self._embodiment.cameras if f"obs/{camera.name}_image" in arrays]

    def _picture(self, media: dict[str, bytes], images: np.ndarray) -> str:
        """Add an animated strip of the images to ``media`` and return its id, with the number of pictures in it."""
        data, count = strip(images)
        name = f"{self._number}-{len(media)}-{count}"
        media[name] = data
        return name

    def _reference_images(self, episode: str, camera: str) -> np.ndarray | None:
        if self._reference is None:
            return None
        name = f"obs/{camera}_image"
        for info in self._reference.episodes:
            if info.name == episode:
                return self._reference.read(info, [name]).get(name)
        return None


def _row(info: EpisodeInfo) -> dict[str, Any]:
    """What the page lists of an episode."""
    score = info.extra.get("compatibility")
    return {
        "name": info.name, "operator": info.operator, "source": info.source, "steps": info.steps,
        "seconds": round(info.duration_s, 1), "success": info.success, "move": "motion" in info.extra,
        "compatibility": score.get("compatibility") if isinstance(score, dict) else None,
        "accepted": score.get("accepted") if isinstance(score, dict) else None,
    }  # fmt: skip
