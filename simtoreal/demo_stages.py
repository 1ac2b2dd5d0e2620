"""The stages of the short demo, which learns and deploys a skill, and of the full one, which also improves it."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass

from simtoreal.pipeline import Stage

GAP = "standard"
# Varied cameras, light, dynamics and starts in the demonstrations: without them the gap costs a third of successes.
RANDOMIZATION = "training"
# The filter's name, also in the report.
FILTER = "compatible"
BASE_OPERATOR, SECOND_OPERATOR = "careful", "from_left"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How large a demo is. In flags, ``{presets}`` stands for where ``configs`` is installed.

    Attributes:
        demonstrations: episodes collected.
        image_size_px: camera resolution.
        policy_flags, baseline_flags: given to ``simtoreal train``.
        simulation_episodes: unseen initial conditions per policy.
        simulation_flags: given to ``simtoreal evaluate`` for the policy.
        robot_episodes: episodes on the twin, in real time.
    """

    demonstrations: int
    image_size_px: int
    policy_flags: tuple[str, ...]
    baseline_flags: tuple[str, ...]
    simulation_episodes: int
    robot_episodes: int
    simulation_flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FullProfile:
    """How large a full demo is.

    Attributes:
        demonstrations: MOVE episodes of the base operator, few enough that the policy leaves something to improve.
        second_operator: MOVE episodes of somebody who does it differently.
        still: episodes in a scene at rest. World models leave MOVE out, and their success classifier must see successes
            even if the policy has none yet.
        image_size_px: camera resolution.
        policy_flags: given to ``simtoreal train``.
        cotrain_flags: given to ``simtoreal cotrain``.
        robot_episodes: episodes on the twin, in real time, before and after.
        filter_flags: given to ``simtoreal data filter``.
    """

    demonstrations: int
    second_operator: int
    still: int
    image_size_px: int
    policy_flags: tuple[str, ...]
    cotrain_flags: tuple[str, ...]
    robot_episodes: int
    filter_flags: tuple[str, ...] = ()


_SMOKE_POLICY = (
    *("--policy", "diffusion", "--steps", "20"),
    *("--trainer.batch-size", "16", "--trainer.validate-every", "10"),
)

PROFILES = {
    # Shows in two minutes that everything runs; the policy learns next to nothing.
    "smoke": Profile(
        demonstrations=12,
        image_size_px=32,
        policy_flags=_SMOKE_POLICY,
        baseline_flags=(
            *("--policy", "bc", "--steps", "20"),
            *("--trainer.batch-size", "16", "--trainer.validate-every", "10"),
        ),
        simulation_episodes=4,
        robot_episodes=1,
        simulation_flags=("--videos", "1", "--no-outside"),
    ),
    "cpu": Profile(
        demonstrations=200,
        image_size_px=64,
        # The demonstrations go one way, so the more exact loss costs nothing (docs/diversity.md).
        policy_flags=("--config", "{presets}/policies/diffusion_cpu.yaml", "--diffusion.loss", "l1"),
        baseline_flags=("--config", "{presets}/policies/bc_cpu.yaml", "--steps", "2000"),
        simulation_episodes=100,
        robot_episodes=20,
    ),
    "gpu": Profile(
        demonstrations=400,
        image_size_px=96,
        policy_flags=("--config", "{presets}/policies/diffusion_gpu.yaml"),
        baseline_flags=("--config", "{presets}/policies/bc_cpu.yaml", "--trainer.batch-size", "256"),
        simulation_episodes=200,
        robot_episodes=20,
    ),
}

FULL_PROFILES = {
    "smoke": FullProfile(
        demonstrations=12,
        second_operator=4,
        still=6,
        image_size_px=32,
        policy_flags=_SMOKE_POLICY,
        cotrain_flags=("--config", "{presets}/cotrain/wovr_smoke.yaml"),
        robot_episodes=1,
        filter_flags=("--epochs", "5", "--minimum-steps", "100"),
    ),
    "cpu": FullProfile(
        demonstrations=20,
        second_operator=5,
        still=5,
        image_size_px=64,
        # Half as wide as the preset, since thousands of rollouts ask it.
        policy_flags=(
            *("--config", "{presets}/policies/diffusion_cpu.yaml", "--steps", "1500"),
            *("--trainer.batch-size", "32", "--diffusion.vision.widths", "16", "32", "32"),
        ),
        cotrain_flags=("--config", "{presets}/cotrain/wovr.yaml"),
        robot_episodes=50,
    ),
    # The small policy: imagination needs thousands of its rollouts.
    "gpu": FullProfile(
        demonstrations=40,
        second_operator=10,
        still=10,
        image_size_px=64,
        policy_flags=(
            *("--config", "{presets}/policies/diffusion_cpu.yaml"),
            *("--steps", "4000", "--trainer.batch-size", "128"),
        ),
        cotrain_flags=(
            *("--config", "{presets}/cotrain/wovr.yaml", "--wovr.imagined-envs", "256"),
            *("--wovr.imitation-rollouts", "300", "--wovr.rollouts", "1000", "--wovr.refresh-rollouts", "300"),
            *("--wovr.world-model-trainer.dynamics.steps", "3000"),
            *("--wovr.iterations", "100", "--reinforcement.rollouts", "256", "--measurement.episodes", "400"),
            *("--wovr.imitation.steps", "4000", "--wovr.imitation.batch-size", "128"),
        ),
        robot_episodes=50,
    ),
}


