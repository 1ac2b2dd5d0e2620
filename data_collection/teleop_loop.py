"""The control thread of a collection session: takes are rollouts whose actor is a person."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym

from simtoreal.data_collection.coaching import Coach
from simtoreal.data_collection.teleop_actor import TeleopActor
from simtoreal.data_collection.teleop_hub import InputHub
from simtoreal.data_collection.teleop_pace import RealTimePace
from simtoreal.data_collection.teleop_page import PageDevice
from simtoreal.data_collection.teleop_session import (
    FINISHED,
    PREPARING,
    READY,
    RECORDING,
    REVIEW,
    TRANSITIONS,
    Board,
)
from simtoreal.data_collection.teleop_take import TakeStore
from simtoreal.envs.errors import RobotError, SimtorealError
from simtoreal.envs.rollout import EpisodeResult, Listener, Observation, Step, index_info, rollout

# Rate at which the page is told about a session in which nothing moves.
IDLE_POST_S = 0.1
_log = logging.getLogger(__name__)


class SessionEnd(Exception):
    """The operator ends the session while something waits for them, or the arm moves by itself."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How a session goes.

    Attributes:
        task: name of the task.
        first_seed: initial condition of the first take; the others follow.
        judge: who decides about success: the ``simulation`` (or twin), or the ``operator`` by accepting.
        practice: the arm may be moved between takes, without a recording.
        period_s: control period.
        longest_steps: of a take, or of practice before the scene is reset, from the first motion on.
        operator: name stored with the episodes until the page says another.
        move: whether the scene moves until the page says otherwise.
    """

    task: str
    first_seed: int
    judge: Literal["simulation", "operator"] = "simulation"
    practice: bool = True
    period_s: float = 0.05
    longest_steps: int = 2400
    operator: str = "operator"
    move: bool = False


class TeleopSession(Listener):
    """Runs takes until the operator stops. Everything but ``board`` belongs to the thread of :meth:`run`.

    Args:
        options: how it goes.
        env: simulation or robot.
        hub: the operator's devices, the page among them.
        page: the page.
        store: where takes go.
        board: what the page shows.
        coaches: judges of takes with a scene at rest (False) and in motion (True), as far as there are any.
        unjudged: for the others what the operator is told, by mode as in ``coaches``.
        pace: see :class:`TeleopActor`.
        set_motion: lets the scene move in the next episodes, or not; None where it cannot.
        view: shows the scene as it is now; None to show the images that are recorded.
        counters: returns more numbers to show.
    """

    def __init__(
        self,
        options: SessionOptions,
        env: gym.Env[Any, Any],
        hub: InputHub,
        page: PageDevice,
        store: TakeStore,
        board: Board,
        *,
        coaches: Mapping[bool, Coach] | None = None,
        unjudged: Mapping[bool, str] | None = None,
        pace: RealTimePace | None = None,
        set_motion: Callable[[bool], None] | None = None,
        view: Callable[[], None] | None = None,
        counters: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.options, self.board = options, board
        self._env, self._hub, self._page, self._store = env, hub, page, store
        self._coaches, self._pace, self._counters = dict(coaches or {}), pace, counters
        self._unjudged, self._coach_problem = dict(unjudged or {}), ""
        self._set_motion, self._view = set_motion, view
        self._actor = TeleopActor(hub, page, pace, self._show)
        self._seed = options.first_seed
        self._operator = options.operator
        self._move = self._next_move = options.move and set_motion is not None
        self._state, self._decision = READY, ""
        self._waiting = False
        self._result: EpisodeResult | None = None
        self._steps, self._success, self._begun, self._hint = 0, False, False, ""
        self._verdict: dict[str, Any] | None = None
        self._gauge: float | None = None
        self._coach: Coach | None = None
        self.latest: tuple[Observation, dict[str, Any]] = ({}, {})
        """Newest observation and info, for scripted operators in tests."""

    # ---- what happens

    def run(self) -> None:
        """Run takes until the operator stops the session.

        However it ends (stop, signal, error), a take that the operator has not discarded is stored: a running one with
        ``failure="aborted"``, one that waits for a decision with ``failure="unreviewed"``.
        """
        self.board.episodes = self._store.episodes()
        reason = ""
        try:
            while self._state != FINISHED:
                if self._state == REVIEW or self._waiting:
                    self._wait_for_decision()
                    self._decide()
                else:
                    self._run_episode()
        except SessionEnd as end:
            reason = str(end)
        finally:
            rescued = self._rescue()
            self._state = FINISHED
            note = "; ".join(text for text in ("the session has ended", reason, rescued) if text)
            self.board.post(state=FINISHED, active=False, review=None, note=note, alarm=self._store.alarm)

    def end(self) -> None:
        """End the session soon, as if the operator had; for other threads."""
        self._hub.events.append("stop")
        self._hub.wake.set()

    def ask(self, text: str) -> None:
        """Show a text to the person at a real robot and return once they agree.

        The arm moves by itself after that, so only ``agree`` counts, which means nothing anywhere else, from whatever
        device it comes, and only while the page shows this text.

        Raises:
            RobotError: they do not.
            SessionEnd: they end the session.
        """
        self._enter(prompt=text)
        try:
            while True:
                self._idle()
                while self._hub.events:
                    event = self._hub.events.popleft()
                    if event == "agree" and self._page.shown_stage == self.board.snapshot.stage:
                        return
                    if event in ("left", "discard"):
                        raise RobotError("the operator refused; press record to try again")
                    if event == "stop":
                        raise SessionEnd
        finally:
            self.board.post(prompt="")

    def check_operator(self) -> None:
        """Let an arm that moves by itself go on only while its operator can stop it; called before every target.

        Raises:
            RobotError: the page has gone.
            SessionEnd: they end the session.
        """
        self._hub.poll()
        if "stop" in self._hub.events:
            raise SessionEnd("the arm has stopped on its way home")
        if not self._page.present:
            raise RobotError(
                "the arm has stopped on its way home, because the page is closed, hidden or out of contact; "
                "open it and press record to try again"
            )

    def _run_episode(self) -> None:
        recording = self._state == RECORDING
        self._read_settings()
        self._move = self._next_move
        self._decision, self._result, self._verdict, self._gauge = "", None, None, None
        self._steps, self._success = 0, False
        self.board.post(state=PREPARING, review=None, gauge=None, seed=self._seed)
        if self._set_motion is not None:
            self._set_motion(self._move)
        self._coach = self._coaches.get(self._move)
        if recording:
            self._store.begin(self._operator, move=self._move)
            self._coach_problem = ""
            if self._coach is not None:
                self._consult(self._coach.reset)
        try:
            rollout(self._env, self._actor, [self._seed], listeners=[self], stop=self._stopped)
        except SimtorealError as error:
            rescued = self._rescue()
            self._state, self._waiting, self._decision = READY, True, ""
            self._enter(state=READY, note=f"{error}{'. ' if rescued else ''}{rescued}")
            return
        finally:
            self._hub.interrupt()
        if recording and self._begun and self._decision in ("", "finish"):
            self._finish_take()
        else:
            self._decide()

    def _stopped(self) -> bool:
        while self._hub.events and not self._decision:
            self._decision = TRANSITIONS.get((self._state, self._hub.events.popleft()), "")
            if self._decision == "finish" and not self._begun:
                self._decision = ""
                self._hint = "there is nothing to finish yet: the take begins with the first motion"
        return bool(self._decision)

    def _enter(self, **shown: Any) -> None:
        """Show another state or prompt. What was asked for until then was meant for the one before; a stop stays."""
        self._show(**shown)
        self._hub.poll()  # what devices have not told yet
        for _ in range(len(self._hub.events)):
            if (event := self._hub.events.popleft()) == "stop":
                self._hub.events.append(event)

    def _finish_take(self) -> None:
        self._state, self._decision = REVIEW, ""
        found = self._store.review(self._coach)
        self.board.media, self._verdict = found.media, found.verdict
        self._coach_problem = found.problem or self._coach_problem
        goal = "goal reached" if self._success else "goal not reached"
        if self.options.judge == "operator":
            goal = "accept if the goal was reached"
        note = self._remark(f"{self._fault}; accepting stores this take as a failure" if self._fault else goal)
        shown = {"verdict": found.verdict, "take": found.pictures}
        self._enter(state=REVIEW, note=note, review=shown)

    def _decide(self) -> None:
        """Act on the operator's decision, or on the end of an episode."""
        decision, self._decision = self._decision, ""
        note = "" if decision else self._fault
        self._waiting = not self.options.practice
        if decision in ("accept", "accept_anyway"):
            rejected = self._verdict is not None and not self._verdict["accepted"]
            if decision == "accept" and rejected:
                self.board.post(note="not accepted: look at the differences, then try again or accept anyway")
                return
            self._keep(overridden=rejected)
            self._seed += 1
            note = self.board.snapshot.note
        elif decision == "stop":
            raise SessionEnd
        else:
            self._store.discard()
        if decision == "next":
            self._seed += 1
        again = decision in ("record", "rerecord")
        self._state = RECORDING if again else READY
        self._waiting = self._waiting and not again
        # Nothing is ready, nor recorded, before the scene is: what is pressed until then would be forgotten.
        self._enter(state=READY if self._waiting else PREPARING, review=None, note=note, seed=self._seed)

    def _keep(self, *, overridden: bool) -> None:
        # Accepting says that the goal was reached, not that what broke the take off did not happen.
        success = not self._fault and (self._success or self.options.judge == "operator")
        failure = "" if success else (self._fault or "not_reached")
        kept, message = self._store.keep(success=success, failure=failure, overridden=overridden)
        self.board.episodes = self._store.episodes()
        self.board.post(kept=self.board.snapshot.kept + kept, note=message, alarm=self._alarm)

    def _wait_for_decision(self) -> None:
        while not self._decision:
            self._idle()
            self._stopped()

    def _idle(self) -> None:
        self._hub.wait(time.monotonic_ns() + round(IDLE_POST_S * 1e9), lambda changed: changed)
        self._hub.interrupt()
        self._show()

    def _read_settings(self) -> None:
        changed = self._page.settings()
        self._operator = changed.get("operator") or self._operator
        self._next_move = bool(changed.get("move", self._next_move)) and self._set_motion is not None

    # ---- what the rollout tells

    def on_reset(self, slot: int, episode: int, seed: int, observation: Observation, info: dict[str, Any]) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        self._begun, self._hint = False, ""
        self.latest = observation, info
        self._show_scene(observation)
        self._enter(state=self._state, instruction=str(info.get("instruction", "")), note=self._remark())

    def on_step(self, step: Step) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        if "executed_action" in step.info:  # the environment let the action be corrected while it was executed
            step = dataclasses.replace(step, action=step.info["executed_action"])
        # A take begins with its first motion: waiting for a hand to reach the controls demonstrates nothing.
        if not self._begun and (step.action[0, :6].any() or step.action[0, 6] < 0):
            self._begun, self._hint = True, ""
            if self._state == RECORDING:
                self._store.on_reset(0, 0, self._seed, *self.latest)
        self._success = self._success or bool(step.info.get("success", [False])[0])
        if self._begun:
            self._steps += 1
            if self._state == RECORDING:
                self._record(step)
            if self._steps >= self.options.longest_steps:
                self._decision = self._decision or ("finish" if self._state == RECORDING else "reset")
        observation = {key: value[0] for key, value in step.next_observation.items()}
        self.latest = observation, index_info(step.info, 0)
        self._show_scene(observation)
        self._show(note=str(step.info.get("robot_fault", [""])[0]) or self._remark(self._hint))

    def _record(self, step: Step) -> None:
        self._store.on_step(step)
        if self._coach is not None:
            before = {key: value[0] for key, value in step.observation.items()}
            self._gauge = self._consult(self._coach.step, before, step.action[0])

    def _consult(self, ask: Callable[..., float | None], *arguments: Any) -> float | None:
        """Ask the coach something; if it fails, this take goes on without it. A person's take is worth more."""
        try:
            answer = ask(*arguments)
            if answer is not None and not math.isfinite(answer):
                raise ValueError(f"its answer is {answer}")
        except Exception as error:
            _log.exception("the coach failed")
            self._coach_problem = f"no verdict on this take, the coach failed: {error or type(error).__name__}"
            self._coach = None
            return None
        return None if answer is None else float(answer)

    def _rescue(self) -> str:
        reached = self._success if self.options.judge == "simulation" else None
        rescued = self._store.rescue(finished=self._state == REVIEW, goal_reached=reached)
        self.board.episodes = self._store.episodes()
        return rescued

    @property
    def _fault(self) -> str:
        """Why the take ended by itself, as by a sensor that fell silent; empty if it did not."""
        failure = self._result.failure if self._result is not None else ""
        return "" if failure == "timeout" else failure

    @property
    def _alarm(self) -> str:
        return self._store.alarm or self._coach_problem

    def _remark(self, note: str = "") -> str:
        """``note``, and that nobody judges such takes although somebody judges others."""
        return "; ".join(text for text in (note, self._unjudged.get(self._move, "")) if text)

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """See :class:`~simtoreal.envs.rollout.Listener`."""
        self._result, self._success = result, result.success

    def _show_scene(self, observation: Observation) -> None:
        if self._view is not None:
            self._view()
            return
        images = {key.removesuffix("_image"): value for key, value in observation.items() if key.endswith("_image")}
        self.board.post_frames(images)

    def _show(self, **changes: Any) -> None:
        self._read_settings()
        counters: dict[str, float] = {"lost_devices": self._hub.losses, "rejected_messages": self._page.rejected}
        counters["stale_inputs"] = self._page.stale
        counters |= {**self._store.counters(), **self._counters()}
        if self._pace is not None:
            counters["missed_periods"] = self._pace.missed
        self.board.post(
            operator=self._operator, move=self._next_move if self._set_motion else None, active=self._hub.active,
            needs_release=self._hub.needs_release, steps=self._steps, seconds=self._steps * self.options.period_s,
            success=self._success, gripper_open=self._hub.gripper > 0, gauge=self._gauge, counters=counters,
            alarm=self._alarm, task=self.options.task, live=not self._waiting, **changes,
        )  # fmt: skip
