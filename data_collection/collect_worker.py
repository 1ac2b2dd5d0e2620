"""The process that runs the episodes of a collection and leaves the finished ones in its staging folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from simtoreal.data_collection.episode import Arrays, EpisodeInfo, write_episode
from simtoreal.data_collection.ledger import Outcome, staged_path
from simtoreal.data_collection.recorder import Recorder
from simtoreal.data_collection.takes import MemoryTake
from simtoreal.envs.errors import SimtorealError
from simtoreal.envs.rollout import TASK_FAILED, EpisodeResult, Listener, rollout

if TYPE_CHECKING:
    from simtoreal.data_collection.collect import CollectionPlan, Setup

TIMEOUT = "timeout"


class _Reporter(Listener):
    """Tells the main process about every finished episode; must come after the recorder, whose file it announces."""

    def __init__(self, connection: Connection, plan: CollectionPlan) -> None:
        self._connection, self._plan = connection, plan

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        outcome = Outcome(
            seed=result.seed,
            success=result.success,
            failure=result.failure,
            steps=result.steps,
            stored=kept(result, self._plan),
        )
        self._connection.send(("outcome", outcome))


def kept(result: EpisodeResult, plan: CollectionPlan) -> bool:
    """Whether the episode is stored. A failed simulation is never: its states are not those of the task."""
    return result.success or (plan.keep_failures and result.failure in (TIMEOUT, TASK_FAILED))


def run_worker(connection: Connection, plan: CollectionPlan, setup: Setup) -> None:
    """Build the environment, then run the lists of seeds that arrive, until None arrives or the parent is gone.

    Messages sent: ``("ready", {"embodiment", "tasks"})``, ``("outcome", Outcome)``, ``("outcome", None)`` when a
    list is done, ``("error", (class name, text))``.
    """
    # Ctrl-C reaches the whole process group; the main process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        _serve(connection, plan, setup)
    except SimtorealError as error:
        connection.send(("error", (type(error).__name__, str(error))))
    except (BrokenPipeError, EOFError):
        os._exit(1)
    except Exception:
        connection.send(("error", ("SimtorealError", f"a collection process failed:\n{traceback.format_exc()}")))


def _serve(connection: Connection, plan: CollectionPlan, setup: Setup) -> None:
    env, actor = setup(plan)
    task: Any = getattr(env, "task", None)
    name, content = (task.name, task.to_dict()) if task is not None else (plan.task, {})
    connection.send(("ready", {"embodiment": env.embodiment.to_dict(), "tasks": {name: content}}))

    def stage(arrays: Arrays, info: EpisodeInfo) -> None:
        write_episode(staged_path(plan.output, info.seed), arrays, info)

    recorder = Recorder(
        lambda info: MemoryTake(stage),
        task=name,
        embodiment=env.embodiment,
        source="expert",
        operator=plan.style.name,
        keep=lambda result: kept(result, plan),
        extra={
            "style": asdict(plan.style),
            # Only episodes in which something moves: cameras that differ between episodes are a static scene.
            **({"motion": plan.motion.to_dict()} if plan.motion.active else {}),
        },
    )
    listeners = [recorder, _Reporter(connection, plan)]
    try:
        while (seeds := connection.recv()) is not None:
            # A message during the rollout can only be the request to end.
            rollout(env, actor, seeds, listeners=listeners, stop=connection.poll)
            recorder.discard()
            connection.send(("outcome", None))
    finally:
        env.close()


def _exit_with_parent() -> None:
    """End this process when the main one was killed, so that nothing keeps computing or writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
