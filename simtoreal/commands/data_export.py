"""Write a dataset in another program's format: LeRobotDataset v3.0, one robomimic file, or MCAP for ROS 2 tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Config:
    """Exports hold everything that the dataset does, so that an import gives it back (docs/datasets.md)."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""
    output: Path
    """LeRobot: folder, where an interrupted export continues; robomimic: .hdf5 file; MCAP: .mcap file. The last two
    must not exist."""
    format: Literal["lerobot", "robomimic", "mcap"]
    """Format to write."""
    mask: str | None = None
    """Episodes to export, e.g. train; by default all."""
    codec: Literal["h264", "av1"] = "h264"
    """LeRobot: of the videos."""
    images: bool = False
    """LeRobot: store PNG images in the parquet files instead of videos; larger, but exact."""
    next_obs: bool = False
    """robomimic: also store next_obs, which offline reinforcement learning reads; doubles the size."""
    topics: str = "panda_ros2"
    """MCAP: names and types of the topics, a preset (simtoreal list robots) or yaml file."""


def main(config: Config) -> None:
    """Export and print what was written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from simtoreal.data_collection.dataset import Dataset

    check_flags(config)
    dataset = Dataset.open(config.dataset)
    episodes = dataset.filter(config.mask)
    console = Console(markup=False)
    columns = (TextColumn("exporting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task("", total=len(episodes))

        def progress(done: int, total: int) -> None:
            bar.update(row, completed=done, total=total)

        if config.format == "lerobot":
            from simtoreal.data_collection.lerobot_export import export_lerobot

            codec = None if config.images else config.codec
            steps = export_lerobot(dataset, config.output, episodes=episodes, codec=codec, progress=progress)
        elif config.format == "robomimic":
            from simtoreal.data_collection.robomimic_export import export_robomimic

            steps = export_robomimic(
                dataset, config.output, episodes=episodes, next_obs=config.next_obs, progress=progress
            )
        else:
            from simtoreal.robot.bag_export import export_recording
            from simtoreal.robot.topics import load_robot_config

            robot = load_robot_config(config.topics)
            steps = export_recording(dataset, config.output, robot, episodes=episodes, progress=progress)
    written = config.output
    size = sum(f.stat().st_size for f in written.rglob("*")) if written.is_dir() else written.stat().st_size
    console.print(
        f"{written}: {len(episodes)} episodes, {steps} steps as {config.format}, {size / 1e6:.1f} MB", soft_wrap=True
    )


def check_flags(config: Config) -> None:
    """Raise :class:`ConfigError` for a flag that the format does not have."""
    from simtoreal.envs.errors import ConfigError

    belongs = {"codec": "lerobot", "images": "lerobot", "next_obs": "robomimic", "topics": "mcap"}
    for name, owner in belongs.items():
        if config.format != owner and getattr(config, name) != getattr(Config, name):
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --format {owner}, not {config.format}")
    if config.images and config.codec != "h264":
        raise ConfigError("--images stores no video, so --codec does not apply")
