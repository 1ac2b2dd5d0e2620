"""Does reinforcement in simulation help in the real world, and does the anchor on real demonstrations matter (RL-Co)?

    python benchmarks/rlco.py                     # profile cpu, resumable, 48 min or more on two cores
    python benchmarks/rlco.py --seeds 2           # another training: results/rlco_seed2.json
    python benchmarks/rlco.py --profile gpu       # one GPU: three training seeds, 400 episodes
    python benchmarks/rlco.py --summarize         # only write benchmarks/results/rlco.json from what is finished

"Real" is the simulation with the hidden gap of the twin (standard: friction, mass, gains, latency, cameras, light,
noise), in this process. Arms, all with the same optimiser steps of imitation:

* real_only: imitation of the few real demonstrations;
* cotraining: imitation of real and simulated demonstrations, half of the windows from either;
* beta_0, beta_0.05, beta_0.2: the policy of cotraining, improved by reinforcement in the simulation, with this weight
  of the imitation loss on the real demonstrations, as a log-probability.

The simulation does not know the gap, but is randomised. Every policy is measured on the same initial conditions with
the gap and in that simulation. What it has forgotten shows as the imitation loss on real demonstrations that nobody
learned from.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from cotraining_study import (
    Arm,
    Outcomes,
    alone,
    arm,
    compare,
    demonstrate,
    do_arms,
    preset,
    read_outcomes,
    read_results,
    say,
    simulation,
    store,
)
from parts import parts_of

from simtoreal.data_collection.dataset import Dataset
from simtoreal.envs.errors import CheckpointError
from simtoreal.policies.checkpoint import find_checkpoint, load_policy
from simtoreal.policies.config import DiffusionConfig, TrainerConfig, VisionConfig
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.policies.trainer import seed_everything
from simtoreal.policies.training_data import open_training_data, to_tensors
from simtoreal.world_models.cotrain_config import MeasurementConfig, RlcoConfig
from simtoreal.world_models.rlco import Rlco

GAP = "standard"
IMITATIONS = ("real_only", "cotraining")
BETAS = {"beta_0": 0.0, "beta_0.05": 0.05, "beta_0.2": 0.2}
OURS, BASELINE = "beta_0.05", "cotraining"
# The settings were chosen on the demonstrations of training seed 0 and on the initial conditions from 5_000_000 on.
FIRST_EPISODE = 6_000_000
# Further real demonstrations, which nobody learns from.
HELD_OUT_SEED = 200
# Simulated demonstrations come from another range of initial conditions than real ones.
SIMULATED_SEED = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much of everything.

    Attributes:
        tasks: which.
        real, simulated: demonstrations.
        rlco, reinforcement: the two stages.
        episodes: initial conditions that judge every policy, in either world.
        seeds: training seeds.
    """

    tasks: tuple[str, ...]
    real: int
    simulated: int
    rlco: RlcoConfig
    reinforcement: ReinforcementConfig
    episodes: int
    seeds: tuple[int, ...]
    image_size: int = 64


def profiles() -> dict[str, Profile]:
    """The profiles by name."""
    shipped, smoke = preset("rlco"), preset("wovr_smoke")
    cpu = Profile(
        tasks=("pick_place",),
        real=20,
        # Few, so that imitation leaves something to gain; the encoder is half as wide as the default, for two cores.
        simulated=40,
        rlco=dataclasses.replace(
            shipped["rlco"],
            imitation=TrainerConfig(steps=1500, batch_size=32),
            diffusion=dataclasses.replace(
                shipped["rlco"].diffusion, vision=VisionConfig(widths=(16, 32, 32)), noise_samples=2
            ),
        ),
        reinforcement=shipped["reinforcement"],
        episodes=200,
        seeds=(1,),
    )
    small = DiffusionConfig(unet_widths=(16,), condition_width=32, inference_steps=2, noise_samples=2)
    return {
        "cpu": cpu,
        "gpu": dataclasses.replace(
            cpu,
            tasks=("pick_place", "push"),
            simulated=500,
            rlco=dataclasses.replace(
                shipped["rlco"], imitation=TrainerConfig(steps=6000, batch_size=128), iterations=60, anchor_batch=128
            ),
            reinforcement=dataclasses.replace(shipped["reinforcement"], rollouts=256),
            episodes=400,
            seeds=(1, 2, 3),
        ),
        # Shows in minutes that every arm runs; nothing is learned.
        "smoke": Profile(
            tasks=("reach",),
            real=4,
            simulated=8,
            rlco=RlcoConfig(
                imitation=TrainerConfig(steps=20, batch_size=16), diffusion=small, iterations=1, anchor_batch=8, envs=4
            ),
            reinforcement=dataclasses.replace(smoke["reinforcement"], rollouts=4),
            episodes=4,
            seeds=(0,),
            image_size=16,
        ),
    }


