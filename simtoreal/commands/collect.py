"""Collect demonstrations of a task in simulation with the scripted expert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from simtoreal.data_collection.collect import CollectionPlan, CollectionResult


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run again with the same flags to continue an interrupted collection, or with more episodes to extend it."""

    task: str
    """Registered task (see 'simtoreal list tasks') or path of a task's yaml file."""
    output: Path
    """Dataset folder; created, or continued if it holds the same collection."""
    episodes: int | None = None
    """Successful episodes to store; default: 200, unless --steps is given."""
    steps: int | None = None
    """Instead of --episodes, a budget of control steps (20 per second). Every attempt spends its steps."""
    move: bool = False
    """Move object and target while the expert demonstrates (MOVE); short for --motion move."""
    motion: str = "none"
    """How the scene moves: none, move, views (cameras elsewhere in every episode), move_views, or a yaml file."""
    cameras: tuple[str, ...] = ("front", "wrist")
    """Cameras to record."""
    image_size: int = 64
    """Height and width of the camera images (pixels)."""
    seed: int = 0
    """Which initial conditions: collections of different seeds never share one."""
    workers: int = 0
    """Processes; 0 uses one per processor core. Does not change which episodes result."""
    num_envs: int = 16
    """Simulations per process. Does not change which episodes result."""
    randomization: Literal["none", "training", "standard", "hard"] = "none"
    """Domain randomisation of masses, friction, gains, latency, colours, lights and cameras."""
    style: str = "expert"
    """How the expert moves, stored as the operator: expert, careful, hasty, from_left, from_right; for reach2d also
    straight, up_right, right_up."""
    noise: float | None = None
    """Standard deviation of noise on the expert's translation (fraction of the action limit); default: the style's."""
    keep_failures: bool = False
    """Also store episodes that ran out of time; they are in the mask 'failure', never in 'train'."""


def main(config: Config) -> None:
    """Collect with a progress bar and write results.json."""
    import dataclasses
    import os

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from simtoreal.data_collection.collect import CollectionPlan, CollectionProgress, collect
    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.data_collection.operator_style import STYLES
    from simtoreal.data_collection.writer import require_dataset_folder
    from simtoreal.envs.errors import ConfigError, closest
    from simtoreal.envs.scene_motion import load_motion
    from simtoreal.evaluation.statistics import format_rate

    console = Console(markup=False)
    require_dataset_folder(config.output)
    if config.style not in STYLES:
        raise ConfigError(f"--style '{config.style}' does not exist. {closest(config.style, STYLES)}")
    if config.workers < 0:
        raise ConfigError(f"--workers is {config.workers}; expected 0 (one per core) or more")
    style = STYLES[config.style]
    if config.noise is not None:
        style = dataclasses.replace(style, noise=config.noise)
    if config.move and config.motion != "none":
        raise ConfigError(f"--move is short for --motion move; it excludes --motion {config.motion}")
    plan = CollectionPlan(
        output=config.output,
        task=config.task,
        episodes=200 if config.episodes is None and config.steps is None else config.episodes,
        steps=config.steps,
        motion=load_motion("move" if config.move else config.motion),
        cameras=config.cameras,
        seed=config.seed,
        image_size=config.image_size,
        style=style,
        randomization=None if config.randomization == "none" else config.randomization,
        keep_failures=config.keep_failures,
        workers=config.workers or len(os.sched_getaffinity(0)),
        num_envs=config.num_envs,
    )
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = plan.episodes or plan.steps
        bar = progress.add_task(f"Collecting {plan.task}", total=total, text="starting")

        def show(state: CollectionProgress) -> None:
            text = f"success {format_rate(state.successes, state.tried)}"
            if state.session and state.seconds > 0:
                text += f", {state.session / state.seconds:.1f} episodes/s"
            progress.update(bar, completed=state.episodes if plan.episodes else state.steps, text=text)

        result = collect(plan, on_progress=show)
        progress.update(bar, completed=total, text="done")
    summary = _summary(plan, result)
    _write_results(plan, result, summary)
    if not result.session:
        # There may be more than were asked for.
        stored = sum(episode.success for episode in Dataset.open(plan.output).episodes)
        console.print(
            f"{plan.output} already holds {stored} successful episodes of {plan.task}: nothing left to do",
            soft_wrap=True,
        )
        return
    rate = format_rate(summary["successes"], summary["tried"])
    console.print(
        f"Collected {summary['successes']} episodes of {plan.task} ({summary['steps']} steps) in {plan.output}: "
        f"expert success {rate}, {summary['episodes_per_s']:.1f} episodes/s",
        soft_wrap=True,
    )


def _summary(plan: CollectionPlan, result: CollectionResult) -> dict[str, object]:
    from simtoreal.evaluation.statistics import posterior_interval

    successes = sum(outcome.success for outcome in result.outcomes)
    tried = len(result.outcomes)
    return {
        "task": plan.task,
        "episodes": plan.episodes or successes,
        "budget_steps": plan.steps,
        "steps": sum(outcome.steps for outcome in result.outcomes),
        "tried": tried,
        "successes": successes,
        "success_rate": successes / tried,
        "interval": list(posterior_interval(successes, tried)),
        "failures": [
            {"seed": outcome.seed, "failure": outcome.failure, "steps": outcome.steps, "stored": outcome.stored}
            for outcome in result.outcomes
            if not outcome.success
        ],
        "seconds": result.seconds,
        "episodes_per_s": result.session / result.seconds if result.session else None,
        "workers": plan.workers,
        "num_envs": plan.num_envs,
        **{key: value for key, value in plan.identity().items() if key != "task"},
    }


def _write_results(plan: CollectionPlan, result: CollectionResult, summary: dict[str, object]) -> None:
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance

    path = plan.output / "results.json"
    if result.session == 0 and path.exists():
        return  # Nothing was run: the speed measured when it was is still the answer.
    seeds = [outcome.seed for outcome in result.outcomes]
    write_json(path, {"collect": summary, "provenance": provenance(seeds)})
