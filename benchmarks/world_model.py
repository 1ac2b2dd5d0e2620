"""How fast and how faithful is the video world model, and does it judge policies as the simulator does?

    python benchmarks/world_model.py                     # --profile cpu: under an hour on two cores; resumable
    python benchmarks/world_model.py --profile gpu       # one GPU, about 25 minutes
    python benchmarks/world_model.py --profile smoke     # a minute: everything runs, nothing is learned, nothing stored
    python benchmarks/world_model.py --speed             # minutes: only the speed; on a GPU of both presets

Demonstrations of a disturbed expert (failures included) and rollouts of weak policies train the model; fresh
demonstrations judge it open loop, to the end of every episode. Policies of different quality, the same one with more
and more training, are evaluated in the model and in MuJoCo from the same first frames; they learned from other
demonstrations than the weak ones. (Without rollouts of weak policies the model took every reach for a grasp, and
Pearson's r was .51.) Speed is that of imagined and decoded pictures (every camera counts), in the same run as a loop
over single episodes, in float32, of the same model. Both imagine chunks of eight actions.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import RESULTS, speed_arms, speed_headline, time_rounds, write_benchmark
from parts import part

from simtoreal.data_collection.dataset import META
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.rollouts import record_rollouts
from simtoreal.data_collection.writer import new_dataset
from simtoreal.envs import load_task, make_vector_env, rollout
from simtoreal.envs.config import build_config, read_yaml
from simtoreal.evaluation.policies import checkpoint_digest, load_actor
from simtoreal.policies.config import BCConfig, TrainerConfig
from simtoreal.policies.trainer import choose_precision, train
from simtoreal.policies.training_data import open_training_data
from simtoreal.world_models.checkpoint import LoadedWorldModel, load_world_model
from simtoreal.world_models.config import StageConfig, WorldModelConfig, WorldModelTrainerConfig
from simtoreal.world_models.contexts import Contexts
from simtoreal.world_models.disturbance import DisturbanceConfig, DisturbedActor
from simtoreal.world_models.evaluate import evaluate_world_model
from simtoreal.world_models.evaluate_page import write_page
from simtoreal.world_models.trainer import train_world_model
from simtoreal.world_models.video_data import VideoData, open_video_data

TASK = "pick_place"
# Apart from all seeds that anything was chosen on.
TRAINING_SEED, FRESH_SEED, POLICY_SEED, CONDITION_SEED = 2_000_000, 2_100_000, 2_200_000, 2_300_000
WEAK_SEED, WEAK_ROLLOUTS_SEED = 2_700_000, 2_800_000
OURS, EAGER = "batched", "eager, one episode after the other"
STEPWISE = "eager, one episode after the other, step by step"
# Actions that a policy announces and executes at once.
EXECUTED = 8
# Device -> preset -> episodes imagined together, where only the speed is measured.
SPEED_BATCHES = {"cpu": {"cpu": (64,)}, "cuda": {"cpu": (64, 512, 2048), "gpu": (64, 512)}}
PRESETS = Path(__file__).resolve().parent.parent / "configs" / "world_models"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much of everything.

    Attributes:
        preset: settings of the model.
        episodes, fresh: disturbed demonstrations to train on, and to judge with.
        weak_steps: training steps of the weak policies that the model learns from.
        weak_rollouts: of each of them.
        demonstrations: of an undisturbed expert, for the policies, weak or judged.
        policy_steps: training steps of each policy to be judged.
        judge_steps: of probe and judge.
        conditions: initial conditions per policy.
        batch: episodes imagined together for the speed.
        judged: episodes judged open loop.
    """

    preset: str
    episodes: int
    fresh: int
    weak_steps: tuple[int, ...]
    weak_rollouts: int
    demonstrations: int
    policy_steps: tuple[int, ...]
    judge_steps: int
    conditions: int
    batch: int
    judged: int


