"""Train a policy on a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from simtoreal.policies.config import BCConfig, DiffusionConfig, PolicyConfig, TrainerConfig

PRESETS = "policies"


def _read_settings(words: list[str]) -> dict[str, Any]:
    """Read names and values in turn; values as in a yaml file: numbers, text, lists such as ``[1024, 1024]``."""
    import yaml

    from simtoreal.envs.errors import ConfigError

    if len(words) % 2:
        raise ConfigError(f"--settings: '{words[-1]}' has no value; expected NAME VALUE NAME VALUE ...")
    try:
        return {name: yaml.safe_load(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    except yaml.YAMLError as error:
        raise ConfigError(f"--settings: a value is not valid yaml: {error}") from error


Settings = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME VALUE ...]",
        instance_from_str=_read_settings,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of ``simtoreal train``."""

    data: Path
    """Dataset folder."""
    output: Path
    """Run folder: checkpoints, metrics, TensorBoard, results.json."""
    policy: str = "diffusion"
    """Type of the policy; ``simtoreal list policies`` names them."""
    mask: str = "train"
    """Episodes to learn from (a mask of the dataset). Those of ``valid`` are held out whatever the mask. Failures are
    learnt from only with ``all``, ``failure``, a mask you set yourself, or --weighting."""
    hold_out: bool = True
    """Hold the episodes of ``valid`` (every tenth success) out. Without, all of a mask such as ``success`` is learnt
    from: for demonstrations that are few, or balanced over ways to do a task."""
    filter: str | None = None
    """Learn only from the steps that this filter keeps; ``simtoreal data filter`` makes one."""
    weighting: Literal["uniform", "return", "advantage", "top"] = "uniform"
    """Draw good episodes more often, by return, by what the return exceeds the expected one by, or only the best tenth;
    for data of mixed quality, with --mask all if failures were kept."""
    weighting_temperature: float = 0.1
    """Of --weighting return and advantage: the best episode is drawn up to exp(1/T) times as often as the worst."""
    scene_frame: bool = True
    """Learn from demonstrations in a moving scene (MOVE) as seen from the scene: a chunk is what would have been done
    had everything stopped when it began. Without, policies aim at where things will be. No effect on other data."""
    encoder: Path | None = None
    """Begin with the image encoders of this run: of an inverse-dynamics model ('simtoreal world-model train-idm'), or
    of another policy with encoders of the same sizes."""
    steps: int | None = None
    """Optimiser steps; overrides trainer.steps."""
    seed: int | None = None
    """Decides weights, batches and noise; overrides trainer.seed."""
    resume: bool = False
    """Continue the run in --output; everything that decides the weights must be the same."""
    device: str | None = None
    """Torch device (cpu, cuda, cuda:1); by default a GPU if there is one."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How to train."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Settings of the policy type ``diffusion``."""
    bc: BCConfig = field(default_factory=BCConfig)
    """Settings of the policy type ``bc``."""
    settings: Settings = field(default_factory=dict)
    """Settings of any other policy type (robomimic, third parties), e.g. --settings hidden 64 image_keys
    '[front_image]'."""


