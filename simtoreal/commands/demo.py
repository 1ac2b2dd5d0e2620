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
class Profile:
    """How large a demo is.

    Attributes:
        demonstrations: episodes collected.
        image_size_px: camera resolution.
        policy_flags, baseline_flags: given to ``simtoreal train``; ``{presets}`` stands for configs/policies.
        simulation_episodes: unseen initial conditions per policy.
        simulation_flags: given to ``simtoreal evaluate`` for the policy.
        robot_episodes: episodes on the twin, in real time.
    """

    demonstrations: int
    image_size_px: int
    policy_flags: tuple[str, ...]
    baseline_flags: tuple[str, ...]
    simulation_episodes: int
    robot_episodes: int
    simulation_flags: tuple[str, ...] = ()


PROFILES = {
    # Shows in two minutes that everything runs; the policy learns next to nothing.
    "smoke": Profile(
        demonstrations=12,
        image_size_px=32,
        policy_flags=(
            "--policy",
            "diffusion",
            "--steps",
            "60",
            "--trainer.batch-size",
            "16",
            "--trainer.validate-every",
            "30",
        ),
        baseline_flags=(
            "--policy",
            "bc",
            "--steps",
            "40",
            "--trainer.batch-size",
            "16",
            "--trainer.validate-every",
            "20",
        ),
        simulation_episodes=4,
        robot_episodes=1,
        simulation_flags=("--videos", "1", "--no-outside"),
    ),
    "cpu": Profile(
        demonstrations=200,
        image_size_px=64,
        policy_flags=("--config", "{presets}/diffusion_cpu.yaml"),
        baseline_flags=("--config", "{presets}/bc_cpu.yaml", "--steps", "2000"),
        simulation_episodes=100,
        robot_episodes=20,
    ),
    "gpu": Profile(
        demonstrations=400,
        image_size_px=96,
        policy_flags=("--config", "{presets}/diffusion_gpu.yaml"),
        baseline_flags=("--config", "{presets}/bc_cpu.yaml", "--trainer.batch-size", "256"),
        simulation_episodes=200,
        robot_episodes=20,
    ),
}
GAP = "standard"
# Varied cameras, light, dynamics and starts in the demonstrations: without them the gap costs a third of successes.
RANDOMIZATION = "training"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Interrupted, the demo continues at the unfinished stage when the same command is run again."""

    profile: Literal["smoke", "cpu", "gpu"] = "cpu"
    """smoke: about 2 minutes, learns nothing; cpu: about 15 minutes on two cores; gpu: more data and steps."""
    output: Path = Path("outputs/demo")
    """Folder for everything that is made."""
    task: str = "pick_place"
    """Task name or yaml file."""
    seed: int = 0
    """Decides demonstrations and trainings."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}, expected 0 or more")


