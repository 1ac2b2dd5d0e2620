"""Does a policy get better inside a world model that it helps to train (WoVR), and what is each part of that worth?

    python benchmarks/wovr.py                      # profile cpu: five tasks, resumable, as many arms at a time as cores
    python benchmarks/wovr.py --tasks push         # results/wovr_push.json
    python benchmarks/wovr.py --seeds 0 1 2        # three trainings of everything
    python benchmarks/wovr.py --profile gpu        # one GPU: three training seeds, 400 episodes
    python benchmarks/wovr.py --twin               # afterwards: base and full on the twin over ROS 2, in real time
    python benchmarks/wovr.py --summarize          # only write benchmarks/results/wovr.json from what is finished

A policy learns from few demonstrations (base). All arms begin with it:

* full: it collects, a policy imitates the demonstrations and what succeeded, collects, is improved by reinforcement in
  imagination from first frames and key frames, collects again, and goes on in a world model that was trained on;
* imitation: all the real episodes at once, and no imagination: filtered behaviour cloning, against which imagination
  has to show its worth;
* no_imitation: WoVR as published: reinforcement in imagination only, of the base policy, with as many real episodes;
* no_kir: full from first frames only;
* no_pace: as many iterations with the first world model, and so fewer real episodes;
* no_pace_equal (profile gpu): as many real episodes as full, none of an improved policy, one world model;
* direct: reinforcement in MuJoCo itself, for as many control steps as full learned from beside demonstrations.

Success is judged in MuJoCo on the same initial conditions for all arms, and beside it that of the same policies in the
world model. On the twin a policy acts in real time, so nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cotraining_study import (
    FIRST_EPISODE,
    Arm,
    Outcomes,
    alone,
    arm,
    compare,
    demonstrate,
    do_arms,
    gpu_world_model,
    imitate,
    preset,
    read_outcomes,
    read_results,
    say,
    simulation,
    store,
)
from parts import part, parts_of

from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs import load_task
from simtoreal.envs.files import write_json
from simtoreal.evaluation.policies import checkpoint_digest
from simtoreal.evaluation.results import load_evaluation
from simtoreal.policies.checkpoint import find_checkpoint
from simtoreal.policies.config import DiffusionConfig, TrainerConfig, VisionConfig
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.policies.reinforcement_run import reinforce
from simtoreal.world_models.cotrain_config import MeasurementConfig, WovrConfig
from simtoreal.world_models.cotrain_measurement import Measurements
from simtoreal.world_models.wovr import Wovr

# The twin differs from the simulation; its initial conditions are of no other measurement.
TWIN, TWIN_FIRST_EPISODE = "standard", 5_500_000
# What the arms have in common with the full loop, up to its first world model.
BEGUN = ("demonstrations", "measure_base")
IMITATED = (*BEGUN, "imitation_rollouts", "imitation", "measure_imitation")
IMAGINED = (*IMITATED, "rollouts_0", "world_model_0", "calibrate_model_0", "measure_model_0", "rank_model_0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much of everything.

    Attributes:
        demonstrations: task -> episodes, few enough that the policy succeeds in a third to a half of all cases.
        imitation: training of the base policy.
        wovr, reinforcement: the loop.
        direct_rollouts: per iteration in MuJoCo, where every one of them counts.
        episodes: initial conditions that judge every policy.
        twin_episodes: on the twin.
        seeds: training seeds.
        arms: which.
    """

    demonstrations: Mapping[str, int]
    imitation: TrainerConfig
    wovr: WovrConfig
    reinforcement: ReinforcementConfig
    direct_rollouts: int
    episodes: int
    seeds: tuple[int, ...]
    twin_episodes: int = 50
    arms: tuple[str, ...] = ("full", "imitation", "no_imitation", "no_kir", "no_pace", "direct")
    image_size: int = 64
    policy: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)


