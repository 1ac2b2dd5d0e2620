"""Turn data of LeRobot, robomimic, diffusion_policy or UMI (zarr) and robot recordings (MCAP) into a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from simtoreal.envs.errors import ConfigError

if TYPE_CHECKING:
    from simtoreal.data_collection.exchange import ImportResult, Progress, Reader


@dataclass(frozen=True, kw_only=True)
class Config:
    """Recordings of simtoreal deploy and exports of simtoreal say themselves what they hold.

    Other data keep their robot's own actions and observation names; docs/datasets.md has a table per format.
    """

    source: tyro.conf.Positional[Path]
    """What to import: a LeRobot folder (v3.0 or v2.1), robomimic .hdf5, .zarr folder or .zarr.zip, .mcap or rosbag2."""
    output: Path
    """Folder of the new dataset."""
    format: Literal["auto", "lerobot", "mcap", "robomimic", "zarr"] = "auto"
    """Format of the source; auto looks at its content."""
    task: str | None = None
    """Name to store foreign data under; for MCAP of another program the task it shows (name or yaml file)."""
    control_hz: float | None = None
    """Control rate of data that do not say it (most zarr stores, Gymnasium data of robomimic)."""
    topics: str = "panda_ros2"
    """MCAP of another program: its topics, a preset (simtoreal list robots) or yaml file."""
    image_size_px: int = 64
    """MCAP of another program: height and width that images are cropped and shrunk to."""
    success: bool = False
    """MCAP of another program, imported as one episode: whether it shows a success."""

    def __post_init__(self) -> None:
        if self.image_size_px < 1:
            raise ConfigError(f"--image-size-px is {self.image_size_px}, expected at least 1")
        if self.control_hz is not None and not 0 < self.control_hz < float("inf"):
            raise ConfigError(f"--control-hz is {self.control_hz}, expected a positive number")


def main(config: Config) -> None:
    """Import, print what was skipped, write results.json."""
    import dataclasses

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from simtoreal.data_collection.exchange_formats import detect_format
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance

    console = Console(markup=False)
    kind = detect_format(config.source) if config.format == "auto" else config.format
    columns = (TextColumn("importing {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task(kind, total=None)
        result = run_import(kind, config, lambda done, total: bar.update(row, completed=done, total=total))
    content = {"source": str(config.source), "format": kind, **dataclasses.asdict(result)}
    write_json(config.output / "results.json", {"import": content, "provenance": provenance()})
    for kind_of_line, lines in (("not readable: ", result.damaged), ("skipped ", result.skipped)):
        for line in lines:
            console.print(f"{kind_of_line}{line}", style="yellow", soft_wrap=True)
    for line in result.notes:
        console.print(f"note: {line}", soft_wrap=True)
    console.print(
        f"{config.output}: {result.episodes} episodes ({result.successes} successes), {result.steps} steps, "
        f"{len(result.skipped)} skipped",
        soft_wrap=True,
    )


def run_import(kind: str, config: Config, progress: Progress) -> ImportResult:
    """Import ``config.source``, which is of the format ``kind``.

    Raises:
        ConfigError: a flag is missing or does not fit the source.
        DatasetError: the source is damaged or unsafe, or the output exists.
    """
    if kind == "mcap":
        return _import_recording(config)
    _refuse_recording_flags(config, f"{config.source} is {kind}")
    from simtoreal.data_collection.exchange import import_dataset, refuse_existing

    refuse_existing(config.output)
    with open_reader(kind, config) as reader:
        return import_dataset(reader, config.output, progress=progress)


def open_reader(kind: str, config: Config) -> Reader:
    """Return the reader of a format, a context manager."""
    if kind == "robomimic":
        from simtoreal.data_collection.robomimic_import import RobomimicReader

        return RobomimicReader(config.source, control_hz=config.control_hz, task=config.task)
    if kind == "zarr":
        from simtoreal.data_collection.replay_buffer_import import ReplayBufferReader

        return ReplayBufferReader(config.source, control_hz=config.control_hz, task=config.task)
    if config.control_hz is not None:
        raise ConfigError("--control-hz does not apply: a LeRobot dataset states its rate (fps)")
    from simtoreal.data_collection.lerobot_import import LeRobotReader

    return LeRobotReader(config.source, task=config.task)


def _refuse_recording_flags(config: Config, why: str) -> None:
    for name in ("topics", "image_size_px", "success"):
        if getattr(config, name) != getattr(Config, name):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is for MCAP recordings of another program, and {why}; omit it")


def _import_recording(config: Config) -> ImportResult:
    from simtoreal.data_collection.exchange import refuse_existing
    from simtoreal.data_collection.exchange_formats import recording_file
    from simtoreal.envs import load_task, panda_embodiment
    from simtoreal.evaluation.results import require_own_folder
    from simtoreal.robot.bag_import import Description, import_recording, read_description
    from simtoreal.robot.topics import load_robot_config

    refuse_existing(config.output)
    require_own_folder(config.output, "import")
    recording = recording_file(config.source)
    if config.control_hz is not None:
        raise ConfigError("--control-hz does not apply: recordings are imported at the rate of their robot")
    description = read_description(recording)
    if description is None:
        if config.task is None:
            raise ConfigError(f"{recording} does not say which task it shows: give --task NAME.")
        description = Description(
            embodiment=panda_embodiment(config.image_size_px),
            robot=load_robot_config(config.topics),
            task=load_task(config.task).to_dict(),
        )
    elif config.task is not None:
        raise ConfigError(f"{recording} says itself that it shows '{description.task['name']}'; omit --task.")
    else:
        _refuse_recording_flags(config, f"{recording} says itself what it holds")
    return import_recording(recording, config.output, description, success=config.success)