def _located(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Fill in where the presets of policies are installed."""
    import importlib.resources

    folder = str(importlib.resources.files("simtoreal.configs") / "policies")
    return tuple(flag.replace("{presets}", folder) for flag in flags)


def demo_stages(config: Config) -> list[Stage]:
    """Return the stages of the demo, in order."""
    from simtoreal.pipeline import Stage

    profile = PROFILES[config.profile]
    seed = ("--seed", str(config.seed))
    data = ("--data", "{output}/demonstrations", "--resume", *seed)
    evaluated = ("--task", config.task, "--episodes", str(profile.simulation_episodes))
    return [
        Stage(
            name="demonstrations",
            title=f"Collect {profile.demonstrations} demonstrations of {config.task}",
            command=(
                *("collect", "--task", config.task, "--episodes", str(profile.demonstrations)),
                *("--image-size", str(profile.image_size_px), "--randomization", RANDOMIZATION),
                *("--output", "{output}/demonstrations", *seed),
            ),
        ),
        Stage(
            name="inspection",
            title="Inspect the demonstrations",
            command=("data", "inspect", "{output}/demonstrations", "--output", "{output}/inspection"),
            needs=("demonstrations",),
        ),
        Stage(
            name="policy",
            title="Train the image diffusion policy",
            command=("train", *data, "--output", "{output}/policy", *_located(profile.policy_flags)),
            needs=("demonstrations",),
        ),
        Stage(
            name="baseline",
            title="Train the baseline (behaviour cloning) on the same data",
            command=("train", *data, "--output", "{output}/baseline", *_located(profile.baseline_flags)),
            needs=("demonstrations",),
        ),
        Stage(
            name="simulation",
            title=f"Evaluate the policy on {profile.simulation_episodes} unseen initial conditions",
            command=(
                *("evaluate", "--policy", "{output}/policy", *evaluated),
                *("--output", "{output}/simulation", *profile.simulation_flags),
            ),
            needs=("policy",),
        ),
        Stage(
            name="baseline_simulation",
            title="Evaluate the baseline on the same initial conditions",
            command=(
                *("evaluate", "--policy", "{output}/baseline", *evaluated),
                *("--output", "{output}/baseline_simulation", "--videos", "1", "--no-outside"),
            ),
            needs=("baseline",),
        ),
        Stage(
            name="robot",
            title=f"Deploy over ROS 2 to the '{GAP}' twin: {profile.robot_episodes} episodes in real time",
            command=(
                *("deploy", "--policy", "{output}/policy", "--task", config.task, "--gap", GAP),
                *("--episodes", str(profile.robot_episodes), "--output", "{output}/robot"),
            ),
            needs=("policy",),
        ),
    ]


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

    from simtoreal.envs.files import write_json
    from simtoreal.pipeline import format_duration, run_stages

    console = Console()
    started = time.monotonic()
    console.print(f"[bold]simtoreal demo[/bold]: profile {config.profile}, everything goes to {config.output}")
    require_machine()
    records = run_stages(demo_stages(config), config.output, console)
    console.rule("[bold]Report", align="left")
    seconds = sum(record.seconds for record in records)
    report = _write_report(config, seconds, console)
    results = demo_results(config, records, report)
    write_json(config.output / "results.json", results)
    _print_summary(config, results, records, console)
    total = format_duration(time.monotonic() - started)
    console.print(f"Result: demo finished in {total}; open {report.resolve()}", highlight=False, soft_wrap=True)


def _write_report(config: Config, seconds: float, console: Console) -> Path:
    from simtoreal.evaluation.film import film_strip, write_picture
    from simtoreal.evaluation.outside import write_demonstration
    from simtoreal.evaluation.report import ReportSources, json_of, write_report

    output = config.output
    with console.status("drawing a demonstration and writing the page"):
        video = write_demonstration(output / "demonstrations", output / "demonstration.mp4")
        strip = {"demonstration": video}
        for title, folder in (
            ("policy in simulation", "simulation"),
            (f"policy on the '{GAP}' twin over ROS 2", "robot"),
        ):
            videos = json_of(output / folder)["videos"]
            strip |= {
                f"{title}: {'success' if v['success'] else 'failure'}": output / folder / v["file"] for v in videos[:1]
            }
        write_picture(output / "overview.jpg", film_strip(strip))
        sources = ReportSources(
            dataset=output / "demonstrations",
            demonstration_video=video,
            runs={"diffusion": output / "policy", "bc": output / "baseline"},
            evaluations={"diffusion": output / "simulation", "bc": output / "baseline_simulation"},
            deployment=output / "robot",
            reproduce=[f"simtoreal demo --profile {config.profile} --task {config.task} --seed {config.seed}"],
            total_seconds=seconds,
        )
        return write_report(sources, output / "report.html")


def demo_results(config: Config, records: list[StageRecord], report: Path) -> dict[str, Any]:
    """Return the content of the demo's ``results.json``."""
    from simtoreal.envs.provenance import provenance
    from simtoreal.evaluation.report import json_of, read_stage

    output = config.output

    def rate(folder: str) -> dict[str, Any]:
        content = json_of(output / folder)
        return {key: content[key] for key in ("success_rate", "successes", "n", "interval")}

    collected = read_stage(output / "demonstrations", "collect")
    trained = {name: read_stage(output / name, "train") for name in ("policy", "baseline")}
    deployed = json_of(output / "robot")
    return {
        "profile": config.profile,
        "task": config.task,
        "collect": {key: collected[key] for key in ("episodes", "episodes_per_s", "success_rate", "interval")},
        "train": {key: trained["policy"][key] for key in ("policy", "seconds", "steps", "parameters")},
        "sim": rate("simulation"),
        "baseline": {**rate("baseline_simulation"), "policy": "bc", "train_seconds": trained["baseline"]["seconds"]},
        "robot": {
            **rate("robot"),
            **{key: deployed[key] for key in ("gap", "missed_periods", "p99_period_error_ms")},
        },
        "report": str(report),
        "seconds": sum(record.seconds for record in records),
        "stages": {record.stage.name: record.seconds for record in records},
        "provenance": provenance([config.seed]),
    }


def _print_summary(config: Config, results: dict[str, Any], records: list[StageRecord], console: Console) -> None:
    from rich.table import Table

    from simtoreal.evaluation.statistics import format_rate
    from simtoreal.pipeline import format_duration

    table = Table(title=f"{config.task}, profile {config.profile}", show_header=False)
    table.add_column()
    table.add_column()
    speed = results["collect"]["episodes_per_s"]
    table.add_row(
        "demonstrations", f"{results['collect']['episodes']}" + (f" at {speed:.1f} episodes/s" if speed else "")
    )
    train = results["train"]
    table.add_row("training", f"{train['parameters'] / 1e6:.1f} M parameters, {format_duration(train['seconds'])}")
    for title, key in (("policy in simulation", "sim"), ("baseline in simulation", "baseline")):
        table.add_row(title, format_rate(results[key]["successes"], results[key]["n"]))
    robot = results["robot"]
    table.add_row(f"policy on the '{robot['gap']}' twin", format_rate(robot["successes"], robot["n"]))
    table.add_row(
        "control loop", f"{robot['missed_periods']} missed periods, p99 error {robot['p99_period_error_ms']:.2f} ms"
    )
    table.add_row("time in all", ", ".join(f"{r.stage.name} {format_duration(r.seconds)}" for r in records))
    table.add_row("inspection of the demonstrations", str(config.output / "inspection" / "inspect.html"))
    table.add_row("report", results["report"])
    table.add_row("results", str(config.output / "results.json"))
    console.print(table)
