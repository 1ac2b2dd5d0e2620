"""Post-train a world model so that its videos obey their actions (RLIR), and judge whether it helped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from simtoreal.envs.errors import ConfigError
from simtoreal.world_models.posttrain_config import PosttrainConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """An inverse-dynamics model reads the actions from generated videos; those from which it reads what was commanded
    are made more likely. Another one, and the true displacement of gripper and objects, judge the result."""

    model: Path
    """Run folder of the world model."""
    idm: Path
    """Inverse-dynamics model that gives the reward ('simtoreal world-model train-idm'), best of other episodes than
    those that the world model learned from."""
    data: tuple[Path, ...]
    """Dataset folders of the same embodiment; episodes that the model did not learn from are set apart to judge."""
    output: Path
    """Run folder of the new world model, with results.json."""
    judge: Path | None = None
    """Inverse-dynamics model that judges, another one than --idm; default: one with another seed and other sizes is
    trained."""
    judge_steps: int = 1500
    """Optimiser steps of the probe that sees positions, and of the judge."""
    judges: Path | None = None
    """Folder that keeps probe and judge, so that runs that are compared share them; default: in --output."""
    episodes: int = 32
    """Episodes to judge on, at most."""
    resume: bool = False
    """Continue the run in --output."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto uses a GPU if there is one."""
    posttrain: PosttrainConfig = field(default_factory=PosttrainConfig)
    """How to train."""

    def __post_init__(self) -> None:
        if min(self.judge_steps, self.episodes) < 1:
            raise ConfigError("--judge-steps and --episodes must be at least 1")


def main(config: Config) -> None:
    """Train, judge, write ``results.json`` and print what changed.

    Raises:
        CheckpointError: a model cannot be loaded or written.
        ConfigError: a setting is wrong, ``output`` holds another run, or the judge is the rewarding model.
        DatasetError: too few episodes that the model did not learn from.
        EmbodimentMismatchError: models and data are of different embodiments or render profiles.
    """
    from rich.console import Console

    from simtoreal.world_models.evaluate_page import number
    from simtoreal.world_models.posttrain_run import run_posttraining

    console = Console(markup=False)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    results = run_posttraining(
        config.model, config.idm, config.data, config.output, config.posttrain, judge=config.judge,
        judge_steps=config.judge_steps, judges_folder=config.judges, episodes=config.episodes, resume=config.resume,
        device=None if config.device == "auto" else config.device, progress=True, say=say,
    )  # fmt: skip
    for note in results["notes"]:
        console.print(f"Note: {note}", style="yellow", highlight=False, soft_wrap=True)
    for name, row in results["measures"].items():
        millimetres = name.endswith("_error_m")
        scale, digits, unit = (1000, 1, "mm") if millimetres else (1, 3, "")
        before, after, change = (number(row[key], scale, digits, unit) for key in ("before", "after", "change"))
        known = row["change"]["n"]
        say(f"  {name.removesuffix('_m')}: {before} -> {after}; change {change} (n={known}): {row['verdict']}")
    say(
        f"post-trained {config.model} with '{config.posttrain.method}': {results['steps']} steps, "
        f"{results['frame_passes']:,} frame passes, {results['seconds']:.0f} s; {results['verdict']} -> "
        f"{results['run']}"
    )