def main(config: Config) -> None:
    """Train, print progress, and write ``results.json``.

    Raises:
        ConfigError: unknown policy type or setting, ``output`` holds a run already, or --encoder does not fit.
        DatasetError: the dataset or the filter is missing or damaged.
        CheckpointError: a checkpoint cannot be read or written.
    """
    import os

    from rich.console import Console

    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.envs.errors import ConfigError
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance
    from simtoreal.evaluation.results import require_own_folder
    from simtoreal.policies.observation_keys import adapt_keys, observation_shapes
    from simtoreal.policies.trainer import train
    from simtoreal.policies.training_data import open_training_data
    from simtoreal.policies.weighting import Weighting, effective_share

    require_own_folder(config.output, "train")
    console = Console(markup=False)
    first = os.environ.get("RANK", "0") == "0"
    asked, trainer = policy_config(config), trainer_config(config)
    shapes = observation_shapes(Dataset.open(config.data))
    policy = adapt_keys(asked, shapes)
    if policy != asked and first:
        lacking = ", ".join(sorted(set(asked.keys) - set(policy.keys)))
        unread = ", ".join(sorted(set(shapes) - set(policy.keys)))
        line = f"the data lack {lacking}; the policy reads {', '.join(policy.keys)}"
        console.print(line + (f", and not {unread}" if unread else ""), soft_wrap=True)
    if not config.hold_out and config.mask == "train":
        raise ConfigError(
            "--no-hold-out changes nothing with --mask train, which is what 'valid' leaves. Add --mask success to "
            "learn from every success, or --mask all."
        )
    weighting = Weighting(method=config.weighting, temperature=config.weighting_temperature)
    data = open_training_data(
        config.data, policy, mask=config.mask, filter=config.filter, weighting=weighting,
        scene_frame=config.scene_frame, hold_out=config.hold_out,
    )  # fmt: skip
    if first:
        for note in data.notes:
            console.print(note, soft_wrap=True)
    if first and data.probabilities is not None:
        console.print(
            f"weighting by {config.weighting}: as if {100 * effective_share(data.probabilities):.0f} % of the windows"
        )
    if first:
        console.print(
            f"training {policy.type} on {len(data.train)} windows of {config.data} "
            f"for {trainer.steps} steps of {trainer.batch_size}",
            soft_wrap=True,
        )
    result = train(
        policy, trainer, data, config.output, encoder=config.encoder, resume=config.resume, device=config.device,
        progress=first,
    )  # fmt: skip
    if not first:
        return
    results = {
        "train": {
            "policy": policy.type,
            "seconds": result.seconds,
            "steps": result.steps,
            "parameters": result.parameters,
            "validation_error": result.validation_error,
            "run": str(result.run),
        },
        "provenance": provenance([trainer.seed]),
    }
    write_json(config.output / "results.json", results)
    error = "" if result.validation_error is None else f", held-out action error {result.validation_error:.4f}"
    console.print(
        f"trained {policy.type}: {result.steps} steps, {result.parameters / 1e6:.2f} M parameters, "
        f"{result.seconds:.0f} s{error} -> {result.run}",
        soft_wrap=True,
    )


def policy_config(config: Config) -> PolicyConfig:
    """Return the settings of the chosen policy type.

    Raises:
        ConfigError: unknown policy type, a setting that it does not have, or one of another type.
    """
    import dataclasses

    from simtoreal.envs.config import build_config
    from simtoreal.envs.errors import ConfigError
    from simtoreal.policies.registry import policy_class

    kind = policy_class(config.policy)
    for own in (config.diffusion, config.bc):
        changed = [field.name for field in dataclasses.fields(own) if getattr(own, field.name) != _default(field)]
        if own.type != config.policy and changed:
            raise ConfigError(
                f"{own.type}.{changed[0]} is set, by a flag or in the preset, but --policy is {config.policy}, which "
                f"does not read the settings of '{own.type}' ({', '.join(changed)}). Leave them out, or give "
                f"--policy {own.type}"
            )
    for own in (config.diffusion, config.bc):
        if own.type == config.policy:
            if config.settings:
                names = ", ".join(field.name for field in dataclasses.fields(own))
                raise ConfigError(f"policy type '{own.type}' has flags of its own (--{own.type}.NAME: {names}); "
                                  "--settings is for types without")  # fmt: skip
            return own
    return build_config(kind.config_type, {"type": config.policy, **config.settings}, source="--settings")


def _default(field: Any) -> Any:
    import dataclasses

    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def trainer_config(config: Config) -> TrainerConfig:
    """Return the trainer settings with ``--steps`` and ``--seed`` applied.

    Raises:
        ConfigError: a value is out of range.
    """
    import dataclasses

    from simtoreal.envs.errors import ConfigError

    changes = {name: value for name in ("steps", "seed") if (value := getattr(config, name)) is not None}
    try:
        return dataclasses.replace(config.trainer, **changes)
    except ValueError as error:
        raise ConfigError(f"--{next(iter(changes), 'trainer')}: {error}") from error