def profiles() -> dict[str, Profile]:
    """The profiles by name."""
    shipped, smoke = preset("wovr"), preset("wovr_smoke")
    model, trainer = gpu_world_model()
    cpu = Profile(
        demonstrations={"pick_place": 15, "lift": 8, "push": 15, "drawer_open": 4, "stack": 20},
        imitation=TrainerConfig(steps=1200, batch_size=32),
        # Half as wide as the default, so that a processor core trains and uses it in minutes.
        policy=DiffusionConfig(vision=VisionConfig(widths=(16, 32, 32)), noise_samples=2),
        wovr=shipped["wovr"],
        reinforcement=shipped["reinforcement"],
        direct_rollouts=32,
        episodes=200,
        seeds=(0,),
    )
    return {
        "cpu": cpu,
        "gpu": dataclasses.replace(
            cpu,
            imitation=TrainerConfig(steps=4000, batch_size=128),
            policy=DiffusionConfig(),
            wovr=dataclasses.replace(
                cpu.wovr,
                imitation_rollouts=300,
                rollouts=1000,
                refresh_rollouts=300,
                iterations=100,
                imagined_envs=256,
                world_model=model,
                world_model_trainer=trainer,
                imitation=TrainerConfig(steps=4000, batch_size=128),
            ),
            reinforcement=dataclasses.replace(cpu.reinforcement, rollouts=256),
            episodes=400,
            seeds=(0, 1, 2),
            arms=("full", "imitation", "no_imitation", "no_kir", "no_pace", "no_pace_equal", "direct"),
        ),
        # Shows in minutes that every arm runs; nothing is learned.
        "smoke": Profile(
            demonstrations={"reach": 8},
            imitation=TrainerConfig(steps=20, batch_size=16),
            wovr=smoke["wovr"],
            reinforcement=smoke["reinforcement"],
            direct_rollouts=4,
            episodes=4,
            seeds=(0,),
            image_size=16,
            arms=("full", "imitation", "no_imitation", "no_kir", "no_pace", "no_pace_equal", "direct"),
        ),
    }


# What an arm changes, and no stage that it adopts depends on.
VARIED = {
    "imitation": ("iterations", "imitation_rollouts"),
    "no_imitation": ("imitation_rollouts", "rollouts"),
    "no_kir": ("keyframes.share",),
    "no_pace": ("refreshes", "iterations"),
    "no_pace_equal": ("refreshes", "iterations", "rollouts"),
}


def wovr_of(name: str, profile: Profile) -> WovrConfig:
    """Settings of an arm's loop."""
    full = profile.wovr
    refreshing = full.refreshes * full.refresh_rollouts
    if name == "imitation":
        episodes = full.imitation_rollouts + full.rollouts + refreshing
        return dataclasses.replace(full, iterations=0, imitation_rollouts=episodes)
    if name == "no_imitation":
        return dataclasses.replace(full, imitation_rollouts=0, rollouts=full.imitation_rollouts + full.rollouts)
    if name == "no_kir":
        return dataclasses.replace(full, keyframes=dataclasses.replace(full.keyframes, share=0.0))
    if name in ("no_pace", "no_pace_equal"):
        turns, rollouts = full.refreshes + 1, full.rollouts + (refreshing if name == "no_pace_equal" else 0)
        return dataclasses.replace(full, refreshes=0, iterations=turns * full.iterations, rollouts=rollouts)
    return full


def execute(which: Arm, profile: Profile, output: Path, device: str | None) -> str:
    """Do what is left of an arm; return what came out."""
    task, seed, name = which
    _execute(name, task, seed, profile, output, device)
    final = load_evaluation(evaluation_of(name, output / f"{task}-{seed}", profile)).results
    return f"{final['successes']}/{final['n']}"


def _execute(name: str, task: str, seed: int, profile: Profile, output: Path, device: str | None) -> None:
    folder = output / f"{task}-{seed}"
    with alone(folder):
        data = demonstrate(
            folder / "demonstrations", task, profile.demonstrations[task], seed, image_size=profile.image_size
        )
        trainer = dataclasses.replace(profile.imitation, seed=seed)
        policy = imitate(folder / "base", data, profile.policy, trainer, device)
    measurement = MeasurementConfig(episodes=profile.episodes, first_seed=FIRST_EPISODE, videos=2)
    embodiment = Dataset.open(data).embodiment
    real = simulation(task, embodiment, min(16, profile.episodes))
    if name == "direct":
        _execute_direct(folder, policy, profile, measurement, task, seed, device)
        return
    loop = Wovr(
        wovr_of(name, profile), profile.reinforcement, measurement, policy=policy, demonstrations=[data], real=real,
        output=folder / name, device=device, seed=seed, notify=say(f"{task}-{seed}-{name}"),
    )  # fmt: skip
    shared = {
        "imitation": BEGUN,
        "no_imitation": BEGUN,
        "no_kir": IMAGINED,
        # With the first world model, the first half is that of the full loop.
        "no_pace": (*IMAGINED, f"reinforcement_0_{profile.wovr.iterations}"),
        "no_pace_equal": IMITATED,
    }
    if name in shared:
        left_out = {
            "calibrate_model_0": not profile.wovr.calibrated_episodes,
            "rank_model_0": not profile.wovr.ranked_starts,
        }
        adopted = [stage for stage in shared[name] if not left_out.get(stage)]
        loop.adopt(folder / "full", adopted, [f"wovr.{setting}" for setting in VARIED[name]])
    loop.run()