def execute(which: Arm, profile: Profile, output: Path, device: str | None) -> str:
    """Do what is left of an arm; return what came out."""
    task, seed, name = which
    folder = output / f"{task}-{seed}"
    size = profile.image_size
    with alone(folder):
        real = demonstrate(folder / "real", task, profile.real, seed, image_size=size, randomization=GAP)
        simulated = demonstrate(
            folder / "simulated", task, profile.simulated, SIMULATED_SEED + seed, image_size=size,
            randomization=profile.rlco.randomization,
        )  # fmt: skip
    embodiment = Dataset.open(real).embodiment
    config, reinforcement, policy = profile.rlco, profile.reinforcement, None
    if name in IMITATIONS:
        config = dataclasses.replace(
            config, iterations=0, real_share=1.0 if name == "real_only" else config.real_share
        )  # fmt: skip
    else:
        policy = folder / BASELINE / "imitation"
        try:
            find_checkpoint(policy)
        except CheckpointError as error:
            raise SystemExit(f"the arm '{name}' begins with the policy of '{BASELINE}'; do that first") from error
        reinforcement = dataclasses.replace(reinforcement, anchor_weight=BETAS[name])
    results = Rlco(
        config, reinforcement, MeasurementConfig(episodes=profile.episodes, first_seed=FIRST_EPISODE, videos=2),
        demonstrations=[real], simulated=[simulated] if name != "real_only" else [],
        real=simulation(task, embodiment, min(16, profile.episodes), GAP),
        practice=simulation(task, embodiment, config.envs, config.randomization or "none"), output=folder / name,
        policy=policy, device=device, seed=seed, notify=say(f"{task}-{seed}-{name}"),
    ).run()  # fmt: skip
    return f"{results['final']['successes']}/{results['final']['n']}"


def held_out(task: str, seed: int, folder: Path, profile: Profile) -> Path:
    """As many real demonstrations again."""
    with alone(folder):
        return demonstrate(
            folder / "held_out", task, profile.real, HELD_OUT_SEED + seed, image_size=profile.image_size,
            randomization=GAP,
        )  # fmt: skip