PROFILES = {
    "cpu": Profile(
        preset="cpu", episodes=240, fresh=80, weak_steps=(100, 200, 400), weak_rollouts=60, demonstrations=60,
        policy_steps=(100, 200, 300, 400, 500, 600, 800, 1600),
        judge_steps=3000, conditions=200, batch=64, judged=60,
    ),
    "gpu": Profile(
        preset="gpu", episodes=900, fresh=100, weak_steps=(100, 200, 400), weak_rollouts=200, demonstrations=100,
        policy_steps=(50, 100, 200, 400, 800, 1600, 3200),
        judge_steps=3000, conditions=400, batch=512, judged=80,
    ),
    "smoke": Profile(
        preset="cpu", episodes=12, fresh=4, weak_steps=(2,), weak_rollouts=4, demonstrations=6,
        policy_steps=(2, 3, 4), judge_steps=3, conditions=4,
        batch=4, judged=4,
    ),
}  # fmt: skip


def collect(folder: Path, episodes: int, seed: int, *, disturbed: bool) -> Path:
    """Record episodes of the expert, failures included, unless they are there; an interrupted recording begins anew."""
    if (folder / META).is_file():
        return folder
    slots = min(32, episodes)
    env = make_vector_env(TASK, slots, image_size=64)
    actor: Any = ScriptedExpert(env.task, env.embodiment)
    if disturbed:
        columns = [env.task.object_state_names.index(f"{item.name}_x") for item in env.task.objects]
        actor = DisturbedActor(actor, columns, DisturbanceConfig())
    with new_dataset(folder, env.embodiment, {env.task.name: env.task.to_dict()}) as writer:
        recorder = Recorder(
            memory_takes(writer), task=env.task.name, embodiment=env.embodiment, source="expert",
            operator="clumsy" if disturbed else "expert", keep=lambda result: disturbed or result.success,
        )  # fmt: skip
        rollout(env, actor, range(seed, seed + episodes), listeners=[recorder])
    env.close()
    return folder


def collect_weak(profile: Profile, output: Path) -> list[Path]:
    """Train the weak policies and record their rollouts, whatever becomes of them."""
    data = collect(output / "weak_demonstrations", profile.demonstrations, WEAK_SEED, disturbed=False)
    folders = []
    runs = train_policies(profile.weak_steps, data, output / "weak", WEAK_SEED)
    for number, run in enumerate(runs):
        folders.append(output / f"weak_rollouts_{number}")
        loaded, actor = load_actor(run, device="cpu")
        env = make_vector_env(TASK, min(20, profile.weak_rollouts), embodiment=loaded.embodiment)
        first = WEAK_ROLLOUTS_SEED + number * profile.weak_rollouts
        record_rollouts(
            env, actor, range(first, first + profile.weak_rollouts), folders[-1], task=env.task, operator=run.name,
            settings={"checkpoint": checkpoint_digest(loaded.folder)},
        )  # fmt: skip
        env.close()
    return folders


def model_settings(preset: str, smoke: bool) -> tuple[WorldModelConfig, WorldModelTrainerConfig]:
    """Settings of the shipped preset."""
    content = read_yaml(PRESETS / f"{preset}.yaml")
    model = build_config(WorldModelConfig, content["model"], source=preset)
    trainer = build_config(WorldModelTrainerConfig, content["trainer"], source=preset)
    if smoke:
        moment = StageConfig(steps=2, batch_size=4)
        trainer = dataclasses.replace(trainer, tokenizer=moment, dynamics=moment, classifier=moment)
        generated = dataclasses.replace(model.classifier, generated_episodes=2)
        model = dataclasses.replace(model, classifier=generated)
    return model, trainer


def settings_of(profile: Profile) -> dict[str, Any]:
    """What decides the quality of the model and of its judgement, see :func:`~parts.find_part`."""
    model, trainer = model_settings(profile.preset, profile is PROFILES["smoke"])
    seeds = [TRAINING_SEED, FRESH_SEED, POLICY_SEED, CONDITION_SEED, WEAK_SEED, WEAK_ROLLOUTS_SEED]
    return {
        "profile": profile, "task": load_task(TASK), "disturbance": DisturbanceConfig(), "model": model,
        "trainer": trainer, "policy": BCConfig(), "policy_trainer": TrainerConfig(), "seeds": seeds,
    }  # fmt: skip


