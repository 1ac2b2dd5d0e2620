"""Run a policy on a robot, or on its twin, over ROS 2 and behind the safety gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simtoreal.envs.errors import ConfigError

if TYPE_CHECKING:
    from simtoreal.envs.embodiment import Embodiment
    from simtoreal.envs.task import TaskSpec
    from simtoreal.evaluation.progress import EpisodeProgress
    from simtoreal.robot.inference import InferenceProcess
    from simtoreal.robot.recording import RunRecorder
    from simtoreal.robot.topics import RobotConfig

DEFAULT_GAP = "standard"
# In the folder of a deployment: the task that the policy was trained on.
TASK_FILE = "task.yaml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Ctrl-C stops the robot in a controlled way. An interrupted deployment continues when it is run again."""

    output: Path = Path("outputs/deploy")
    """Folder for episodes.jsonl, results.json, videos and logs."""
    policy: Path | None = None
    """Training run or checkpoint folder; not needed for the expert."""
    task: str | None = None
    """Task name or yaml file; default: the task the policy was trained on, as it was then."""
    actor: Literal["policy", "expert"] = "policy"
    """Who acts: the policy, or the scripted expert, which reads the twin's truth (a test of the robot side)."""
    robot: Literal["twin", "ros"] = "twin"
    """twin: start the simulated robot too, in a ROS domain of its own, so that it never meets a real arm (only a domain
    exported together with ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST is used as it is). ros: a robot that is already on
    the ROS 2 graph, in the domain of the environment, with a publisher of the emergency stop topic; a person at the
    terminal arranges the scene before every episode and judges it afterwards."""
    gap: Literal["none", "standard", "hard"] | None = None
    """How far the twin differs from the training simulator, unknown to policy and runtime; default: standard."""
    episodes: int = 20
    """Number of initial conditions."""
    seed: int = 200_000
    """First initial condition; the others follow. Demonstrations use seeds from 0, evaluations from 100000."""
    policy_seed: int = 0
    """Seed of the actor's own randomness."""
    topics: str = "panda_ros2"
    """Topics of the robot: a preset of configs/robot or the path of a yaml file."""
    videos: int = 3
    """Videos of successes, and of failures, as the robot's cameras see them."""
    image_size: int = 64
    """Height and width of the camera images in pixels, for the expert; a policy brings its own."""
    record: bool = True
    """Record all topics to run-<number>.mcap (simtoreal data import turns it into a dataset)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy runs; auto uses a GPU if there is one."""
    threads: int = 0
    """Threads of the inference process; 0: half of the cores, so that the control loop keeps the others."""

    def __post_init__(self) -> None:
        for name in ("episodes", "image_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if min(self.seed, self.policy_seed, self.videos, self.threads) < 0:
            raise ConfigError("--seed, --policy-seed, --videos and --threads must not be negative")
        if self.actor == "policy" and self.policy is None:
            raise ConfigError("--policy is missing: give the folder of a training run, or use --actor expert")
        if self.actor == "expert" and (self.policy is not None or self.task is None or self.robot != "twin"):
            raise ConfigError("--actor expert needs --task and --robot twin (whose truth it reads), and no --policy")
        if self.robot == "ros" and self.gap is not None:
            raise ConfigError("--gap belongs to --robot twin; a real robot differs by itself")


def main(config: Config) -> None:
    """Deploy, write the results and print them."""
    from rich.console import Console

    from simtoreal.robot.deployment import interruptible, join_graph

    console = Console(markup=False)
    join_graph(config.robot)
    with interruptible():
        try:
            results = _deploy(config, console)
        except KeyboardInterrupt:
            console.print("interrupted: the robot was brought to rest; the same command continues")
            raise
    from simtoreal.evaluation.statistics import format_rate

    console.print(
        f"  control loop: {results['missed_periods']} missed of {results['periods']} periods, error p99 "
        f"{results['p99_period_error_ms']:.2f} ms; targets published at {results['gate']['publish_hz']:.0f} Hz"
        + (f"; inference p99 {results['inference_p99_ms']:.0f} ms" if "inference_p99_ms" in results else ""),
        highlight=False,
        soft_wrap=True,
    )
    for note in results["notes"]:
        console.print(f"  note: {note}", style="yellow", highlight=False, soft_wrap=True)
    for tag, count in results["failures"].items():
        console.print(f"  failed by {tag}: {count}", highlight=False, soft_wrap=True)
    where = f"the '{results['gap']}' twin" if results["backend"] == "twin" else "the robot"
    console.print(
        f"Result: {results['label']} on {results['task']}, {where}: success "
        f"{format_rate(results['successes'], results['n'])}; written to {config.output}",
        highlight=False,
        soft_wrap=True,
    )


def _deploy(config: Config, console: Any) -> dict[str, Any]:
    import contextlib
    import functools
    import os

    from simtoreal.envs import load_task, panda_embodiment
    from simtoreal.envs.files import write_json
    from simtoreal.evaluation.evaluate import check_unseen, evaluate
    from simtoreal.evaluation.progress import EpisodeProgress
    from simtoreal.evaluation.results import RESULTS_FILE, read_episodes
    from simtoreal.robot.async_actor import AsyncPolicyActor
    from simtoreal.robot.deployment import (
        CONTROL_PRIORITY,
        GroupedFaults,
        JudgedByOperator,
        control_results,
        deaf_to_signals,
        guarded_robot,
        twin_results,
    )
    from simtoreal.robot.inference import InferenceProcess
    from simtoreal.robot.recording import RunRecorder
    from simtoreal.robot.ros2_env import Ros2Env
    from simtoreal.robot.timing import realtime
    from simtoreal.robot.topics import load_robot_config

    seeds = range(config.seed, config.seed + config.episodes)
    robot = load_robot_config(config.topics)
    twin = config.robot == "twin"
    inference: InferenceProcess | None = None
    # Left in the opposite order: the recorder, then the arm comes to rest, and only then everything else ends.
    with deaf_to_signals() as leaving, contextlib.ExitStack() as stack:
        if config.policy is not None:
            threads = config.threads or max(1, (os.cpu_count() or 2) // 2)
            inference = InferenceProcess(config.policy, seed=config.policy_seed, device=config.device, threads=threads)
            stack.callback(inference.close)
            check_unseen(seeds, inference.description.training_seeds)
            embodiment = inference.description.embodiment
        else:
            embodiment = panda_embodiment(config.image_size)
        robot.require_fits(embodiment, config.topics)
        task = load_task(config.task) if config.task else _trained_task(inference, config)
        settings = _settings(config, task, robot, inference)
        done = _finished(config, settings, seeds)
        if done is not None:
            return done
        guarded = stack.enter_context(
            guarded_robot(
                robot, embodiment, twin=twin, task=config.task or _store_task(task, config.output),
                topics=config.topics, gap=config.gap or DEFAULT_GAP, seed=config.seed, folder=config.output,
            )
        )  # fmt: skip
        gate = guarded.gate
        if inference is not None:
            gate.watch(inference.pid)
        actor, listeners = _actor(config, task, embodiment, inference)
        recorder: RunRecorder | None = None
        if config.record:
            recorder = RunRecorder(
                _next_recording(config.output),
                robot,
                embodiment=embodiment,
                task=task.to_dict(),
                source="twin" if twin else "robot",
                operator=settings["label"],
            )
            listeners.append(stack.enter_context(recorder))
        # From here on: this thread and all that are started below (ROS, progress bar). One that is not preferred
        # could be suspended while it holds the interpreter's lock, and the control loop would wait for it.
        granted = stack.enter_context(realtime(CONTROL_PRIORITY))
        known = [result.success for result in read_episodes(config.output) if result.seed in seeds]
        title = f"{settings['label']} on the {config.robot}"
        progress = stack.enter_context(EpisodeProgress(console, title, config.episodes, known))
        listeners.append(progress)
        env = Ros2Env(
            task,
            embodiment=embodiment,
            config=robot,
            gate=guarded.targets,
            operator=None if twin else functools.partial(_ask_person, progress),
            check_robot=guarded.check,
            observe_truth=config.actor == "expert",
        )
        stack.callback(env.close)
        stack.callback(gate.close)
        stack.callback(leaving)
        faults = GroupedFaults(env, gate)
        results = evaluate(
            faults if twin else JudgedByOperator(faults, functools.partial(_ask_for_success, progress, recorder)),
            actor,
            seeds,
            config.output,
            settings,
            videos=config.videos,
            listeners=listeners,
        )
        status = gate.close()
        statistics = actor.statistics() if isinstance(actor, AsyncPolicyActor) else {}
        results.update(
            control_results(env.clock.summary(), status, statistics, realtime=granted, faults=faults.details)
        )
        if known:
            results["notes"].append(f"control loop and inference: only the last {len(seeds) - len(known)} episodes")
        if twin:
            skipped, notes = twin_results(env.twin_skipped_s)
            results.update(skipped, notes=results["notes"] + notes)
        write_json(config.output / RESULTS_FILE, results)
    return results


def _finished(config: Config, settings: dict[str, Any], seeds: range) -> dict[str, Any] | None:
    """Return the stored results if every episode has been run with the same settings already."""
    from simtoreal.evaluation.evaluate import check_settings
    from simtoreal.evaluation.results import RESULTS_FILE, load_evaluation, read_episodes

    check_settings(config.output, settings)
    if {result.seed for result in read_episodes(config.output)} != set(seeds):
        return None
    if not (config.output / RESULTS_FILE).is_file():
        return None
    results = load_evaluation(config.output).results
    return results if "missed_periods" in results else None


def _next_recording(folder: Path) -> Path:
    """A recording is never overwritten; a deployment that is continued makes another."""
    number = 0
    while (path := folder / f"run-{number:03d}.mcap").exists():
        number += 1
    return path


def _trained_task(inference: InferenceProcess | None, config: Config) -> TaskSpec:
    from simtoreal.envs.task_file import parse_task

    if inference is None or not inference.description.task:
        raise ConfigError(f"{config.policy} was trained on several tasks; say which one with --task")
    return parse_task(inference.description.task, source=str(config.policy))


def _store_task(task: TaskSpec, folder: Path) -> str:
    """Write the task for the twin, which is another process and takes names and files; return the path."""
    import yaml

    from simtoreal.envs.files import atomic_path, explained_disk_errors

    path = folder / TASK_FILE
    with explained_disk_errors(path, ConfigError, "Choose another --output."), atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(task.to_dict(), sort_keys=False), encoding="utf-8")
    return str(path)


def _actor(
    config: Config, task: TaskSpec, embodiment: Embodiment, inference: InferenceProcess | None
) -> tuple[Any, list[Any]]:
    """Return the actor, and the listeners that it needs."""
    if inference is None:
        from simtoreal.data_collection.expert import ScriptedExpert

        return ScriptedExpert(task, embodiment, seed=config.policy_seed), []
    from simtoreal.robot.async_actor import AsyncPolicyActor

    actor = AsyncPolicyActor(inference, embodiment)
    return actor, [actor]


def _settings(config: Config, task: TaskSpec, robot: RobotConfig, inference: InferenceProcess | None) -> dict[str, Any]:
    """What decides the outcome; an interrupted deployment is only continued with the same settings."""
    import dataclasses
    import hashlib
    import json

    from simtoreal.evaluation.evaluate import task_digest

    described = json.dumps(dataclasses.asdict(robot), sort_keys=True)
    return {
        "task": task.name,
        "label": inference.description.type if inference else "expert",
        "policy": str(config.policy) if config.policy else None,
        "checkpoint": inference.description.digest if inference else None,
        "horizon": task.horizon,
        "backend": "twin" if config.robot == "twin" else "robot",
        "gap": (config.gap or DEFAULT_GAP) if config.robot == "twin" else None,
        "actor": config.actor,
        "first_seed": config.seed,
        "policy_seed": config.policy_seed,
        "topics": config.topics,
        # Files of the same name may describe another task, another robot, or other limits, by now.
        "task_digest": task_digest(task),
        "robot_digest": hashlib.sha256(described.encode()).hexdigest()[:16],
    }


def _ask(progress: EpisodeProgress, question: str) -> str:
    import sys
    import termios

    try:
        with progress.paused():
            if sys.stdin.isatty():
                # What was typed while the robot moved answers no question that had not been asked yet.
                termios.tcflush(sys.stdin, termios.TCIFLUSH)
            return input(question).strip().lower()
    except EOFError as error:
        raise ConfigError(
            "--robot ros needs a person at the terminal, who arranges and judges every episode"
        ) from error


def _ask_person(progress: EpisodeProgress, text: str) -> None:
    _ask(progress, f"{text} Press Enter: ")


def _ask_for_success(progress: EpisodeProgress, recorder: RunRecorder | None) -> bool:
    if recorder is not None:
        # The time that a person takes to judge belongs to no episode.
        recorder.mark("over")
    while (answer := _ask(progress, "Did the robot succeed? [y/n] ")) not in ("y", "n", "yes", "no"):
        continue
    return answer.startswith("y")