def _execute_direct(
    folder: Path, policy: Path, profile: Profile, measurement: MeasurementConfig, task: str, seed: int,
    device: str | None,
) -> None:  # fmt: skip
    """Reinforcement in MuJoCo for as many control steps as the full loop learned from beside demonstrations."""
    full = read_results(folder / "full")
    if not full:
        raise SystemExit("the arm 'direct' needs the real steps of the arm 'full'; do that first")
    ledger = [row for row in full["ledger"] if (row["world"], row["purpose"]) == ("real", "learning")]
    budget = sum(row["steps"] for row in ledger)
    config = dataclasses.replace(profile.reinforcement, rollouts=profile.direct_rollouts, seed=seed)
    settings = {
        "task": load_task(task), "policy": checkpoint_digest(find_checkpoint(policy)), "reinforcement": config,
        "measurement": measurement, "budget_steps": budget,
    }  # fmt: skip
    began = time.perf_counter()
    with part(folder / "direct", settings) as made:
        if read_results(folder / "direct"):
            return
        world = simulation(task, Dataset.open(folder / "demonstrations").embodiment, min(16, config.rollouts))
        measurements = Measurements(measurement, world, folder / "direct", device, seed, imagined_envs=1)
        try:
            result = reinforce(
                policy, config, measurements.env(), folder / "direct" / "reinforcement", iterations=10**6,
                most_control_steps=budget, device=device,
            )  # fmt: skip
            rate, _ = measurements.in_world("final", result.run)
        finally:
            measurements.close()
        write_json(
            folder / "direct" / "results.json",
            {
                "final": rate, "iterations": result.iterations, "real_episodes": result.rollouts,
                "real_steps": result.control_steps, "budget_steps": budget,
                "seconds": made.seconds + time.perf_counter() - began,
                "sessions": [{"commit": commit} for commit in made.commits],
            },
        )  # fmt: skip


def deploy(task: str, seed: int, profile: Profile, output: Path) -> None:
    """Run the policies before and after on the twin, with the command that people use."""
    folder = output / f"{task}-{seed}"
    for name, policy in (("base", folder / "base"), ("full", folder / "full" / "policy")):
        command = [
            *(sys.executable, "-m", "simtoreal", "deploy", "--policy", policy, "--task", task, "--gap", TWIN),
            *("--episodes", profile.twin_episodes, "--seed", TWIN_FIRST_EPISODE, "--videos", 1, "--no-record"),
            *("--output", folder / f"twin_{name}"),
        ]
        if not (folder / f"twin_{name}" / "results.json").exists():
            subprocess.run(list(map(str, command)), check=True)


def evaluation_of(name: str, folder: Path, profile: Profile) -> Path:
    """Evaluation folder of an arm's final policy."""
    if name == "base":
        return folder / "full" / "measurements" / "base" / "real"
    last = profile.wovr.refreshes
    policy = {"direct": "final", "imitation": "imitation", "no_pace": "policy_0", "no_pace_equal": "policy_0"}
    return folder / name / "measurements" / policy.get(name, f"policy_{last}") / "real"


