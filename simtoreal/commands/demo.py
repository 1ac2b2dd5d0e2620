"""Learn a skill from demonstrations, evaluate it, drive a ROS 2 robot twin with it, and report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simtoreal.envs.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from simtoreal.pipeline import Stage, StageRecord


@dataclass(frozen=True, kw_only=True)
class Config:
    """Interrupted, the demo continues at the unfinished stage when the same command is run again."""

    profile: Literal["smoke", "cpu", "gpu"] = "cpu"
    """smoke: about 2 minutes (--full: 4), learns nothing; cpu: about 15 minutes on two cores with bfloat16
    instructions (--full: 45 to 60 with AMX), several times that without; gpu: more data and steps."""
    full: bool = False
    """The whole chain: demonstrations of two operators in a moving scene (MOVE), a filter of what contradicts, the
    policy, a world model of its rollouts, reinforcement inside it (WoVR), and the robot before and after."""
    output: Path | None = None
    """Folder for everything that is made; default: outputs/demo, with --full outputs/demo_full."""
    task: str = "pick_place"
    """Task name or yaml file."""
    seed: int = 0
    """Decides demonstrations and trainings."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}, expected 0 or more")

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.output or Path("outputs/demo_full" if self.full else "outputs/demo")


def stages_of(config: Config) -> list[Stage]:
    """Return the stages of the demo, in order."""
    from simtoreal.demo_stages import FULL_PROFILES, PROFILES, demo_stages, full_stages

    if config.full:
        return full_stages(FULL_PROFILES[config.profile], config.task, config.seed)
    return demo_stages(PROFILES[config.profile], config.task, config.seed)


def require_machine() -> None:
    """Fail before the first stage, not a quarter of an hour later, where rendering or ROS 2 do not work.

    Raises:
        MissingDependencyError: says what is missing and the command that fixes it.
    """
    from simtoreal.commands import doctor
    from simtoreal.envs.errors import MissingDependencyError

    findings = [check() for check in (doctor.check_rendering, doctor.check_ros)]
    if broken := [finding for finding in findings if finding.state != doctor.OK]:
        lines = [f"{finding.name}: {finding.found}\n  fix: {finding.fix}" for finding in broken]
        raise MissingDependencyError("the demo cannot run on this machine:\n" + "\n".join(lines))


def main(config: Config) -> None:
    """Run the stages that are not finished, then write report.html and results.json."""
    import time

    from rich.console import Console
    from rich.text import Text

    from simtoreal.demo_report import demo_results, write_demo_report
    from simtoreal.envs.files import write_json
    from simtoreal.pipeline import format_duration, run_stages

    console = Console(markup=False)
    started = time.monotonic()
    name = "simtoreal demo --full" if config.full else "simtoreal demo"
    console.print(f"{name}: profile {config.profile}, everything goes to {config.folder}", style="bold", soft_wrap=True)
    require_machine()
    records = run_stages(stages_of(config), config.folder, console)
    console.rule(Text("Report", style="bold"), align="left")
    with console.status("drawing a demonstration and writing the page"):
        report = write_demo_report(config, sum(record.seconds for record in records))
    results = demo_results(config, records, report)
    write_json(config.folder / "results.json", results)
    _print_summary(config, results, records, console)
    total = format_duration(time.monotonic() - started)
    console.print(f"Result: demo finished in {total}; open {report.resolve()}", highlight=False, soft_wrap=True)


def _print_summary(config: Config, results: dict[str, Any], records: list[StageRecord], console: Console) -> None:
    from rich.table import Table

    from simtoreal.demo_report import summary_rows
    from simtoreal.pipeline import format_duration

    table = Table(title=f"{config.task}, profile {config.profile}", show_header=False)
    table.add_column()
    table.add_column()
    for title, text in summary_rows(results):
        table.add_row(title, text)
    table.add_row("time in all", ", ".join(f"{r.stage.name} {format_duration(r.seconds)}" for r in records))
    if not config.full:
        table.add_row("inspection of the demonstrations", str(config.folder / "inspection" / "inspect.html"))
    table.add_row("report", results["report"])
    table.add_row("results", str(config.folder / "results.json"))
    console.print(table)
