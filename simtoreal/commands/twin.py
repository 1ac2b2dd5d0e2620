"""Run MuJoCo behind the robot's ROS 2 topics, in real time: a stand-in for the arm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simtoreal.envs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The twin runs until Ctrl-C or SIGTERM. Only this machine can reach it unless ROS_AUTOMATIC_DISCOVERY_RANGE says
    otherwise."""

    task: str = "pick_place"
    """Task on the table: a name or the path of a yaml file."""
    gap: Literal["none", "standard", "hard"] = "standard"
    """How far the twin differs from the training simulator; drawn anew per episode."""
    seed: int = 0
    """Initial condition until a runtime asks for another."""
    image_size: int = 64
    """Height and width of the camera images in pixels; those the policy was trained with."""
    cameras: tuple[str, ...] = ("front", "wrist")
    """Cameras to publish."""
    motion: str = "none"
    """How the scene moves once the arm is driven: none, move, views, move_views, or a yaml file."""
    topics: str = "panda_ros2"
    """Topics of the robot: a preset of configs/robot or the path of a yaml file."""

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ConfigError(f"--image-size is {self.image_size}, expected at least 8 pixels")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}, expected 0 or more")


def main(config: Config) -> None:
    """Run the twin until SIGINT or SIGTERM."""
    import os
    import signal
    import threading
    import time

    from rich.console import Console

    from simtoreal.envs import load_task, panda_embodiment
    from simtoreal.robot.topics import load_robot_config
    from simtoreal.robot.twin import Twin

    console = Console(markup=False)
    task = load_task(Path(config.task) if config.task.endswith((".yaml", ".yml")) else config.task)
    embodiment = panda_embodiment(config.image_size, cameras=config.cameras)
    robot = load_robot_config(config.topics)
    twin = Twin(task, embodiment, robot, gap=config.gap, seed=config.seed, motion=config.motion)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    console.print(
        f"twin of {embodiment.name} runs '{task.name}' with gap '{config.gap}' in ROS_DOMAIN_ID "
        f"{os.environ.get('ROS_DOMAIN_ID', '0')} ({os.environ.get('ROS_AUTOMATIC_DISCOVERY_RANGE', 'SUBNET')}); "
        "Ctrl-C stops it",
        soft_wrap=True,
    )
    began, used = time.monotonic(), time.process_time()
    try:
        twin.run(stop)
    finally:
        twin.close()
    seconds = time.monotonic() - began
    share = (time.process_time() - used) / max(seconds, 1e-9)
    console.print(
        f"twin ran {twin.episodes} episodes in {seconds:.1f} s at {100 * share:.0f} % of one core, "
        f"{twin.skipped_s:.2f} s skipped",
        soft_wrap=True,
    )
