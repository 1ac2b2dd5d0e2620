"""Measure how far a world model can be trusted: open loop against reality, and as a judge of policies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simtoreal.envs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Episodes that the model did not learn from are imagined from their first frame to their last and compared with
    what really happened; see docs/world-models.md. An interrupted evaluation continues when the same command is run
    again."""

    model: Path
    """Run folder of the world model."""
    data: tuple[Path, ...]
    """Dataset folders: the model's own (its held-out episodes are judged) or new ones."""
    output: Path
    """Folder for results.json, evaluate.html, plots and videos."""
    policies: tuple[Path, ...] = ()
    """Runs of policies to evaluate in the model and in the simulator; three or more, of different quality."""
    idm: Path | None = None
    """Inverse-dynamics model that judges whether actions are followed; never one that this model was post-trained with.
    Default: one is trained on the real episodes that are not judged."""
    episodes: int = 32
    """Episodes to judge, at most."""
    judge_steps: int = 1500
    """Optimiser steps of the probe that sees positions, and of the judge that reads actions."""
    conditions: int = 100
    """Initial conditions for the policies."""
    first_condition: int = 100_000
    """First of them (a seed); demonstrations use seeds from 0 upwards."""
    task: str | None = None
    """Task for the policies; default: the one of the model's data."""
    randomization: str = "none"
    """Domain randomisation of the simulator that the policies are compared in; take that of the model's data."""
    videos: int = 4
    """Videos of real beside imagined episodes."""
    seed: int = 0
    """Of the noise of a model that generates at random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto uses a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("episodes", "judge_steps", "conditions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if min(self.videos, self.seed, self.first_condition) < 0:
            raise ConfigError("--videos, --seed and --first-condition must not be negative")


def main(config: Config) -> None:
    """Evaluate, write results and page, and print what matters.

    Raises:
        CheckpointError: the model, the judge or a policy cannot be loaded.
        DatasetError: too few episodes that the model did not learn from.
        EmbodimentMismatchError: model, data, judge and policies are of different embodiments or render profiles.
    """
    from rich.console import Console

    from simtoreal.world_models.evaluate import evaluate_world_model
    from simtoreal.world_models.evaluate_page import number, write_page

    console = Console(markup=False)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    results = evaluate_world_model(
        config.model, config.data, config.output, policies=config.policies, judge=config.idm, episodes=config.episodes,
        judge_steps=config.judge_steps, conditions=config.conditions, first_seed=config.first_condition,
        task=config.task, randomization=config.randomization, seed=config.seed, videos=config.videos,
        device=None if config.device == "auto" else config.device, progress=True, say=say,
    )  # fmt: skip
    page = write_page(results, config.output)
    for name, entry in (results["positions"] or {}).items():
        for suffix, text in (("", ""), ("_moved", " where it moves")):
            if entry.get(f"imagined{suffix}"):
                errors = [number(entry[f"{key}{suffix}"], 1000, unit="mm") for key in ("imagined", "floor")]
                say(f"  error of {name}{text}: {errors[0]}; floor {errors[1]}")
    following = results["actions"]["imagined"]["following"]
    if following is not None:
        say(f"  action following: {100 * following:.0f} % of what real videos show")
    if results.get("policies"):
        found = results["policies"]
        r = "not defined" if found["pearson_r"] is None else f"{found['pearson_r']:.2f}"
        say(f"  policies: Pearson r {r}, mean bias {100 * found['mean_bias']:+.1f} points, n = {found['n']} each")
    for text in results["warnings"]:
        console.print(f"Warning: {text}", style="yellow", highlight=False, soft_wrap=True)
    say(
        f"evaluated {config.model} on {results['episodes']['judged']} episodes: PSNR {number(results['psnr_db'])} dB, "
        f"{len(results['warnings'])} warnings -> {page}"
    )
