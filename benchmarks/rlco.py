"""Does reinforcement in simulation help in the real world, and does the anchor on real demonstrations matter (RL-Co)?

    python benchmarks/rlco.py                     # profile cpu, resumable
    python benchmarks/rlco.py --profile gpu       # one GPU: three training seeds, 400 episodes
    python benchmarks/rlco.py --summarize         # only write benchmarks/results/rlco.json from what is finished

"Real" is the simulation with the hidden gap of the twin (standard: friction, mass, gains, latency, cameras, light,
noise), in this process. Arms, all with the same optimiser steps of imitation:

* real_only: imitation of the few real demonstrations;
* cotraining: imitation of real and simulated demonstrations, half of the windows from either;
* beta_0, beta_0.05, beta_0.2: the policy of cotraining, improved by reinforcement in the simulation, with this weight
  of the imitation loss on the real demonstrations.

The simulation does not know the gap, but is randomised. Every policy is measured on the same initial conditions with
the gap and in that simulation.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from cotraining_study import (
    Outcomes,
    arm,
    compare,
    demonstrate,
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
from simtoreal.policies.checkpoint import find_checkpoint
from simtoreal.policies.config import DiffusionConfig, TrainerConfig, VisionConfig
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.world_models.cotrain_config import MeasurementConfig, RlcoConfig
from simtoreal.world_models.rlco import Rlco

GAP = "standard"
IMITATIONS = ("real_only", "cotraining")
BETAS = {"beta_0": 0.0, "beta_0.05": 0.05, "beta_0.2": 0.2}
OURS, BASELINE = "beta_0.2", "cotraining"
# The settings were chosen on the demonstrations of training seed 0 and on the initial conditions from 5_000_000 on.
FIRST_EPISODE = 6_000_000
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


def execute(name: str, task: str, seed: int, profile: Profile, output: Path, device: str | None) -> None:
    """Do what is left of an arm."""
    folder = output / f"{task}-{seed}"
    size = profile.image_size
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
    Rlco(
        config, reinforcement, MeasurementConfig(episodes=profile.episodes, first_seed=FIRST_EPISODE, videos=2),
        demonstrations=[real], simulated=[simulated] if name != "real_only" else [],
        real=simulation(task, embodiment, min(16, profile.episodes), GAP),
        practice=simulation(task, embodiment, config.envs, config.randomization or "none"), output=folder / name,
        policy=policy, device=device, seed=seed, notify=say(f"{task}-{seed}-{name}"),
    ).run()  # fmt: skip


def evaluation_of(name: str, folder: Path, world: str) -> Path:
    """Evaluation folder of an arm's final policy in a world, ``real`` or ``simulation``."""
    results = read_results(folder / name)
    last = results["measurements"][-1]["policy"] if results else "base"
    return folder / name / "measurements" / last / world


def summarize(profile: Profile, output: Path, label: str) -> None:
    """Write the benchmark's JSON from the finished arms."""
    arms, notes, comparisons, results = [], [], {}, []
    for task in profile.tasks:
        folders = {seed: output / f"{task}-{seed}" for seed in profile.seeds}
        for world in ("real", "simulation"):
            found: dict[str, Outcomes] = {}
            for name in (*IMITATIONS, *BETAS):
                done = {seed: folder for seed, folder in folders.items() if read_results(folder / name)}
                found[name] = read_outcomes({seed: evaluation_of(name, one, world) for seed, one in done.items()})
                if world == "real":
                    results += [read_results(folder / name) for folder in done.values()]
            for name, outcomes in found.items():
                if outcomes:
                    arms.append(arm(f"{task}, {world}: {name}", outcomes, found[BASELINE], world=world))
            if found[OURS] and found[BASELINE] and world == "real":
                comparisons[task] = compare(found[OURS], found[BASELINE])
            if found[OURS] and found["beta_0"]:
                versus = compare(found[OURS], found["beta_0"])
                low, high = versus["interval"]
                notes.append(
                    f"{task}, {world}: {OURS} - beta_0 {100 * versus['difference']:+.1f} points [{100 * low:+.1f}, "
                    f"{100 * high:+.1f}], p = {versus['p_value']:.2g}"
                )
    if not comparisons:
        print(f"no task has finished {OURS} and {BASELINE} yet")
        return
    task = min(comparisons, key=lambda one: comparisons[one]["difference"])
    store(
        "rlco" if label == "cpu" else f"rlco_{label}",
        "Does reinforcement in simulation, anchored on few real demonstrations, help in the real world?",
        f"{task}: success with the twin's hidden gap, beta 0.2", comparisons[task], BASELINE, arms,
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
    parser.add_argument("--device", default=None)
    parser.add_argument("--summarize", action="store_true", help="only write the result of the finished arms")
    options = parser.parse_args()
    profile = known[options.profile]
    output = options.output or Path(f"outputs/benchmark_rlco_{options.profile}")
    if not options.summarize:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        for task in options.tasks or profile.tasks:
            for seed in profile.seeds:
                for name in options.arms or (*IMITATIONS, *BETAS):
                    execute(name, task, seed, profile, output, options.device)
                    final = read_results(output / f"{task}-{seed}" / name)["final"]
                    print(f"{task}-{seed}-{name}: {final['successes']}/{final['n']}", flush=True)
    if options.profile == "smoke":
        print("the profile smoke measures nothing; no result is written")
        return
    summarize(profile, output, options.profile)


if __name__ == "__main__":
    main()
