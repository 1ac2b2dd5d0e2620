"""Demonstrate a task by hand: drive the arm from a page in the browser and collect takes into a dataset."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simtoreal.envs.errors import ConfigError

if TYPE_CHECKING:
    import gymnasium as gym

    from simtoreal.data_collection.teleop_loop import TeleopSession
    from simtoreal.data_collection.teleop_page import PageDevice
    from simtoreal.data_collection.teleop_server import TeleopServer
    from simtoreal.envs.embodiment import Embodiment
    from simtoreal.envs.task import TaskSpec

# Seconds after which another Python thread gets its turn. With the default of 5 ms an operator's message would wait
# that long whenever the control loop computes.
SWITCH_INTERVAL_S = 0.0005
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Open the printed address in a browser on this machine. Ctrl-C, or Escape on the page, ends the session; only
    takes that you discard are lost, a running one is stored as aborted. The same command continues the dataset."""

    task: str = "pick_place"
    """Task name or yaml file."""
    output: Path = Path("outputs/teleop")
    """Dataset folder; created, or continued if it holds data of the same robot."""
    backend: Literal["sim", "ros"] = "sim"
    """sim: the simulation, in real time, inside this process. ros: a robot on the ROS 2 graph, behind the gate."""
    robot: Literal["twin", "ros"] = "twin"
    """With --backend ros. twin: start the simulated robot too, in a ROS domain of its own. ros: a robot that is already
    on the graph, with a publisher of the emergency stop topic; the page asks you to arrange the scene."""
    operator: str = "operator"
    """Your name, stored with every episode; can be changed on the page."""
    device: str = ""
    """Another input device besides the page: keyboard (this terminal), spacemouse, or one of an installed package."""
    port: int = 8765
    """Port of the page on this machine; 0 chooses a free one."""
    seed: int = 0
    """First initial condition; a dataset is continued after its last one."""
    seconds: float = 120.0
    """Longest take, from its first motion on."""
    image_size: int = 64
    """Height and width of the recorded images in pixels."""
    view_size: int = 256
    """With --backend sim: height in pixels at which the page shows the cameras; 0 shows the recorded images."""
    motion: str = "move"
    """How the scene moves when the page's MOVE switch is on: a name or a yaml file (see simtoreal collect)."""
    move: bool = False
    """Begin with the MOVE switch on."""
    randomization: Literal["none", "training", "standard", "hard"] = "none"
    """With --backend sim: variation of masses, friction, gains, latency, colours, lights and cameras."""
    gap: Literal["none", "standard", "hard"] = "none"
    """With --backend ros --robot twin: how far the twin differs from the simulation."""
    topics: str = "panda_ros2"
    """With --backend ros: topics of the robot, a preset of configs/robot or the path of a yaml file."""
    coach: Path | None = None
    """Dataset of earlier demonstrations that takes should be compatible with; shows the gauge."""
    encoder: Path | None = None
    """Training run whose image encoder the coach uses; default: it compares states."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}, expected 0 to 65535")
        if self.seed < 0 or self.image_size < 8 or self.view_size < 0:
            raise ConfigError("--seed and --view-size must not be negative, and --image-size at least 8")
        if not self.seconds > 0:
            raise ConfigError(f"--seconds is {self.seconds}, expected more than 0")
        if self.encoder is not None and self.coach is None:
            raise ConfigError("--encoder belongs to --coach: give the dataset to be compatible with")
        if not self.operator.strip():
            raise ConfigError("--operator is empty; give a name")
        # Who names a robot must not move a simulation and believe it is the robot.
        if self.backend == "sim" and (self.robot != "twin" or self.gap != "none" or self.topics != "panda_ros2"):
            raise ConfigError("--robot, --gap and --topics belong to --backend ros; this would open the simulation")
        if self.backend == "ros" and self.randomization != "none":
            raise ConfigError("--randomization belongs to --backend sim; the twin differs by --gap")
        if self.robot == "ros" and self.gap != "none":
            raise ConfigError("--gap belongs to --robot twin; a real robot differs by itself")


@dataclass(frozen=True, kw_only=True)
class Collection:
    """An open session."""

    session: TeleopSession
    server: TeleopServer
    page: PageDevice
    embodiment: Embodiment
    task: TaskSpec
    """The task as it runs, without a horizon: the session ends takes."""


@dataclass(frozen=True, kw_only=True)
class _Backend:
    """What the session needs of simulation or robot."""

    env: gym.Env[Any, Any]
    paced: bool
    """Whether the session keeps the time (simulation)."""
    judge: Literal["simulation", "operator"] = "simulation"
    set_motion: Callable[[Any], None] | None = None
    view: Callable[[], None] | None = None
    counters: Callable[[], dict[str, float]] = dict


def main(config: Config) -> None:
    """Serve the page and run takes until the operator stops."""
    from rich.console import Console

    from simtoreal.robot.deployment import deaf_to_signals, interruptible

    console = Console(markup=False)
    with interruptible(), deaf_to_signals() as leaving, open_collection(config, leaving) as collection:
        console.print(
            f"Teleoperation of {config.task}: open\n  {collection.server.url}\nin a browser on this machine "
            "(the address is the key: whoever has it moves the arm). Ctrl-C ends the session.",
            highlight=False,
            soft_wrap=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            collection.session.run()
        kept, stored = collection.session.board.snapshot.kept, len(collection.session.board.episodes)
        note = collection.session.board.snapshot.note
    console.print(
        f"Collected {kept} episodes of {config.task} in {config.output} ({stored} in all); {note}", highlight=False
    )


@contextlib.contextmanager
def open_collection(config: Config, leaving: Callable[[], None] = lambda: None) -> Iterator[Collection]:
    """Open dataset, robot and page; ``session.run()`` then runs the takes in the calling thread.

    Args:
        config: the flags.
        leaving: called first when the context is left, before the arm is brought to rest.
    """
    import dataclasses
    import sys

    from simtoreal.data_collection.teleop_device import open_device
    from simtoreal.data_collection.teleop_hub import InputHub
    from simtoreal.data_collection.teleop_loop import SessionOptions, TeleopSession
    from simtoreal.data_collection.teleop_pace import RealTimePace
    from simtoreal.data_collection.teleop_page import PageDevice
    from simtoreal.data_collection.teleop_session import Board
    from simtoreal.data_collection.teleop_take import TakeStore
    from simtoreal.data_collection.writer import DatasetWriter, require_dataset_folder
    from simtoreal.envs import load_task, panda_embodiment
    from simtoreal.envs.errors import require
    from simtoreal.envs.scene_motion import load_motion

    require("aiohttp", "web")
    from simtoreal.data_collection.teleop_server import TeleopServer

    require_dataset_folder(config.output)
    written = load_task(Path(config.task) if config.task.endswith((".yaml", ".yml")) else config.task)
    embodiment = panda_embodiment(config.image_size)
    if config.backend == "ros":
        from simtoreal.robot.topics import load_robot_config

        # Before there is a dataset, a twin or a gate.
        load_robot_config(config.topics).require_fits(embodiment, config.topics)
    # A take begins with its first motion, which only the session knows of.
    task = dataclasses.replace(written, horizon=sys.maxsize)
    motion = load_motion(config.motion)
    reference, coaches, missing = _coaches(config, embodiment, written.name)
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, before)
        writer = stack.enter_context(DatasetWriter(config.output, embodiment, {written.name: written.to_dict()}))
        board = Board()
        page = PageDevice(board)
        others = [open_device(config.device)] if config.device else []
        hub = InputHub([*others, page], embodiment)
        stack.callback(hub.close)
        sessions: list[TeleopSession] = []  # which needs the backend that needs it
        backend = _open_backend(config, task, embodiment, hub, page, board, sessions, stack)
        movable = _movable(backend, motion)
        if config.move and not movable:
            raise ConfigError(f"--move: nothing of task '{written.name}' moves with --motion {config.motion} here")
        store = TakeStore(
            writer, task=written.name, embodiment=embodiment, reference=reference, motion=motion.to_dict()
        )
        options = SessionOptions(
            task=written.name,
            first_seed=_first_seed(config, store.seeds),
            judge=backend.judge,
            practice=backend.judge == "simulation",
            period_s=embodiment.control_period_s,
            longest_steps=max(1, round(config.seconds * embodiment.control_hz)),
            operator=config.operator.strip(),
            move=config.move,
        )
        unjudged = {move: text for move, text in missing.items() if movable or not move}
        for text in unjudged.values():
            _log.warning("%s", text)
        session = TeleopSession(
            options, backend.env, hub, page, store, board, coaches=coaches, unjudged=unjudged,
            pace=RealTimePace(embodiment.control_period_s) if backend.paced else None,
            set_motion=(lambda move: backend.set_motion(motion if move else None)) if movable else None,
            view=backend.view, counters=backend.counters,
        )  # fmt: skip
        sessions.append(session)
        server = TeleopServer(board, page, config.output, port=config.port)
        stack.callback(server.close)
        stack.callback(leaving)
        yield Collection(session=session, server=server, page=page, embodiment=embodiment, task=task)


def _first_seed(config: Config, used: list[int]) -> int:
    later = [seed for seed in used if seed >= config.seed]
    return max(later) + 1 if later else config.seed


def _movable(backend: _Backend, motion: Any) -> bool:
    """Whether the scene can move: there is a simulation or a twin, and the task marks something that may."""
    if backend.set_motion is None or not motion.active:
        return False
    try:
        backend.set_motion(motion)
    except ConfigError:
        return False
    backend.set_motion(None)
    return True


def _coaches(config: Config, embodiment: Embodiment, task: str) -> tuple[Any, dict[bool, Any], dict[bool, str]]:
    """Return the reference dataset, its coaches for a scene at rest (False) and in motion (True), and why one lacks."""
    if config.coach is None:
        return None, {}, {}
    from rich.console import Console

    from simtoreal.data_collection.compatibility import MOVING, STATIC
    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.envs.errors import DatasetError
    from simtoreal.policies.compatibility_coach import CompatibilityCoach
    from simtoreal.policies.compatibility_scorer import require_same_task

    reference = Dataset.open(config.coach, embodiment=embodiment)
    require_same_task(reference, [task], "the session")
    # On the robot there is no scene truth to compare.
    keys = ("proprio",) if config.backend == "ros" and config.encoder is None else ()
    coaches: dict[bool, Any] = {}
    missing: dict[bool, str] = {}
    problem: DatasetError | None = None
    with Console(markup=False).status("training the coach, or reading it"):
        for move, mode in ((False, STATIC), (True, MOVING)):
            try:
                coaches[move] = CompatibilityCoach.open(config.coach, encoder=config.encoder, keys=keys, mode=mode)
            except DatasetError as error:  # the base data need not have both
                problem = error
                missing[move] = f"takes with the scene {'in motion' if move else 'at rest'} are not judged: {error}"
    if not coaches and problem is not None:
        raise problem
    return reference, coaches, missing


def _open_backend(
    config: Config, task: TaskSpec, embodiment: Embodiment, hub: Any, page: Any, board: Any,
    sessions: list[TeleopSession], stack: contextlib.ExitStack,
) -> _Backend:  # fmt: skip
    if config.backend == "sim":
        from simtoreal.data_collection.teleop_view import EnlargedView
        from simtoreal.envs.tabletop import TabletopEnv

        randomization = None if config.randomization == "none" else config.randomization
        env = TabletopEnv(task, embodiment=embodiment, randomization=randomization, record_state=True)
        stack.callback(env.close)
        if not config.view_size:
            return _Backend(env=env, paced=True, set_motion=env.set_motion)
        view = EnlargedView(env, config.view_size, board)
        stack.callback(view.close)
        return _Backend(env=env, paced=True, set_motion=env.set_motion, view=view.show)
    return _open_robot(config, task, embodiment, hub, page, sessions, stack)


def _open_robot(
    config: Config, task: TaskSpec, embodiment: Embodiment, hub: Any, page: Any,
    sessions: list[TeleopSession], stack: contextlib.ExitStack,
) -> _Backend:  # fmt: skip
    from simtoreal.robot.deployment import CONTROL_PRIORITY, guarded_robot, join_graph
    from simtoreal.robot.teleop_env import TeleopRos2Env
    from simtoreal.robot.timing import realtime
    from simtoreal.robot.topics import load_robot_config

    join_graph(config.robot)
    robot = load_robot_config(config.topics)
    twin = config.robot == "twin"
    guarded = stack.enter_context(
        guarded_robot(
            robot, embodiment, twin=twin, task=config.task, topics=config.topics, gap=config.gap, seed=config.seed,
            folder=config.output,
        )
    )  # fmt: skip
    # From here on, this thread and those of ROS: see simtoreal/commands/deploy.py.
    stack.enter_context(realtime(CONTROL_PRIORITY))
    env = TeleopRos2Env(
        task,
        embodiment=embodiment,
        config=robot,
        gate=guarded.targets,
        operator=None if twin else lambda text: sessions[0].ask(text),
        check_robot=guarded.check,
        check_operator=lambda: sessions[0].check_operator(),
        hub=hub,
        commanded=page.commanded,
    )
    stack.callback(env.close)
    stack.callback(guarded.gate.close)
    return _Backend(
        env=env,
        paced=False,
        judge="simulation" if twin else "operator",
        set_motion=env.set_motion if twin else None,
        counters=lambda: {"missed_periods": env.clock.missed},
    )
