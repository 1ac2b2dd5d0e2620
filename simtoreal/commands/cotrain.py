"""Improve a policy by reinforcement: inside a learned world model (WoVR), or in simulation beside reality."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.world_models.cotrain_config import MeasurementConfig, RlcoConfig, WovrConfig

if TYPE_CHECKING:
    from rich.console import Console

    from simtoreal.envs.embodiment import Embodiment
    from simtoreal.envs.task import TaskSpec
    from simtoreal.world_models.cotrain_measurement import World

# --config wovr, --config rlco and --config wovr_smoke mean files of this folder of simtoreal.configs.
PRESETS = "cotrain"


@dataclass(frozen=True, kw_only=True)
class Config:
    """``--config wovr`` needs --policy and the --demonstrations it learned from; ``--config rlco`` needs
    --demonstrations from the real world and --simulated ones. Interrupted, it continues at the stage and iteration when
    the same command is run again. The improved policy is ``policy`` in --output."""

    output: Path
    """Folder for everything that is made."""
    demonstrations: tuple[Path, ...]
    """Dataset folders with real demonstrations; the policy of WoVR learned from them."""
    method: Literal["wovr", "rlco"] = "wovr"
    """wovr: world model, reinforcement in imagination, refresh; rlco: imitation of a mixture, reinforcement with an
    anchor on the real demonstrations."""
    policy: Path | None = None
    """Training run or checkpoint folder of a diffusion policy to begin with; with rlco it takes the place of the
    first stage."""
    simulated: tuple[Path, ...] = ()
    """Dataset folders with simulated demonstrations (rlco)."""
    world_model: Path | None = None
    """World model to train on (wovr), or to learn in (rlco with --rlco.world world_model)."""
    task: str | None = None
    """Task name or yaml file; default: the task of the demonstrations."""
    real: Literal["none", "standard", "hard"] = "none"
    """How the world that counts differs from the simulation: the gap of the twin, in this process. It stands in for a
    robot: everything called real in the results comes from there."""
    num_envs: int = 16
    """Simulations of that world stepped together; changes the speed, not which episodes are run."""
    seed: int = 0
    """Decides everything random; trainings add it to their own seeds."""
    device: str | None = None
    """Torch device (cpu, cuda, cuda:1); by default a GPU if there is one."""
    measurement: MeasurementConfig = field(default_factory=MeasurementConfig)
    """How success is measured."""
    reinforcement: ReinforcementConfig = field(default_factory=ReinforcementConfig)
    """How the policy is improved; its seed is --seed."""
    wovr: WovrConfig = field(default_factory=WovrConfig)
    """Settings of the method wovr."""
    rlco: RlcoConfig = field(default_factory=RlcoConfig)
    """Settings of the method rlco."""

    def __post_init__(self) -> None:
        if not self.demonstrations:
            raise ConfigError("--demonstrations is missing: give one or more dataset folders")
        if self.seed < 0 or self.num_envs < 1:
            raise ConfigError("--seed must not be negative, --num-envs at least 1")
        if self.method == "wovr" and self.policy is None:
            raise ConfigError("--policy is missing: WoVR improves one; make it with 'simtoreal train'")
        if self.method == "wovr" and self.simulated:
            raise ConfigError("--simulated is for --method rlco; WoVR learns from real episodes only")


def main(config: Config) -> None:
    """Do what is left of the co-training, and print what came out.

    Raises:
        ConfigError: a setting is wrong, or ``output`` holds another co-training.
        CheckpointError, DatasetError: policy, world model or data are missing or damaged.
        EmbodimentMismatchError: they are of different embodiments or render profiles.
    """
    from rich.console import Console

    from simtoreal.evaluation.statistics import format_rate

    console = Console(markup=False)
    results = _cotraining(config, console).run()
    for point in results["measurements"]:
        other = next((name for name in ("imagined", "simulation") if name in point), None)
        if other is not None:
            low, high = point["gap_interval"]
            console.print(
                f"  iteration {point['iteration']}, {point['policy']}: real "
                f"{100 * point['real']['success_rate']:.0f} %, {other} {100 * point[other]['success_rate']:.0f} %, "
                f"difference {100 * point['gap']:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}]",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
    before, after = (format_rate(results[name]["successes"], results[name]["n"]) for name in ("base", "final"))
    pair = results["comparison"]
    change = ""
    if pair is not None:
        low, high = pair["difference_interval"]
        change = (
            f", {100 * pair['difference']:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}], p = {pair['p_value']:.2g}"
        )
    dropped = f", {results['dropped_rollouts']} rollouts dropped" if results["dropped_rollouts"] else ""
    console.print(
        f"Result: {results['method']} on {results['task']}: real success {before} -> {after}{change}; "
        f"{results['real_episodes']} real episodes of {results['real_steps']} steps learned from{dropped}; policy in "
        f"{config.output / results['policy']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip

    if text := advice(results, config):
        console.print(text, highlight=False, soft_wrap=True)


def advice(results: Mapping[str, Any], config: Config) -> str:
    """Say which policy to use when the last one is really worse than the first one; nothing otherwise.

    Args:
        results: content of the run's ``results.json``.
        config: of the run.
    """
    from simtoreal.evaluation.statistics import format_rate

    pair = results["comparison"]
    if pair is None or pair["difference_interval"][1] >= 0:
        return ""
    best = max(results["measurements"], key=lambda point: float(point["real"]["success_rate"]))
    place = os.path.normpath(config.output / best.get("run", "."))
    rate = format_rate(best["real"]["successes"], best["real"]["n"])
    return (
        f"This run made the policy worse. The best one measured is '{best['policy']}' in {place} ({rate}). How "
        "imagined and real success parted, and what to do about it: docs/world-models.md, 'Reading the hallucination'"
    )


def _cotraining(config: Config, console: Console) -> Any:
    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.envs.task_file import load_task, parse_task
    from simtoreal.policies.checkpoint import load_policy
    from simtoreal.policies.distributed import choose_device
    from simtoreal.world_models.rlco import Rlco
    from simtoreal.world_models.wovr import Wovr

    choose_device(config.device)
    dataset = Dataset.open(config.demonstrations[0])
    source = str(config.demonstrations[0])
    task = load_task(config.task) if config.task else parse_task(dataset.task, source=source)
    if config.policy is not None and config.task is None:
        learned = load_policy(config.policy).task
        if learned and learned["name"] != task.name:
            raise ConfigError(
                f"policy {config.policy} learned task '{learned['name']}', and the demonstrations {source} show "
                f"'{task.name}'. Give those of its task, or say with --task which one is meant."
            )
    real = _world(task, dataset.embodiment, config.real, config.num_envs)
    shared: dict[str, Any] = {
        "demonstrations": config.demonstrations, "output": config.output, "real": real, "policy": config.policy,
        "world_model": config.world_model, "device": config.device, "seed": config.seed, "progress": True,
        "notify": lambda text: console.print(text, highlight=False, soft_wrap=True),
    }  # fmt: skip
    if config.method == "wovr":
        return Wovr(config.wovr, config.reinforcement, config.measurement, **shared)
    randomization = config.rlco.randomization or "none"
    return Rlco(
        config.rlco, config.reinforcement, config.measurement, simulated=config.simulated,
        practice=_world(task, dataset.embodiment, randomization, config.rlco.envs), keyframes=config.wovr.keyframes,
        **shared,
    )  # fmt: skip


def _world(task: TaskSpec, embodiment: Embodiment, randomization: str, num_envs: int) -> World:
    from simtoreal.envs import make_vector_env
    from simtoreal.envs.randomization import load_randomization
    from simtoreal.world_models.cotrain_measurement import World

    load_randomization(randomization)
    return World(
        make=lambda: make_vector_env(task, num_envs, embodiment=embodiment, randomization=randomization), task=task,
        settings={"randomization": randomization},
    )  # fmt: skip
