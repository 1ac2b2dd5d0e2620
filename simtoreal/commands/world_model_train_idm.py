"""Train an inverse-dynamics model, which tells the action that lies between two pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simtoreal.policies.config import TrainerConfig
from simtoreal.policies.inverse_dynamics_config import InverseDynamicsConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learns from images only, of failures too. Uses: the reward of 'simtoreal world-model posttrain', the judge of
    'simtoreal world-model evaluate', the beginning of a policy ('simtoreal train --encoder')."""

    data: tuple[Path, ...]
    """Dataset folders, all of the same robot, cameras and render profile. For rewards, other episodes than those that
    the world model learned from: else the reward knows what the data look like, not what actions do."""
    output: Path
    """Run folder: checkpoints, metrics, TensorBoard, results.json."""
    resume: bool = False
    """Continue the run in --output; everything that decides the weights must be the same."""
    device: str | None = None
    """Torch device (cpu, cuda, cuda:1); by default a GPU if there is one."""
    seed: int | None = None
    """Decides weights, batches and augmentation; overrides trainer.seed."""
    model: InverseDynamicsConfig = field(default_factory=InverseDynamicsConfig)
    """The model."""
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=2000))
    """How to train."""


def main(config: Config) -> None:
    """Train, measure on held-out episodes, and write ``results.json``.

    Raises:
        ConfigError: a setting is wrong, or ``output`` holds a run already.
        DatasetError: the data are missing or damaged, or lack a camera.
        EmbodimentMismatchError: the data are of different embodiments.
    """
    import dataclasses

    from rich.console import Console

    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance
    from simtoreal.evaluation.results import require_own_folder
    from simtoreal.policies.inverse_dynamics import InverseDynamics, load_inverse_dynamics
    from simtoreal.policies.inverse_dynamics_data import open_frame_pairs
    from simtoreal.policies.trainer import train
    from simtoreal.world_models.action_following import read_actions

    require_own_folder(config.output, "inverse_dynamics")
    console = Console(markup=False)
    trainer = config.trainer if config.seed is None else dataclasses.replace(config.trainer, seed=config.seed)
    data, model = open_frame_pairs(config.data, config.model)
    for note in data.notes:
        console.print(note, soft_wrap=True)
    console.print(
        f"training an inverse-dynamics model on {len(data.train)} pairs of frames; motion follows actions after "
        f"{model.lag_steps} control steps", soft_wrap=True, highlight=False,
    )  # fmt: skip
    result = train(
        model, trainer, data, config.output, kind=InverseDynamics, resume=config.resume, device=config.device,
        progress=True,
    )  # fmt: skip
    trained, _ = load_inverse_dynamics(config.output)
    found = read_actions(trained, data.valid)
    content = {
        "inverse_dynamics": {
            "run": str(result.run), "data": [str(path) for path in config.data], "seconds": result.seconds,
            "steps": result.steps, "parameters": result.parameters, "pairs": len(data.train),
            "gap_steps": trained.gap, "lag_steps": trained.lag, "held_out": found, "notes": list(data.notes),
        },
        "provenance": provenance([trainer.seed]),
    }  # fmt: skip
    write_json(config.output / "results.json", content)
    for name, score in found["r2"].items():
        console.print(f"  {name:<10} {describe(score)}", highlight=False)
    known = [score["r2"] for score in found["r2"].values() if score["r2"] is not None]
    console.print(
        f"trained an inverse-dynamics model: {result.steps} steps, {result.seconds:.0f} s, mean held-out R2 "
        f"{sum(known) / max(1, len(known)):.2f} -> {result.run}", highlight=False, soft_wrap=True,
    )  # fmt: skip


def describe(score: Mapping[str, Any]) -> str:
    """Return e.g. ``"R2 0.93 (95 % interval 0.90 to 0.95, 40 episodes)"`` of an entry of ``r2``."""
    if score["r2"] is None:
        return "does not vary in the held-out episodes"
    bounds = "95 % interval {:.2f} to {:.2f}, ".format(*score["interval"]) if score["interval"] else ""
    return f"R2 {score['r2']:.2f} ({bounds}{score['n']} {'episode' if score['n'] == 1 else 'episodes'})"
