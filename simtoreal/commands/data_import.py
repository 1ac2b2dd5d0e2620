"""Turn a recording of a robot (MCAP, also of ros2 bag) into a dataset of episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from simtoreal.envs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Recordings of simtoreal deploy say themselves what they show; the flags for that are for other recordings."""

    recording: tyro.conf.Positional[Path]
    """File to import, e.g. outputs/deploy/run.mcap."""
    output: Path
    """Folder of the new dataset."""
    task: str | None = None
    """Task that a recording of another program shows: name or yaml file."""
    topics: str = "panda_ros2"
    """Topics of a recording of another program: preset (simtoreal list robots) or yaml file."""
    image_size_px: int = 64
    """Height and width that images of a recording of another program are cropped and shrunk to."""
    success: bool = False
    """Whether a recording of another program, imported as one episode, shows a success."""

    def __post_init__(self) -> None:
        if self.image_size_px < 1:
            raise ConfigError(f"--image-size-px is {self.image_size_px}, expected at least 1")


def main(config: Config) -> None:
    """Import, print what was skipped, write results.json."""
    import dataclasses

    from rich.console import Console

    from simtoreal.envs import load_task, panda_embodiment
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance
    from simtoreal.robot.bag_import import Description, import_recording, read_description
    from simtoreal.robot.topics import load_robot_config

    description = read_description(config.recording)
    if description is None:
        if config.task is None:
            raise ConfigError(f"{config.recording} does not say which task it shows: give --task NAME.")
        description = Description(
            embodiment=panda_embodiment(config.image_size_px),
            robot=load_robot_config(config.topics),
            task=load_task(config.task).to_dict(),
        )
    elif config.task is not None:
        raise ConfigError(f"{config.recording} says itself that it shows '{description.task['name']}'; omit --task.")
    result = import_recording(config.recording, config.output, description, success=config.success)
    write_json(config.output / "results.json", {"import": dataclasses.asdict(result), "provenance": provenance()})
    console = Console()
    for line in result.damaged:
        console.print(f"not readable: {line}", style="yellow", markup=False, soft_wrap=True)
    for line in result.skipped:
        console.print(f"skipped {line}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"{config.output}: {result.episodes} episodes ({result.successes} successes), {result.steps} steps, "
        f"{len(result.skipped)} skipped",
        soft_wrap=True,
    )
