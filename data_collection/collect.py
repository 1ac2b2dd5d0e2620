"""Collects demonstrations with several processes: reproducible, and continued where it was interrupted."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from simtoreal.data_collection.collect_worker import run_worker
from simtoreal.data_collection.dataset import META, read_meta
from simtoreal.data_collection.ledger import LOG, SEEDS_PER_COLLECTION, Ledger, Outcome
from simtoreal.data_collection.operator_style import OperatorStyle
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import errors
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, DatasetError, SimtorealError, TaskError
from simtoreal.envs.rollout import Actor
from simtoreal.envs.scene_motion import SceneMotion
from simtoreal.envs.task_file import load_task

# Give up on an expert that evidently cannot do the task: after this many tries, below this rate.
_PATIENCE_TRIES, _HOPELESS_RATE = 64, 0.05
# The seeds of its initial conditions still fit into 64 bits.
LARGEST_SEED = 2**63 // SEEDS_PER_COLLECTION - 1
# Pixels; larger pictures of all simulations of a process do not fit into memory.
LARGEST_IMAGE = 2048


@dataclass(frozen=True, kw_only=True)
class CollectionPlan:
    """What to collect. All but ``workers`` and ``num_envs`` decides which episodes result.

    Attributes:
        output: dataset folder.
        task: registered task or yaml file.
        episodes: successful episodes wanted; None if ``steps`` decides.
        steps: budget of control steps, spent by every attempt; None if ``episodes`` decides.
        seed: collections of different seeds have disjoint initial conditions.
        image_size: pixels.
        style: how the expert moves.
        randomization: domain randomisation of the simulation, None for none.
        motion: how the scene moves while the expert demonstrates.
        cameras: cameras of the embodiment.
        keep_failures: also store the episodes that ran out of time before the last success that counts.
        workers: processes.
        num_envs: environments per process.
    """

    output: Path
    task: str
    episodes: int | None = None
    steps: int | None = None
    seed: int = 0
    image_size: int = 64
    style: OperatorStyle = field(default_factory=OperatorStyle)
    randomization: str | None = None
    motion: SceneMotion = field(default_factory=SceneMotion)
    cameras: tuple[str, ...] = ("front", "wrist")
    keep_failures: bool = False
    workers: int = 2
    num_envs: int = 16

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "image_size", "workers", "num_envs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1.")
        if (self.episodes is None) == (self.steps is None):
            raise ConfigError("a collection ends after a number of episodes or of steps: give one of the two.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed is {self.seed}; expected 0 to {LARGEST_SEED}.")
        if self.image_size > LARGEST_IMAGE:
            raise ConfigError(f"image_size is {self.image_size}; expected at most {LARGEST_IMAGE}.")
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ConfigError(f"cameras are {', '.join(self.cameras) or 'none'}; expected one or more distinct names.")

    @property
    def first_seed(self) -> int:
        """First candidate seed; it leaves every collection a range of its own."""
        return self.seed * SEEDS_PER_COLLECTION

    def identity(self) -> dict[str, Any]:
        """What must be equal to continue a collection."""
        # As it comes back from JSON, where tuples are lists.
        style = json.loads(json.dumps(asdict(self.style)))
        return {
            "task": self.task, "seed": self.seed, "image_size": self.image_size, "style": style,
            "randomization": self.randomization, "keep_failures": self.keep_failures,
            **({} if self.motion == SceneMotion() else {"motion": self.motion.to_dict()}),
            **({} if self.cameras == ("front", "wrist") else {"cameras": list(self.cameras)}),
        }  # fmt: skip


Setup = Callable[[CollectionPlan], tuple[VectorEnv, Actor]]
"""Builds environment and expert inside a worker; a function of a module, so that it can be sent there."""


@dataclass(frozen=True, kw_only=True)
class CollectionProgress:
    """State of a running collection.

    Attributes:
        episodes: successes that count so far, those before the first seed that is undecided; at most those wanted.
        steps: control steps of the attempts that count so far.
        successes: successful ones of all seeds tried.
        tried: seeds with an outcome.
        session: those of them that were tried by this call.
        seconds: duration of this call's rollouts.
    """

    episodes: int
    steps: int
    successes: int
    tried: int
    session: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CollectionResult:
    """Outcome of a collection.

    Attributes:
        outcomes: of every seed in order, up to the last success that counts.
        session: seeds tried by this call (the rest was there before).
        seconds: duration of this call's rollouts, without starting the processes.
    """

    outcomes: list[Outcome]
    session: int
    seconds: float


def expert_setup(plan: CollectionPlan) -> tuple[VectorEnv, Actor]:
    """The simulated task with the scripted expert."""
    from gymnasium.vector import AutoresetMode

    from simtoreal.data_collection.expert import ScriptedExpert
    from simtoreal.envs import make_vector_env

    env = make_vector_env(
        plan.task,
        plan.num_envs,
        image_size=plan.image_size,
        cameras=plan.cameras,
        randomization=plan.randomization,
        motion=plan.motion,
        autoreset_mode=AutoresetMode.DISABLED,
        record_state=True,
    )
    expert = ScriptedExpert(env.task, env.embodiment, style=plan.style, seed=plan.seed)
    return env, expert


def collect(
    plan: CollectionPlan,
    *,
    setup: Setup = expert_setup,
    on_progress: Callable[[CollectionProgress], None] = lambda progress: None,
) -> CollectionResult:
    """Collect the planned episodes or steps, continuing what the folder already holds.

    Raises:
        ConfigError: the folder holds a collection with other settings.
        DatasetError: the folder is in use or holds episodes of another specification of the task, the disk is full, or
            the expert hardly ever succeeds.
        SimtorealError: a worker failed or died; what is finished stays and the call can be repeated.
    """
    if (done := _finished(plan)) is not None:
        return done
    with _Workers(plan, setup) as workers:
        embodiment, tasks = workers.start()
        with DatasetWriter(plan.output, embodiment, tasks, collection=plan.identity()) as writer:
            ledger = Ledger(writer, plan.first_seed, plan.episodes, plan.steps)
            try:
                session, seconds = _run(plan, ledger, workers, on_progress)
            except BaseException:
                workers.stop()
                # What cannot be committed now stays staged for the next run; the user needs to see the first error.
                with contextlib.suppress(DatasetError, OSError):
                    ledger.close()
                raise
            workers.stop()
            ledger.close()
    return CollectionResult(outcomes=ledger.decided(), session=session, seconds=seconds)


def _run(
    plan: CollectionPlan, ledger: Ledger, workers: _Workers, on_progress: Callable[[CollectionProgress], None]
) -> tuple[int, float]:
    begun, session = time.monotonic(), 0

    def report() -> None:
        on_progress(
            CollectionProgress(
                episodes=ledger.decided_successes,
                steps=ledger.decided_steps,
                successes=ledger.successes,
                tried=ledger.tried,
                session=session,
                seconds=time.monotonic() - begun,
            )
        )

    report()
    while not ledger.complete:
        # With all of them idle nothing would ever report; then at least one seed runs.
        if (idle := workers.idle()) and (want := max(ledger.want(), not workers.busy)) > 0:
            seeds = ledger.assign(want)
            for number, worker in enumerate(idle):
                # Dealt like cards, so that all workers advance through the range together and episodes are committed
                # soon after they are finished.
                if mine := seeds[number :: len(idle)]:
                    workers.give(worker, mine)
        for outcome in workers.outcomes():
            ledger.record(outcome)
            session += 1
            report()
        if ledger.tried >= _PATIENCE_TRIES and ledger.successes < _HOPELESS_RATE * ledger.tried:
            raise DatasetError(
                f"{plan.output}: only {ledger.successes} of {ledger.tried} attempts at '{plan.task}' succeeded. "
                f"Stopped; see {plan.output}/{LOG} for the failures, and look at the task with 'simtoreal view'."
            )
    return session, time.monotonic() - begun


def _finished(plan: CollectionPlan) -> CollectionResult | None:
    """Result of a collection that needs no more episodes, found without starting any process."""
    if not (plan.output / META).exists():
        return None
    meta = read_meta(plan.output)
    _require_same(plan, meta.get("collection"))
    tasks = _present_task(plan)
    if not tasks.keys() <= meta["tasks"].keys():
        raise DatasetError(
            f"{plan.output}: holds episodes of task '{', '.join(meta['tasks'])}', and {plan.task} is of task "
            f"'{next(iter(tasks))}' now. Write to a new folder."
        )
    with DatasetWriter(plan.output, Embodiment.from_dict(meta["embodiment"]), tasks) as writer:
        ledger = Ledger(writer, plan.first_seed, plan.episodes, plan.steps)
        ledger.close()
    return CollectionResult(outcomes=ledger.decided(), session=0, seconds=0.0) if ledger.complete else None


def _present_task(plan: CollectionPlan) -> dict[str, Any]:
    """Name and specification of the task as its file says now; nothing if only the setup knows it, or it is gone."""
    try:
        task = load_task(plan.task)
    except TaskError:
        return {}
    return {task.name: task.to_dict()}


def _require_same(plan: CollectionPlan, earlier: dict[str, Any] | None) -> None:
    if earlier is None:
        raise ConfigError(f"{plan.output}: holds a dataset that was not made by collect. Choose a new folder.")
    wanted = plan.identity()
    keys = {**wanted, **earlier}
    different = [f"{k}: {earlier.get(k)} != {wanted.get(k)}" for k in keys if earlier.get(k) != wanted.get(k)]
    if different:
        listed = "\n  ".join(different)
        raise ConfigError(
            f"{plan.output}: holds a collection with other settings (there != asked for):\n  {listed}\n"
            "Choose a new folder, or ask for the same settings to continue it."
        )


class _Workers:
    """The processes of a collection, and what they are doing."""

    def __init__(self, plan: CollectionPlan, setup: Setup) -> None:
        self.plan, self.setup = plan, setup
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        self.busy: set[Connection] = set()

    def __enter__(self) -> _Workers:
        context = multiprocessing.get_context("spawn")
        with _one_thread_each():
            for number in range(self.plan.workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=run_worker, args=(theirs, self.plan, self.setup), name=f"collect-{number}", daemon=True
                )
                process.start()
                theirs.close()
                self.processes.append(process)
                self.connections.append(ours)
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let every process end after its current step, or kill it."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self.processes, self.connections = [], []

    def start(self) -> tuple[Embodiment, dict[str, Any]]:
        """Wait until every worker has built its environment; return embodiment and tasks."""
        ready = [self._receive(connection) for connection in self.connections]
        return Embodiment.from_dict(ready[0]["embodiment"]), ready[0]["tasks"]

    def idle(self) -> list[Connection]:
        """Workers without seeds."""
        return [connection for connection in self.connections if connection not in self.busy]

    def give(self, connection: Connection, seeds: list[int]) -> None:
        """Let a worker run the episodes of ``seeds``."""
        connection.send(seeds)
        self.busy.add(connection)

    def outcomes(self) -> Iterator[Outcome]:
        """Wait for workers to report and yield the outcomes that arrived."""
        for connection in wait(list(self.busy)):
            message = self._receive(connection)  # type: ignore[arg-type]
            if message is None:
                self.busy.discard(connection)  # type: ignore[arg-type]
            else:
                yield message

    def _receive(self, connection: Connection) -> Any:
        try:
            kind, content = connection.recv()
        except EOFError as error:
            process = self.processes[self.connections.index(connection)]
            process.join(timeout=5)
            raise SimtorealError(
                f"collection process {process.name} died (exit code {process.exitcode}; -9 often means out of "
                "memory: lower --num-envs or --workers). Finished episodes are kept; run the command again to continue."
            ) from error
        if kind == "error":
            name, text = content
            raise getattr(errors, name, SimtorealError)(text)
        return content


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start processes whose libraries use one thread: the processes themselves fill the cores.

    Mesa's software renderer (``LP_NUM_THREADS``) and OpenMP read these variables when they are loaded.
    """
    wanted = {"LP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
