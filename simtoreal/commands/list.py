"""List the tasks, robots or policy types that can be named in other commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Config:
    """Names that other flags accept: --task, --policy of train, and --topics of deploy and twin (ROS 2 robots)."""

    kind: tyro.conf.Positional[Literal["tasks", "robots", "policies"]]
    """What to list."""


def main(config: Config) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    rows = {"tasks": _tasks, "robots": _robots, "policies": _policies}[config.kind]()
    header, *body = rows
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, no_wrap=index == 0)
    for row in body:
        table.add_row(*row)
    console = Console(markup=False)
    console.print(table)
    console.print(f"\n{len(body)} {config.kind}")


def _tasks() -> list[tuple[str, ...]]:
    from simtoreal.envs import gym_id, list_tasks, load_task

    rows: list[tuple[str, ...]] = [("task", "what to do", "horizon", "gymnasium id")]
    for name in list_tasks():
        task = load_task(name)
        rows.append((name, task.description, f"{task.horizon} steps", gym_id(name)))
    return rows


def _robots() -> list[tuple[str, ...]]:
    import importlib.resources

    from simtoreal.envs import panda_embodiment
    from simtoreal.robot.topics import load_robot_config

    panda = panda_embodiment()
    cameras = " and ".join(camera.name for camera in panda.cameras)
    what = f"simulated, {panda.control_hz:g} Hz, action {panda.action.mode} ({panda.action.dim}), cameras {cameras}"
    rows: list[tuple[str, ...]] = [("robot", "what it is"), (panda.name, what)]
    for entry in sorted(importlib.resources.files("simtoreal.configs.robot").iterdir(), key=lambda item: item.name):
        if entry.name.endswith("_ros2.yaml"):
            robot = load_robot_config(entry.name.removesuffix(".yaml"))
            command = getattr(robot.topics, robot.command).name
            rows.append((entry.name.removesuffix(".yaml"), f"{robot.robot} on ROS 2, commanded on {command}"))
    return rows


def _policies() -> list[tuple[str, ...]]:
    from simtoreal.policies.registry import policy_types

    rows: list[tuple[str, ...]] = [("policy", "implemented by")]
    return [*rows, *sorted(policy_types().items())]
