"""Do inverse rewards make a world model obey its actions, or only please the model that gives them (RLIR)?

    python benchmarks/rlir.py                     # --profile cpu: under an hour on two cores; resumable
    python benchmarks/rlir.py --profile gpu       # one GPU
    python benchmarks/rlir.py --profile smoke     # minutes: everything runs, nothing is learned, nothing stored

A world model that was trained too little is trained on in three ways with the same number of frame passes: with inverse
rewards (rlir), with more of its own training (sft), and with the error of the inverse-dynamics model as a loss
(sft_idm). The inverse-dynamics model learned from other episodes than the world model. Judges that had no say in the
training decide: an inverse-dynamics model with another seed and other sizes, and the true displacement of gripper and
cube that a probe sees. Differences between arms are paired over episodes, pooled over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import write_benchmark
from parts import part
from world_model import PRESETS, TASK, collect

from simtoreal.envs import load_task
from simtoreal.envs.config import build_config, read_yaml
from simtoreal.evaluation.bootstrap import mean_with_interval
from simtoreal.policies.config import TrainerConfig
from simtoreal.policies.inverse_dynamics import InverseDynamics
from simtoreal.policies.inverse_dynamics_config import InverseDynamicsConfig
from simtoreal.policies.inverse_dynamics_data import open_frame_pairs
from simtoreal.policies.trainer import train
from simtoreal.world_models.config import StageConfig, WorldModelConfig, WorldModelTrainerConfig
from simtoreal.world_models.disturbance import DisturbanceConfig
from simtoreal.world_models.posttrain_config import PosttrainConfig
from simtoreal.world_models.posttrain_run import run_posttraining
from simtoreal.world_models.trainer import train_world_model
from simtoreal.world_models.video_data import open_video_data

METHODS = ("rlir", "sft", "sft_idm")
# Apart from all seeds that anything was chosen on.
MODEL_SEED, INVERSE_SEED, JUDGED_SEED = 2_400_000, 2_500_000, 2_600_000
# More reward is better, and less error.
MEASURES = ("training_reward", "held_out_reward", "psnr_db", "tcp_error_m", "cube_error_m")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much of everything.

    Attributes:
        preset: settings of the model; its dynamics are trained for ``under_trained`` of their steps.
        episodes: for the world model, the inverse-dynamics model, and to judge.
        inverse_steps, judge_steps: trainings of the inverse-dynamics model, and of probe and judge.
        seeds: of the post-training.
        posttrain: settings of all arms.
    """

    preset: str
    under_trained: float
    episodes: tuple[int, int, int]
    inverse_steps: int
    judge_steps: int
    seeds: tuple[int, ...]
    posttrain: PosttrainConfig


PROFILES = {
    "cpu": Profile(
        preset="cpu", under_trained=0.3, episodes=(200, 150, 60), inverse_steps=1500, judge_steps=1000, seeds=(0, 1, 2),
        posttrain=PosttrainConfig(frame_passes=200_000),
    ),
    "gpu": Profile(
        preset="gpu", under_trained=0.2, episodes=(1000, 500, 100), inverse_steps=4000, judge_steps=3000,
        seeds=(0, 1, 2),
        posttrain=PosttrainConfig(frame_passes=20_000_000, contexts=64, noise_scale=0.3, batch_size=64),
    ),
    "smoke": Profile(
        preset="cpu", under_trained=0.01, episodes=(6, 5, 6), inverse_steps=3, judge_steps=3, seeds=(0,),
        posttrain=PosttrainConfig(frame_passes=500, contexts=2, group_size=2, batch_size=2),
    ),
}  # fmt: skip


def model_settings(profile: Profile) -> tuple[WorldModelConfig, WorldModelTrainerConfig]:
    """Settings of the under-trained world model."""
    content = read_yaml(PRESETS / f"{profile.preset}.yaml")
    model = build_config(WorldModelConfig, content["model"], source=profile.preset)
    trainer = build_config(WorldModelTrainerConfig, content["trainer"], source=profile.preset)
    shorter = dataclasses.replace(trainer.dynamics, steps=max(2, round(trainer.dynamics.steps * profile.under_trained)))
    trainer = dataclasses.replace(trainer, dynamics=shorter)
    if profile.judge_steps < 10:
        moment = StageConfig(steps=2, batch_size=4)
        trainer = dataclasses.replace(trainer, tokenizer=moment, classifier=moment)
    return model, trainer


def settings_of(profile: Profile) -> dict[str, Any]:
    """What decides the measurement, see :func:`~parts.find_part`."""
    model, trainer = model_settings(profile)
    return {
        "profile": profile, "task": load_task(TASK), "disturbance": DisturbanceConfig(), "model": model,
        "trainer": trainer, "inverse": InverseDynamicsConfig(), "inverse_trainer": TrainerConfig(),
        "seeds": [MODEL_SEED, INVERSE_SEED, JUDGED_SEED], "methods": METHODS,
    }  # fmt: skip