def imitation_loss(run: Path, demonstrations: Path) -> float:
    """Mean loss of a policy on demonstrations, with the same noise for every policy."""
    loaded = load_policy(run, "cpu")
    windows, losses = open_training_data(demonstrations, loaded.config, hold_out=False).train, []
    for number, rows in enumerate(np.array_split(np.arange(len(windows)), -(-len(windows) // 128))):
        seed_everything(0, number)
        with torch.no_grad():
            losses.append(
                len(rows) * float(loaded.policy.loss(to_tensors(windows.batch(rows), torch.device("cpu")))["loss"])
            )
    return sum(losses) / len(windows)


def evaluation_of(name: str, folder: Path, world: str) -> Path:
    """Evaluation folder of an arm's final policy in a world, ``real`` or ``simulation``."""
    last = read_results(folder / name)["measurements"][-1]["policy"]
    return folder / name / "measurements" / last / world


def summarize(profile: Profile, output: Path, result: str) -> None:
    """Write the benchmark's JSON, named ``result``, from the finished arms."""
    arms, notes, comparisons, results = [], [], {}, []
    for task in profile.tasks:
        folders = {seed: output / f"{task}-{seed}" for seed in profile.seeds}
        done = {
            name: {seed: folder for seed, folder in folders.items() if read_results(folder / name)}
            for name in (*IMITATIONS, *BETAS)
        }
        results += [read_results(folder / name) for name, found in done.items() for folder in found.values()]
        for world in ("real", "simulation"):
            found: dict[str, Outcomes] = {
                name: read_outcomes({seed: evaluation_of(name, one, world) for seed, one in finished.items()})
                for name, finished in done.items()
            }
            for name, outcomes in found.items():
                further: dict[str, object] = {"world": world}
                if outcomes and world == "real":
                    losses = [
                        imitation_loss(folder / name / "policy", held_out(task, seed, folder, profile))
                        for seed, folder in done[name].items()
                    ]
                    further["imitation loss on other real demonstrations"] = sum(losses) / len(losses)
                if outcomes:
                    arms.append(arm(f"{task}, {world}: {name}", outcomes, found[BASELINE], **further))
            if found[OURS] and found[BASELINE] and world == "real":
                comparisons[task] = compare(found[OURS], found[BASELINE])
            for name in BETAS:
                if name != "beta_0" and found[name] and found["beta_0"]:
                    versus = compare(found[name], found["beta_0"])
                    low, high = versus["interval"]
                    notes.append(
                        f"{task}, {world}: {name} - beta_0 {100 * versus['difference']:+.1f} points [{100 * low:+.1f}, "
                        f"{100 * high:+.1f}], p = {versus['p_value']:.2g}"
                    )
    if not comparisons:
        print(f"no task has finished {OURS} and {BASELINE} yet")
        return
    task = min(comparisons, key=lambda one: comparisons[one]["difference"])
    store(
        result, "Does reinforcement in simulation, anchored on few real demonstrations, help in the real world?",
        f"{task}: success with the twin's hidden gap, beta 0.05", comparisons[task], BASELINE, arms,
        parts=parts_of(results), seeds=[*profile.seeds, FIRST_EPISODE], notes=notes,
    )  # fmt: skip


def main() -> None:
    """Do the arms that are left, then summarise."""
    known = profiles()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=known, default="cpu")
    parser.add_argument("--output", type=Path, default=None, help="work folder, resumable")
    parser.add_argument("--tasks", nargs="*", help="only these")
    parser.add_argument("--arms", nargs="*", help=f"only these; {BASELINE} before those with beta")
    parser.add_argument("--seeds", nargs="*", type=int, help="training seeds, with a result of their own")
    parser.add_argument("--jobs", type=int, help="arms at the same time; default: one per core, on a GPU one")
    parser.add_argument("--device", default=None)
    parser.add_argument("--summarize", action="store_true", help="only write the result of the finished arms")
    options = parser.parse_args()
    profile = known[options.profile]
    if options.seeds:
        profile = dataclasses.replace(profile, seeds=tuple(options.seeds))
    output = options.output or Path(f"outputs/benchmark_rlco_{options.profile}")
    if not options.summarize:
        tasks, names = options.tasks or profile.tasks, options.arms or (*IMITATIONS, *BETAS)
        arms = [(task, seed, name) for task in tasks for seed in profile.seeds for name in names]
        do = functools.partial(execute, profile=profile, output=output, device=options.device)
        do_arms(do, arms, BASELINE, options.jobs, options.device)
    if options.profile == "smoke":
        print("the profile smoke measures nothing; no result is written")
        return
    result = "rlco" if options.profile == "cpu" else f"rlco_{options.profile}"
    if options.seeds:
        result = "_seed".join([result, *map(str, options.seeds)])
    summarize(profile, output, result)


if __name__ == "__main__":
    main()
