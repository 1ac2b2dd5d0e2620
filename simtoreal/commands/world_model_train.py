"""Train a video world model on datasets: tokenizer, dynamics and success classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from simtoreal.world_models.config import WorldModelConfig, WorldModelTrainerConfig

# --config cpu and --config gpu mean files of this folder of simtoreal.configs.
PRESETS = "world_models"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The data need failures as well as successes: rollouts of policies, or 'simtoreal collect --keep-failures --noise
    0.5'. ``--config cpu`` and ``--config gpu`` are the shipped settings."""

    data: tuple[Path, ...]
    """Dataset folders, all of the same robot, cameras and render profile."""
    output: Path
    """Run folder: checkpoints, metrics, TensorBoard, results.json."""
    init: Path | None = None
    """World model to train on with these data instead of beginning anew; its tokenizer is kept."""
    resume: bool = False
    """Continue the run in --output at the stage and step where it stopped, or begin it if there is none."""
    moving: bool = False
    """Also learn from episodes whose scene moved by itself (MOVE); the model then believes that things move."""
    device: str | None = None
    """Torch device (cpu, cuda, cuda:1); by default a GPU if there is one."""
    seed: int | None = None
    """Decides weights, batches and noise; overrides trainer.seed."""
    model: WorldModelConfig = field(default_factory=WorldModelConfig)
    """Sizes of the model; with --init those of the initial model."""
    trainer: WorldModelTrainerConfig = field(default_factory=WorldModelTrainerConfig)
    """How to train."""


def main(config: Config) -> None:
    """Train, print progress, and write ``results.json``.

    Raises:
        ConfigError: a setting is wrong, or ``output`` holds a run already.
        DatasetError: the data are missing, damaged, or have successes or failures only.
        EmbodimentMismatchError: the data are of different embodiments, or of another one than the initial model.
        CheckpointError: a checkpoint cannot be read or written.
    """
    import dataclasses

    from rich.console import Console

    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance
    from simtoreal.evaluation.results import require_own_folder
    from simtoreal.world_models.trainer import train_world_model
    from simtoreal.world_models.video_data import open_video_data

    require_own_folder(config.output, "world_model")
    console = Console(markup=False)
    trainer = config.trainer if config.seed is None else dataclasses.replace(config.trainer, seed=config.seed)
    data = open_video_data(config.data, moving=config.moving)
    for note in data.notes:
        console.print(note, soft_wrap=True)
    console.print(
        f"training a {config.model.dynamics.kind} world model on {len(data.ends)} episodes "
        f"({data.success.sum()} successful, {data.held_out.sum()} held out), {len(data)} frames of "
        f"{len(data.embodiment.cameras)} cameras",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    result = train_world_model(
        config.model, trainer, data, config.output, initial=config.init, resume=config.resume, device=config.device,
        progress=True,
    )  # fmt: skip
    results = {
        "world_model": {
            "run": str(result.run),
            "data": [str(path) for path in config.data],
            "episodes": len(data.ends),
            "successes": int(data.success.sum()),
            "held_out": int(data.held_out.sum()),
            "frames": len(data),
            "notes": list(data.notes),
            "steps": result.steps,
            "seconds": result.seconds,
            "parameters": result.parameters,
            "metrics": result.metrics,
        },
        "provenance": provenance([trainer.seed]),
    }
    write_json(config.output / "results.json", results)
    found = result.metrics
    console.print(
        f"trained a world model: {result.steps} steps, {result.parameters / 1e6:.2f} M parameters, "
        f"{result.seconds:.0f} s; held-out episodes: images {found['tokenizer_psnr_db']:.1f} dB, "
        f"{found['dynamics_steps']:.0f}-step error {found['dynamics_error']:.3f} (a still picture "
        f"{found['dynamics_still_error']:.3f}), success told right for "
        f"{100 * found['classifier_balanced_accuracy']:.0f} % (balanced) -> {result.run}"
        if "tokenizer_psnr_db" in found
        else f"trained a world model further: {result.steps} steps, {result.seconds:.0f} s; held-out episodes: "
        f"{found['dynamics_steps']:.0f}-step error {found['dynamics_error']:.3f} (a still picture "
        f"{found['dynamics_still_error']:.3f}) -> {result.run}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