def prepare(profile: Profile, output: Path) -> tuple[Path, Path, list[Path]]:
    """Data, an under-trained world model, and an inverse-dynamics model of other episodes."""
    folders = [
        collect(output / name, count, seed, disturbed=True)
        for name, count, seed in zip(
            ("data", "inverse_data", "judged"), profile.episodes, (MODEL_SEED, INVERSE_SEED, JUDGED_SEED), strict=True
        )
    ]
    model, trainer = model_settings(profile)
    train_world_model(model, trainer, open_video_data(folders[:1]), output / "model", resume=True, progress=True)
    pairs, config = open_frame_pairs(folders[1:2], InverseDynamicsConfig())
    schedule = TrainerConfig(steps=profile.inverse_steps, warmup_steps=min(100, profile.inverse_steps))
    train(config, schedule, pairs, output / "inverse", kind=InverseDynamics, resume=True, progress=True)
    return output / "model", output / "inverse", folders


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("--output", type=Path, default=None, help="folder; default: outputs/benchmark_rlir_PROFILE")
    options = parser.parse_args()
    profile = PROFILES[options.profile]
    output = options.output or Path("outputs") / f"benchmark_rlir_{options.profile}"
    results: dict[str, list[dict[str, Any]]] = {}
    with part(output, settings_of(profile)) as made:
        model, inverse, folders = prepare(profile, output)
        for seed in profile.seeds:
            for method in METHODS:
                config = dataclasses.replace(profile.posttrain, method=method, seed=seed)
                found = run_posttraining(
                    model, inverse, [folders[0], folders[2]], output / f"{method}-{seed}", config,
                    judge_steps=profile.judge_steps, judges_folder=output / "judges", episodes=profile.episodes[2],
                    resume=True, progress=True,
                )  # fmt: skip
                results.setdefault(method, []).append(found)
                print(f"{method}, seed {seed}: {found['verdict']}")
    arms = [row for method in METHODS for row in arm_rows(method, results[method])]
    headline = compare(results)
    for arm in arms:
        print(f"{arm['name']}: {arm['value']:.4f} {arm['interval']}")
    if options.profile == "smoke":
        print("smoke run only, nothing stored")
        return
    write_benchmark(
        "rlir" if options.profile == "cpu" else f"rlir_{options.profile}",
        "Do inverse rewards (RLIR) make a world model obey its actions, as judges see it that gave no reward?",
        headline, arms, parts=[made], seeds=[MODEL_SEED, INVERSE_SEED, JUDGED_SEED],
        notes=notes(options.profile, profile, results),
    )  # fmt: skip


def changes(found: dict[str, Any], name: str) -> np.ndarray:
    """Change ``(E,)`` of a measure per episode, NaN where it is not known."""
    before, after = (
        np.array([np.nan if value is None else value for value in found["per_episode"][moment][name]], float)
        for moment in ("before", "after")
    )
    return after - before


def pooled(runs: list[dict[str, Any]], name: str) -> np.ndarray:
    """Mean change per episode over the seeds."""
    return np.mean([changes(found, name) for found in runs], axis=0)


def arm_rows(method: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change of every measure, and how often the reward was hacked."""
    rows = []
    for name in MEASURES:
        if name in runs[0]["measures"]:
            entry = mean_with_interval(pooled(runs, name))
            if entry["mean"] is not None:
                rows.append({"name": f"{method}: change of {name}", "value": entry["mean"], "n": entry["n"],
                             "interval": entry["interval"]})  # fmt: skip
    hacked = float(np.mean([found["reward_hacking"] for found in runs]))
    rows.append({"name": f"{method}: share of seeds with reward hacking", "value": hacked, "n": len(runs),
                 "interval": None})  # fmt: skip
    return rows


def compare(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Held-out reward: how much more it changes with inverse rewards than with more of the same training."""
    name = "held_out_reward"
    ours, baseline = (pooled(results[method], name) for method in ("rlir", "sft"))
    difference = mean_with_interval(ours - baseline)
    return {
        "metric": "change of the reward by the held-out inverse-dynamics model", "ours": float(np.nanmean(ours)),
        "baseline": float(np.nanmean(baseline)), "baseline_name": "sft, equal frame passes", "ratio": None,
        "difference": difference["mean"], "interval": difference["interval"], "n": difference["n"], "p_value": None,
    }  # fmt: skip


def notes(name: str, profile: Profile, results: dict[str, list[dict[str, Any]]]) -> str:
    """What has to be known about the numbers."""
    first = results["rlir"][0]
    before = {key: first["measures"][key]["before"]["mean"] for key in MEASURES if key in first["measures"]}
    seconds = {method: f"{np.mean([found['seconds'] for found in runs]):.0f} s" for method, runs in results.items()}
    verdicts = "; ".join(f"{method}: {runs[0]['verdict']}" for method, runs in results.items())
    return (
        f"{name} profile, {profile.preset} preset with {profile.under_trained:.0%} of the steps of its dynamics; "
        f"{len(profile.seeds)} seeds of the post-training, one world model. Before: {before}; of real videos: "
        f"{ {key: first['real'][key]['mean'] for key in before} }. Wall time {seconds}. Seed 0: {verdicts}. "
        "Errors are means over whole episodes, imagined open loop, and of the cube only where it moves."
    )


if __name__ == "__main__":
    main()
