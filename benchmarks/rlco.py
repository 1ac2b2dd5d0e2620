"""Does reinforcement in simulation help in the real world, and does the anchor on real demonstrations matter (RL-Co)?

    python benchmarks/rlco.py                     # profile cpu, resumable, less than an hour on two cores
    python benchmarks/rlco.py --profile gpu       # one GPU: three training seeds, 400 episodes
    python benchmarks/rlco.py --summarize         # only write benchmarks/results/rlco.json from what is finished

"Real" is the simulation with the hidden gap of the twin (standard: friction, mass, gains, latency, cameras, light,
noise), in this process. Arms, all with the same optimiser steps of imitation:

* real_only: imitation of the few real demonstrations;
* cotraining: imitation of real and simulated demonstrations, half of the windows from either;
* beta_0, beta_0.05, beta_0.2: the policy of cotraining, improved by reinforcement in the simulation, with this weight
  of the imitation loss on the real demonstrations, as a log-probability;
* nominal_beta_0, nominal_beta_0.2: the same, in a simulation that is always the same, to see whether it is variation
  that keeps a policy without the anchor from forgetting.

The simulation does not know the gap, but is randomised (except for the last two). Every policy is measured on the same
initial conditions with the gap and in the simulation that it practised in.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

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
from simtoreal.policies.checkpoint import find_checkpoint
from simtoreal.policies.config import DiffusionConfig, TrainerConfig, VisionConfig
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.world_models.cotrain_config import MeasurementConfig, RlcoConfig
from simtoreal.world_models.rlco import Rlco

GAP = "standard"
IMITATIONS = ("real_only", "cotraining")
BETAS = {"beta_0": 0.0, "beta_0.05": 0.05, "beta_0.2": 0.2}
NOMINAL = {f"nominal_{name}": BETAS[name] for name in ("beta_0", "beta_0.2")}
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
        arms: which.
    """

    tasks: tuple[str, ...]
    real: int
    simulated: int
    rlco: RlcoConfig
    reinforcement: ReinforcementConfig
    episodes: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...] = (*IMITATIONS, *BETAS, *NOMINAL)
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
        # Less than an hour on two cores; the others, another hour, can be asked for.
        arms=(*IMITATIONS, *BETAS),
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
            arms=(*IMITATIONS, *BETAS, *NOMINAL),
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
        reinforcement = dataclasses.replace(reinforcement, anchor_weight=(BETAS | NOMINAL)[name])
    practice = config.randomization or "none" if name not in NOMINAL else "none"
    results = Rlco(
        config, reinforcement, MeasurementConfig(episodes=profile.episodes, first_seed=FIRST_EPISODE, videos=2),
        demonstrations=[real], simulated=[simulated] if name != "real_only" else [],
        real=simulation(task, embodiment, min(16, profile.episodes), GAP),
        practice=simulation(task, embodiment, config.envs, practice), output=folder / name,
        policy=policy, device=device, seed=seed, notify=say(f"{task}-{seed}-{name}"),
    ).run()  # fmt: skip
    return f"{results['final']['successes']}/{results['final']['n']}"


def evaluation_of(name: str, folder: Path, world: str, policy: str | None = None) -> Path:
    """Evaluation folder of an arm's ``policy``, by default its final one, in ``real`` or ``simulation``."""
    last = policy or read_results(folder / name)["measurements"][-1]["policy"]
    return folder / name / "measurements" / last / world


def summarize(profile: Profile, output: Path, label: str) -> None:
    """Write the benchmark's JSON from the finished arms."""
    arms, notes, comparisons, results = [], [], {}, []
    for task in profile.tasks:
        folders = {seed: output / f"{task}-{seed}" for seed in profile.seeds}
        done = {
            name: {seed: folder for seed, folder in folders.items() if read_results(folder / name)}
            for name in (*IMITATIONS, *BETAS, *NOMINAL)
        }
        results += [read_results(folder / name) for name, found in done.items() for folder in found.values()]
        for title, world, names in (
            ("real", "real", (*IMITATIONS, *BETAS, *NOMINAL)),
            ("simulation", "simulation", (*IMITATIONS, *BETAS)),
            ("nominal simulation", "simulation", (BASELINE, *NOMINAL)),
        ):
            found: dict[str, Outcomes] = {}
            for name in names:
                # The policy of cotraining did not meet the nominal simulation in its own arm.
                elsewhere = name == BASELINE and title == "nominal simulation"
                arm_of = next(iter(NOMINAL)) if elsewhere else name
                found[name] = read_outcomes(
                    {
                        seed: evaluation_of(arm_of, folder, world, "base" if elsewhere else None)
                        for seed, folder in done[arm_of].items()
                    }
                )
            for name, outcomes in found.items():
                if outcomes:
                    arms.append(arm(f"{task}, {title}: {name}", outcomes, found[BASELINE], world=title))
            if found.get(OURS) and found[BASELINE] and title == "real":
                comparisons[task] = compare(found[OURS], found[BASELINE])
            for anchored, free in ((OURS, "beta_0"), (f"nominal_{OURS}", "nominal_beta_0")):
                if found.get(anchored) and found.get(free):
                    versus = compare(found[anchored], found[free])
                    low, high = versus["interval"]
                    notes.append(
                        f"{task}, {title}: {anchored} - {free} {100 * versus['difference']:+.1f} points "
                        f"[{100 * low:+.1f}, {100 * high:+.1f}], p = {versus['p_value']:.2g}"
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
    parser.add_argument(
        "--arms", nargs="*", help=f"only these; {BASELINE} before those with beta, among which is beta_0.05"
    )
    parser.add_argument("--jobs", type=int, help="arms at the same time; default: one per core, on a GPU one")
    parser.add_argument("--device", default=None)
    parser.add_argument("--summarize", action="store_true", help="only write the result of the finished arms")
    options = parser.parse_args()
    profile = known[options.profile]
    output = options.output or Path(f"outputs/benchmark_rlco_{options.profile}")
    if not options.summarize:
        tasks, names = options.tasks or profile.tasks, options.arms or profile.arms
        arms = [(task, seed, name) for task in tasks for seed in profile.seeds for name in names]
        do = functools.partial(execute, profile=profile, output=output, device=options.device)
        do_arms(do, arms, BASELINE, options.jobs, options.device)
    if options.profile == "smoke":
        print("the profile smoke measures nothing; no result is written")
        return
    summarize(profile, output, options.profile)


if __name__ == "__main__":
    main()