def summarize(profile: Profile, output: Path, result: str, tasks: Iterable[str]) -> None:
    """Write the benchmark's JSON from the finished arms of some tasks."""
    arms, notes, comparisons, done = [], [], {}, []
    for task in tasks:
        folders = {seed: output / f"{task}-{seed}" for seed in profile.seeds}
        found: dict[str, Outcomes] = {
            name: read_outcomes({seed: evaluation_of(name, folder, profile) for seed, folder in folders.items()})
            for name in ("base", *profile.arms)
        }
        for name, outcomes in found.items():
            results = {seed: read_results(folders[seed] / name) for seed in outcomes} if name != "base" else {}
            results = {seed: content for seed, content in results.items() if content}
            if not outcomes or (name != "base" and not results):
                continue
            done += results.values()
            steps = [content["real_steps"] for content in results.values()]
            arms.append(
                arm(f"{task}: {name}", outcomes, found["base"], real_steps=sum(steps) / len(steps) if steps else None)
            )
            notes += [_gaps(f"{task}, seed {seed}, {name}", content) for seed, content in results.items()]
        if found["full"] and found["base"]:
            comparisons[task] = compare(found["full"], found["base"])
        for other in ("imitation", "direct"):
            if found["full"] and found.get(other):
                versus = compare(found["full"], found[other])
                low, high = versus["interval"]
                notes.append(
                    f"{task}: full - {other} {100 * versus['difference']:+.1f} points "
                    f"[{100 * low:+.1f}, {100 * high:+.1f}], p = {versus['p_value']:.2g}"
                )
    if not comparisons:
        print("no task has finished its full loop yet")
        return
    for task in comparisons:
        on_twin: dict[str, Outcomes] = {
            name: read_outcomes({seed: output / f"{task}-{seed}" / f"twin_{name}" for seed in profile.seeds})
            for name in ("base", "full")
        }
        arms += [
            arm(f"{task}: {name}, '{TWIN}' twin over ROS 2", outcomes, on_twin["base"])
            for name, outcomes in on_twin.items()
            if outcomes
        ]
    # The smaller gain of the tasks is the claim.
    task = min(comparisons, key=lambda one: comparisons[one]["difference"])
    store(
        result,
        "Does a policy get better inside a world model that it helps to train?",
        f"{task}: real success after co-training", comparisons[task], "base", arms, parts=parts_of(done),
        seeds=[*profile.seeds, FIRST_EPISODE, TWIN_FIRST_EPISODE], notes=notes,
    )  # fmt: skip


def _gaps(name: str, results: dict[str, Any]) -> str:
    if "measurements" not in results:
        taken = f"{results['real_episodes']} episodes, {results['real_steps']} of {results['budget_steps']} steps"
        return f"{name}: {results['iterations']} iterations, {taken} in MuJoCo"
    parts = []
    for point in results["measurements"]:
        real = f"real {100 * point['real']['success_rate']:.1f} %"
        if "imagined" in point:
            imagined = f"imagined {100 * point['imagined']['success_rate']:.1f} %"
            parts.append(f"{point['policy']} in {point['world_model']}: {real}, {imagined}")
        elif point["policy"] == "imitation":
            parts.append(f"{point['policy']}: {real}")
    for ranking in results.get("rankings", []):
        if ranking["same_start"] is not None:
            share, correlation = 100 * ranking["same_start"], ranking["advantage_correlation"]
            parts.append(
                f"{ranking['world_model']} tells success from failure of the same start in {share:.0f} % of "
                f"{ranking['same_start_pairs']} pairs"
                + ("" if correlation is None else f", correlation of advantages {correlation:.2f}")
            )
    return f"{name}: " + "; ".join(parts)


def main() -> None:
    """Do the arms that are left, then summarise."""
    known = profiles()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=known, default="cpu")
    parser.add_argument("--output", type=Path, default=None, help="work folder, resumable")
    parser.add_argument("--tasks", nargs="*", help="only these, with a result of their own")
    parser.add_argument("--arms", nargs="*", help="only these; 'full' first, the others begin with its stages")
    parser.add_argument("--seeds", nargs="*", type=int, help="training seeds, with a result of their own")
    parser.add_argument("--jobs", type=int, help="arms at the same time; default: one per core, on a GPU one")
    parser.add_argument("--device", default=None)
    parser.add_argument("--twin", action="store_true", help="only deploy the policies of 'full' and its base")
    parser.add_argument("--summarize", action="store_true", help="only write the result of the finished arms")
    options = parser.parse_args()
    profile = known[options.profile]
    if options.seeds:
        profile = dataclasses.replace(profile, seeds=tuple(options.seeds))
    output = options.output or Path(f"outputs/benchmark_wovr_{options.profile}")
    if options.twin:
        for task in options.tasks or profile.demonstrations:
            for seed in profile.seeds:
                deploy(task, seed, profile, output)
    elif not options.summarize:
        tasks, names = options.tasks or profile.demonstrations, options.arms or profile.arms
        arms = [(task, seed, name) for task in tasks for seed in profile.seeds for name in names]
        do = functools.partial(execute, profile=profile, output=output, device=options.device)
        do_arms(do, arms, "full", options.jobs, options.device)
    if options.profile == "smoke":
        print("the profile smoke measures nothing; no result is written")
        return
    result = "wovr" if options.profile == "cpu" else f"wovr_{options.profile}"
    chosen = options.tasks or list(profile.demonstrations)
    if len(chosen) < len(profile.demonstrations):
        result = "_".join([result, *chosen])
    if options.seeds:
        result = "_seed".join([result, *map(str, options.seeds)])
    summarize(profile, output, result, chosen)


if __name__ == "__main__":
    main()