def demo_stages(profile: Profile, task: str, seed: int) -> list[Stage]:
    """Return the stages of the short demo, in order."""
    seeded = ("--seed", str(seed))
    data = ("--data", "{output}/demonstrations", "--resume", *seeded)
    evaluated = ("--task", task, "--episodes", str(profile.simulation_episodes))
    return [
        Stage(
            name="demonstrations",
            title=f"Collect {profile.demonstrations} demonstrations of {task}",
            command=(
                *("collect", "--task", task, "--episodes", str(profile.demonstrations)),
                *("--image-size", str(profile.image_size_px), "--randomization", RANDOMIZATION),
                *("--output", "{output}/demonstrations", *seeded),
            ),
        ),
        Stage(
            name="inspection",
            title="Inspect the demonstrations",
            command=("data", "inspect", "{output}/demonstrations", "--output", "{output}/inspection"),
            needs=("demonstrations",),
        ),
        Stage(
            name="policy",
            title="Train the image diffusion policy",
            command=("train", *data, "--output", "{output}/policy", *_located(profile.policy_flags)),
            needs=("demonstrations",),
        ),
        Stage(
            name="baseline",
            title="Train the baseline (behaviour cloning) on the same data",
            command=("train", *data, "--output", "{output}/baseline", *_located(profile.baseline_flags)),
            needs=("demonstrations",),
        ),
        Stage(
            name="simulation",
            title=f"Evaluate the policy on {profile.simulation_episodes} unseen initial conditions",
            command=(
                *("evaluate", "--policy", "{output}/policy", *evaluated),
                *("--output", "{output}/simulation", *profile.simulation_flags),
            ),
            needs=("policy",),
        ),
        Stage(
            name="baseline_simulation",
            title="Evaluate the baseline on the same initial conditions",
            command=(
                *("evaluate", "--policy", "{output}/baseline", *evaluated),
                *("--output", "{output}/baseline_simulation", "--videos", "1", "--no-outside"),
            ),
            needs=("baseline",),
        ),
        _deployment("robot", "{output}/policy", "", task, profile.robot_episodes, needs=("policy",)),
    ]


def full_stages(profile: FullProfile, task: str, seed: int) -> list[Stage]:
    """Return the stages of the full demo, in order."""

    def collection(name: str, style: str, episodes: int, number: int, scene: str, *flags: str) -> Stage:
        return Stage(
            name=name,
            title=f"Collect {episodes} demonstrations in {scene} by operator '{style}'",
            command=(
                *("collect", "--task", task, "--style", style, *flags, "--episodes", str(episodes)),
                *("--image-size", str(profile.image_size_px), "--seed", str(3 * seed + number)),
                *("--output", f"{{output}}/{name}"),
            ),
        )

    moving = "a moving scene", "--move"
    return [
        collection("demonstrations", BASE_OPERATOR, profile.demonstrations, 0, *moving),
        collection("second_operator", SECOND_OPERATOR, profile.second_operator, 1, *moving),
        collection("still", BASE_OPERATOR, profile.still, 2, "a scene at rest"),
        Stage(
            name="merged",
            title="Merge what both operators showed in the moving scene",
            command=(
                *("data", "merge", "{output}/demonstrations", "{output}/second_operator"),
                *("--output", "{output}/merged"),
            ),
            needs=("demonstrations", "second_operator"),
            resumes=False,
        ),
        # Writes into the dataset it judges, so that its own folder stays empty.
        Stage(
            name="filter",
            title=f"Find what contradicts the operator '{BASE_OPERATOR}'",
            command=(
                *("data", "filter", "{output}/merged", "--against", "{output}/demonstrations"),
                *("--output-name", FILTER, *profile.filter_flags),
            ),
            needs=("merged", "demonstrations"),
        ),
        Stage(
            name="policy",
            title="Train the image diffusion policy on what is compatible",
            command=(
                *("train", "--data", "{output}/merged", "--filter", FILTER, "--resume", "--seed", str(seed)),
                *("--output", "{output}/policy", *_located(profile.policy_flags)),
            ),
            needs=("merged", "filter"),
        ),
        Stage(
            name="cotrain",
            title="Improve the policy inside a world model of its rollouts (WoVR)",
            command=(
                *("cotrain", "--policy", "{output}/policy", "--demonstrations", "{output}/merged", "{output}/still"),
                *("--wovr.imitation-filter", FILTER, "--task", task, "--seed", str(seed)),
                # What is practised for is the robot, here the twin's gap without its clock: a thousand episodes in real
                # time would take hours.
                *("--real", GAP),
                *("--output", "{output}/cotrain"),
                *_located(profile.cotrain_flags),
            ),
            needs=("merged", "still", "policy"),
        ),
        _deployment("robot_before", "{output}/policy", "before: ", task, profile.robot_episodes, needs=("policy",)),
        _deployment(
            "robot_after", "{output}/cotrain/policy", "after: ", task, profile.robot_episodes, needs=("cotrain",)
        ),
    ]


def _deployment(name: str, policy: str, when: str, task: str, episodes: int, needs: tuple[str, ...]) -> Stage:
    return Stage(
        name=name,
        title=f"Deploy over ROS 2 to the '{GAP}' twin, {when}{episodes} episodes in real time",
        command=(
            *("deploy", "--policy", policy, "--task", task, "--gap", GAP),
            *("--episodes", str(episodes), "--output", f"{{output}}/{name}"),
        ),
        needs=needs,
    )


def _located(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Fill in where the presets are installed."""
    folder = str(importlib.resources.files("simtoreal.configs"))
    return tuple(flag.replace("{presets}", folder) for flag in flags)