def measure_speed(loaded: LoadedWorldModel, data: VideoData, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Time imagined and decoded pictures: batched as in the environment, and one episode at a time in float32.

    The latter in chunks like the former, and in single steps, as an environment does that is not told what comes.
    """
    model = loaded.model
    episodes = np.resize(np.flatnonzero(data.ends - data.starts > steps), batch)
    contexts = Contexts(model, data, [(int(episode), 0) for episode in episodes])
    ahead = data.starts[episodes, None] + np.arange(steps)
    commands = model.scale_commands(
        torch.from_numpy(data.actions[ahead]).to(model.device), torch.from_numpy(data.targets[ahead]).to(model.device)
    )
    half = choose_precision("auto", model.device) == "bf16"

    def imagine(rows: torch.Tensor, enabled: bool, executed: int = EXECUTED) -> None:
        state = contexts.state.rows(rows)
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=enabled):
            for part in commands[rows].split(executed, 1):
                state, latents, _ = model.imagine(state, part)
                # To main memory, as a policy or a person would see them.
                model.decode(latents.flatten(0, 1)).cpu()

    def ours() -> None:
        imagine(torch.arange(batch), half)

    def eager(executed: int) -> None:
        for row in range(min(batch, 2)):
            imagine(torch.tensor([row]), False, executed)

    arms: dict[str, Callable[[], None]] = {OURS: ours, EAGER: lambda: eager(EXECUTED), STEPWISE: lambda: eager(1)}
    seconds = time_rounds(arms, rounds)
    one = float(min(batch, 2) * steps * model.views)
    units = {OURS: float(batch * steps * model.views), EAGER: one, STEPWISE: one}
    headline = speed_headline("imagined and decoded pictures/s", seconds, units, OURS, EAGER)
    return {"headline": headline, "arms": speed_arms(seconds, units)}


def compare_speeds(output: Path) -> None:
    """Measure the speed on this device and store it; speed does not depend on what a model learned."""
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = open_video_data([collect(output / "data", PROFILES["smoke"].episodes, FRESH_SEED, disturbed=True)])
    arms, headlines, sizes = [], {}, []
    for preset, batches in SPEED_BATCHES[device].items():
        result = train_world_model(*model_settings(preset, True), data, output / preset, resume=True)
        loaded = load_world_model(output / preset, device)
        sizes.append(f"{preset} {loaded.model.config.dynamics.kind}, {result.parameters / 1e6:.2f} M parameters")
        for batch in batches:
            speed = measure_speed(loaded, data, batch, 7, 32)
            headlines[preset, batch] = speed["headline"]
            arms += [{**row, "name": f"preset {preset}, batch {batch}, {row['name']}"} for row in speed["arms"]]
    for row in arms:
        print(f"{row['name']}: {row['value']:.0f}/s", flush=True)
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    path = write_benchmark(
        f"world_model_speed_{device}", "How many pictures per second does the world model imagine and decode?",
        headlines["cpu", SPEED_BATCHES[device]["cpu"][-1]], arms, seconds=time.perf_counter() - begin,
        seeds=[FRESH_SEED],
        notes=f"On one {name}, bfloat16; {'; '.join(sizes)}. Two 64-pixel cameras, chunks of eight actions, 32 steps, "
        "pictures copied to main memory. Barely trained weights: speed does not depend on them.",
    )  # fmt: skip
    print(f"stored in {path}")


def train_policies(lengths: Sequence[int], data: Path, output: Path, seed: int) -> list[Path]:
    """The same policy, trained for longer and longer."""
    runs = []
    for steps in lengths:
        config = BCConfig()
        schedule = TrainerConfig(steps=steps, warmup_steps=min(100, steps), seed=seed + steps)
        windows = open_training_data(data, config)
        runs.append(train(config, schedule, windows, output / f"steps{steps}", resume=True, progress=True).run)
    return runs


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder; default: outputs/benchmark_world_model_PROFILE"
    )
    parser.add_argument("--speed", action="store_true", help="only the speed, on this device")
    options = parser.parse_args()
    if options.speed:
        compare_speeds(options.output or Path("outputs/benchmark_world_model_speed"))
        return
    profile, smoke = PROFILES[options.profile], options.profile == "smoke"
    output = options.output or Path("outputs") / f"benchmark_world_model_{options.profile}"
    with part(output, settings_of(profile)) as made:
        trained_on = [collect(output / "data", profile.episodes, TRAINING_SEED, disturbed=True)]
        trained_on += collect_weak(profile, output)
        fresh = collect(output / "fresh", profile.fresh, FRESH_SEED, disturbed=True)
        demonstrations = collect(output / "demonstrations", profile.demonstrations, POLICY_SEED, disturbed=False)
        model_config, trainer = model_settings(profile.preset, smoke)
        result = train_world_model(
            model_config, trainer, open_video_data(trained_on), output / "model", resume=True, progress=True
        )
        policies = train_policies(profile.policy_steps, demonstrations, output / "policies", POLICY_SEED)
        found = evaluate_world_model(
            output / "model", [*trained_on, fresh], output / "evaluation", policies=policies, episodes=profile.judged,
            judge_steps=profile.judge_steps, conditions=profile.conditions, first_seed=CONDITION_SEED, progress=True,
        )  # fmt: skip
    begin = time.perf_counter()
    page = write_page(found, output / "evaluation")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed = measure_speed(
        load_world_model(output / "model", device), open_video_data([fresh]), profile.batch, 1 if smoke else 7,
        4 if smoke else 30,
    )  # fmt: skip
    arms = [*speed["arms"], *quality_arms(found)]
    for arm in arms:
        print(f"{arm['name']}: {arm['value']}")
    if smoke:
        print(f"smoke run only, nothing stored; page {page}")
        return
    name = "world_model" if options.profile == "cpu" else f"world_model_{options.profile}"
    notes = [
        f"{options.profile} profile on {device}, {model_config.dynamics.kind} dynamics, "
        f"{result.parameters / 1e6:.2f} M parameters, trained for {result.seconds:.0f} s on {profile.episodes} "
        f"episodes of {TASK} by a disturbed expert and {len(profile.weak_steps) * profile.weak_rollouts} of weak "
        f"policies, two 64-pixel cameras, batch {profile.batch}.",
        "Positions: mean error over all imagined frames to the end of the episode, read by a probe whose own error is "
        f"the floor; {found['episodes']['judged']} fresh episodes. One training seed.",
        *found["warnings"],
    ]
    path = write_benchmark(
        name, "How fast and how faithful is the video world model, and does it judge policies as the simulator does?",
        speed["headline"], arms, seconds=time.perf_counter() - begin, parts=[made], notes=" ".join(notes),
        seeds=[TRAINING_SEED, FRESH_SEED, POLICY_SEED, CONDITION_SEED, WEAK_SEED, WEAK_ROLLOUTS_SEED],
    )  # fmt: skip
    print(f"stored in {path} ({RESULTS}); page {page}")


def quality_arms(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: what was measured open loop, and the validity as a judge of policies."""
    arms = []

    def add(name: str, entry: dict[str, Any] | None, scale: float = 1.0) -> None:
        if entry is not None and entry["mean"] is not None:
            interval = [scale * value for value in entry["interval"]] if entry["interval"] else None
            arms.append({"name": name, "value": scale * entry["mean"], "n": entry["n"], "interval": interval})

    add("PSNR, dB", found["psnr_db"])
    for name, entry in (found["positions"] or {}).items():
        for suffix, text in (("", ""), ("_moved", ", episodes in which it moves")):
            if entry.get(f"imagined{suffix}"):
                add(f"{name} error{text}, mm", entry[f"imagined{suffix}"], 1000)
                add(f"{name} error{text}, floor of the probe, mm", entry[f"floor{suffix}"], 1000)
    for name in ("imagined", "swapped"):
        entry = found["actions"].get(name)
        if entry and entry["following"] is not None:
            row = {"name": f"action following, {name} (1: as real videos)", "value": entry["following"]}
            arms.append({**row, "n": found["episodes"]["judged"], "interval": None})
    for rule, rates in (found["violations"] or {}).items():
        for name in ("imagined", "real"):
            row = {"name": f"episodes in which an object {rule}, {name}", "value": rates[name]["rate"]}
            arms.append({**row, "n": rates[name]["n"], "interval": rates[name]["interval"]})
    policies = found.get("policies")
    if policies:
        for name in ("pearson_r", "mean_bias", "mmrv"):
            row = {"name": f"{policies['policies']} policies: {name}", "value": policies[name]}
            arms.append({**row, "n": policies["n"], "interval": policies[f"{name}_interval"]})
        for row in policies["rows"]:
            for world in ("simulation", "imagined"):
                rate = row[world]
                arms.append(
                    {"name": f"{Path(row['path']).name}, {world}", "value": rate["success_rate"], "n": rate["n"],
                     "interval": rate["interval"]}
                )  # fmt: skip
    return arms


if __name__ == "__main__":
    main()
