"""Co-training of a policy and the world model that it learns in (WoVR, arXiv 2602.13977).

collect with the policy -> train world model and success classifier -> reinforcement in imagination, beginning in first
frames and key frames (KIR) -> collect with the improved policy -> train model and classifier on (PACE) -> go on.
Before and after every reinforcement, imagined success is held against real success on the same initial conditions.

Not part of the paper: the loop may begin with what the base policy really succeeds in. With ``imitation_rollouts`` it
collects, and a policy that learned from the demonstrations and from these successes (filtered behaviour cloning) takes
its place. With no iterations of reinforcement that is all, and no world model is trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.rollouts import record_rollouts
from simtoreal.data_collection.writer import lock_folder
from simtoreal.envs.rollout import Actor
from simtoreal.evaluation.evaluate import task_digest
from simtoreal.evaluation.policies import checkpoint_digest
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.checkpoint import LoadedPolicy, find_checkpoint, load_policy, plain_config
from simtoreal.policies.config import TrainerConfig
from simtoreal.policies.exploring_actor import ExploringActor, require_denoising
from simtoreal.policies.mixed_windows import find_filter, open_mixed_data
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.policies.reinforcement_run import reinforce
from simtoreal.policies.trainer import train
from simtoreal.world_models.checkpoint import load_world_model
from simtoreal.world_models.cotrain_anchor import anchor_on, demonstrated_seeds
from simtoreal.world_models.cotrain_config import MeasurementConfig, WovrConfig
from simtoreal.world_models.cotrain_measurement import (
    MEASUREMENTS,
    Measurements,
    World,
    require_same_embodiment,
    require_task,
)
from simtoreal.world_models.cotrain_report import write_report
from simtoreal.world_models.cotrain_stages import (
    DEMONSTRATIONS,
    IMAGINATION,
    LEARNING,
    REAL,
    Stages,
    adopt_stages,
    steps_taken,
)
from simtoreal.world_models.imagined_starts import ImaginedReinforcement, ImaginedStarts
from simtoreal.world_models.keyframes import find_keyframes
from simtoreal.world_models.reward_calibration import calibrate_reward, save_calibrated
from simtoreal.world_models.stages import evenly_chosen
from simtoreal.world_models.trainer import train_world_model
from simtoreal.world_models.vector_env import WorldModelVectorEnv, require_no_failure, require_shown
from simtoreal.world_models.video_data import VideoData, open_video_data
from simtoreal.world_models.world_model import require_possible

IMITATION, IMITATION_ROLLOUTS = "imitation", "imitation_rollouts"


class Wovr:
    """One co-training; :meth:`run` does what is left of it.

    Args:
        config: sizes of the loop.
        reinforcement: how the policy is improved.
        measurement: how success is measured.
        policy: run or checkpoint folder of the policy to begin with, of a type with a denoising chain.
        demonstrations: dataset folders; the world model learns from them too.
        real: the world that counts. Its environment is asked for rollouts, and reset to measure.
        output: folder.
        world_model: world model to train on instead of a new one.
        device: torch device; None picks a GPU if there is one.
        seed: decides everything that the settings leave open.
        notify: told what happens, a line at a time.
        progress: draw progress bars of the trainings.

    Raises:
        ConfigError: the folder holds another co-training, the policy cannot be improved or reads what no world model
            shows, no world model can be made of its cameras, its training data overlap with the initial conditions of
            the measurements, or no folder has the filter.
        CheckpointError, DatasetError: policy, world model or data are missing or damaged.
        EmbodimentMismatchError: they are of different embodiments or render profiles.
    """

    def __init__(
        self,
        config: WovrConfig,
        reinforcement: ReinforcementConfig,
        measurement: MeasurementConfig,
        *,
        policy: Path,
        demonstrations: Sequence[Path],
        real: World,
        output: Path,
        world_model: Path | None = None,
        device: str | None = None,
        seed: int = 0,
        notify: Callable[[str], None] = lambda text: None,
        progress: bool = False,
    ) -> None:
        self.config, self.reinforcement = config, dataclasses.replace(reinforcement, seed=seed)
        self.measurement, self.policy, self.demonstrations = measurement, Path(policy), list(demonstrations)
        self.real, self.output, self.world_model = real, Path(output), world_model
        self.device, self.seed, self.notify, self.progress = device, seed, notify, progress
        self.loaded = load_policy(policy)
        require_denoising(self.loaded.policy, reinforcement.denoising_steps, f"policy {policy}")
        # A world model that does not fit, or data that are not there, must not be found out an hour from now.
        if config.iterations:
            require_no_failure(real.task)
            require_shown(self.loaded.config.keys, self.loaded.embodiment, f"policy {policy}")
            if world_model is None:
                require_possible(config.world_model, self.loaded.embodiment, f"policy {policy}")
        datasets = [Dataset.open(path, embodiment=self.loaded.embodiment) for path in self.demonstrations]
        require_task(datasets, real.task)
        self.data_sizes = [
            (len(dataset.episodes), sum(episode.steps for episode in dataset.episodes)) for dataset in datasets
        ]
        find_filter(self.demonstrations, config.imitation_filter)
        if world_model is not None:
            require_same_embodiment(self.loaded, world_model)
        self.measurements = Measurements(measurement, real, self.output, device, seed, config.imagined_envs)
        self.measurements.require_unseen(self.policy)
        if world_model is not None:
            self.measurements.require_new_to(world_model)
        self.measurements.require_apart(demonstrated_seeds(self.demonstrations), "the demonstrations began in")
        own = config.imitation_rollouts + config.rollouts + config.refreshes * config.refresh_rollouts
        self.measurements.require_apart(
            range(config.first_seed, config.first_seed + own), "rollouts are going to begin in (wovr.first_seed)"
        )
        self._data: tuple[int, VideoData] | None = None

    def adopt(self, source: Path, stages: Sequence[str], varied: Sequence[str] = ()) -> None:
        """Begin with finished ``stages`` of the co-training in ``source``, if nothing is here yet.

        Args:
            source: folder of the other co-training.
            stages: names.
            varied: settings that may differ there, because none of these stages depends on them.

        Raises:
            ConfigError: a stage is not finished there, or other settings differ.
        """
        adopt_stages(source, self.output, stages, self._settings(), varied)

    def run(self) -> dict[str, Any]:
        """Do the stages that are left; return and write the results."""
        with contextlib.closing(lock_folder(self.output)), contextlib.closing(self.measurements):
            self.stages = Stages(self.output, self._settings(), self.notify)
            self._count_demonstrations()
            current, model, real = self.policy, self.world_model, "base"
            self._measure_real("base", current, 0)
            if self.config.imitation_rollouts:
                current, real = self._imitate(current), IMITATION
            for turn in range(self.config.refreshes + 1 if self.config.iterations else 0):
                self._collect_turn(turn, current)
                model = self._learn_world(turn, model)
                if self.config.calibrated_episodes:
                    model = self._calibrate(turn, current, model)
                # What the policy would gain from what the model believes, before it could exploit it.
                self._measure_imagined(f"model_{turn}", current, model, turn * self.config.iterations, real)
                if self.config.ranked_starts:
                    self._rank(turn, current, model)
                current, real = self._improve(turn, current, model), f"policy_{turn}"
            return write_report(
                self.stages, self._settings(), self.measurements, base="base", final=real, policy=current
            )

    def _settings(self) -> dict[str, Any]:
        return {
            "method": "wovr", "task": self.real.task.name, "task_digest": task_digest(self.real.task),
            "real": dict(self.real.settings), "seed": self.seed,
            "policy": checkpoint_digest(self.loaded.folder),
            "demonstrations": [list(size) for size in self.data_sizes],
            "world_model": checkpoint_digest(find_checkpoint(self.world_model)) if self.world_model else None,
            **{
                name: plain_config(value)
                for name, value in (
                    ("wovr", self.config), ("reinforcement", self.reinforcement), ("measurement", self.measurement),
                )
            },
        }  # fmt: skip

    # Stages -----------------------------------------------------------------------------------------------

    def _count_demonstrations(self) -> None:
        episodes, steps = (sum(sizes) for sizes in zip(*self.data_sizes, strict=True)) if self.data_sizes else (0, 0)
        taken = [steps_taken(REAL, DEMONSTRATIONS, episodes, steps)]
        self.stages.run("demonstrations", "counting the demonstrations", lambda: {"taken": taken})

    def _imitate(self, base: Path) -> Path:
        """Train a policy on the demonstrations and on the real successes of the base policy, and measure it."""
        config, run = self.config, self.output / IMITATION
        self._collect(IMITATION_ROLLOUTS, "the base policy", base, config.imitation_rollouts, 0, explore=False)

        def work() -> dict[str, Any]:
            rollouts = self.output / IMITATION_ROLLOUTS
            succeeded = any(one.success for one in Dataset.open(rollouts).episodes)
            folders = [*self.demonstrations, rollouts] if succeeded else self.demonstrations
            policy, kept = self.loaded.config, config.imitation_filter
            data = open_mixed_data(folders, (), policy, real_share=1.0, filter=kept)
            trainer = self._imitation_trainer()
            result = train(policy, trainer, data, run, resume=True, device=self.device, progress=self.progress)
            return {
                "training_seconds": result.seconds, "validation_error": result.validation_error,
                "steps": trainer.steps, "batch_size": trainer.batch_size,
            }  # fmt: skip

        self.stages.run(IMITATION, "imitating the demonstrations and the real successes", work, IMITATION)
        self._measure_real(IMITATION, run, 0)
        return run

    def _imitation_trainer(self) -> TrainerConfig:
        """The training ``imitation``, or one as long as the base policy's if that learned from more samples: what takes
        its place should not have learned less."""
        trainer = dataclasses.replace(self.config.imitation, seed=self.config.imitation.seed + self.seed)
        own = self.loaded.training.get("trainer") or {}
        steps, batch = (own.get(name, 0) for name in ("steps", "batch_size"))
        if steps * batch <= trainer.steps * trainer.batch_size:
            return trainer
        self.notify(
            f"imitation takes {steps} steps of {batch}, as the training of the base policy did, instead of "
            f"{trainer.steps} of {trainer.batch_size}"
        )
        return dataclasses.replace(trainer, steps=steps, batch_size=batch)

    def _collect_turn(self, turn: int, policy: Path) -> None:
        config = self.config
        before = config.imitation_rollouts
        if turn == 0:
            who = "the imitating policy" if before else "the base policy"
            self._collect("rollouts_0", who, policy, config.rollouts, before, explore=config.explore)
            return
        before += config.rollouts + (turn - 1) * config.refresh_rollouts
        who, count = "the improved policy (PACE)", config.refresh_rollouts
        self._collect(f"rollouts_{turn}", who, policy, count, before, explore=config.explore)

    def _collect(self, name: str, who: str, policy: Path, count: int, before: int, *, explore: bool) -> None:
        """Record ``count`` real episodes, the first of which is number ``before`` of all."""
        first = self.config.first_seed + before
        seeds = range(first, first + count)

        def work() -> dict[str, Any]:
            loaded = load_policy(policy, self._torch_device())
            actor = self._actor(loaded, explore)
            settings = {"checkpoint": checkpoint_digest(loaded.folder), "explored": explore, **self.real.settings}
            outcomes = record_rollouts(
                self.measurements.env(), actor, seeds, self.output / name, task=self.real.task,
                operator=loaded.config.type, settings=settings,
            )  # fmt: skip
            successes, steps = (sum(getattr(one, key) for one in outcomes) for key in ("success", "steps"))
            return {
                "taken": [steps_taken(REAL, LEARNING, count, steps)],
                "successes": successes, "dropped": sum(not one.stored for one in outcomes),
            }  # fmt: skip

        self.stages.run(name, f"collecting {count} real episodes of {who}", work, name)

    def _actor(self, loaded: LoadedPolicy, explore: bool) -> Actor:
        # As in reinforcement, with its denoising steps.
        require_denoising(loaded.policy, self.reinforcement.denoising_steps)
        if explore:
            return ExploringActor(loaded.policy, self.reinforcement.exploration, self.seed)  # type: ignore[arg-type]
        return PolicyActor(loaded.policy, self.seed)

    def _learn_world(self, turn: int, initial: Path | None) -> Path:
        run = self.output / f"world_model_{turn}"

        def work() -> dict[str, Any]:
            trainer = self.config.world_model_trainer
            result = train_world_model(
                self.config.world_model, dataclasses.replace(trainer, seed=trainer.seed + self.seed + turn),
                self._episodes(turn), run, initial=initial, resume=True, device=self.device, progress=self.progress,
            )  # fmt: skip
            found = {name: f"{value:.0f}" for name, value in result.metrics.items()}
            which = "that it learned from" if result.metrics["classifier_judged_on_training"] else "that were held out"
            self.notify(
                f"of real episodes {which}, it calls {found['classifier_false_positives']} of "
                f"{found['classifier_failures']} failures a success, and misses "
                f"{found['classifier_false_negatives']} of {found['classifier_successes']} successes"
            )
            return {"metrics": result.metrics, "training_seconds": result.seconds}

        new = "training a world model" if initial is None else "training the world model on"
        self.stages.run(f"world_model_{turn}", f"{new} with {self._frames_of(turn)}", work, run.name)
        return run

    def _calibrate(self, turn: int, policy: Path, model: Path) -> Path:
        """Let the policy that collected succeed as often in imagination as it really did."""
        run = self.output / f"calibrated_model_{turn}"

        def work() -> dict[str, Any]:
            data, loaded = self._episodes(turn), load_world_model(model, self._torch_device())
            collected = f"{Dataset.open(self.output / f'rollouts_{turn}').path}/"
            own = np.flatnonzero([name.startswith(collected) for name in data.names])
            episodes = evenly_chosen(own, self.config.calibrated_episodes)
            env = WorldModelVectorEnv(
                loaded, min(self.config.imagined_envs, len(episodes)), data,
                places=[(int(episode), 0) for episode in episodes], task=self.real.task,
            )  # fmt: skip
            actor = self._actor(load_policy(policy, self._torch_device()), self.config.explore)
            found, steps = calibrate_reward(env, actor, data.success[episodes])
            save_calibrated(loaded, found, run)
            self.notify(
                f"success counts from a probability of {found['threshold']:.3f} on (before: {found['before']:.3f}): "
                f"of {len(episodes)} real episodes {100 * found['real']:.0f} % succeeded, imagined are "
                f"{100 * found['imagined']:.0f} % (before: {100 * found['imagined_before']:.0f} %)"
            )
            return {
                "taken": [steps_taken(IMAGINATION, LEARNING, len(episodes), steps)],
                "calibration": {"world_model": run.name, **found},
            }

        title = f"imagining up to {self.config.calibrated_episodes} of the policy's real episodes anew"
        self.stages.run(f"calibrate_model_{turn}", title, work, run.name)
        return run

    def _improve(self, turn: int, policy: Path, model: Path) -> Path:
        """Reinforcement in imagination, with measurements on the way and at the end."""
        run = self.output / f"reinforcement_{turn}"
        begun, end = turn * self.config.iterations, (turn + 1) * self.config.iterations
        every = self.measurement.every or self.config.iterations
        before = begun
        for target in [*range(begun + every, end, every), end]:
            last = target == end
            self._reinforce(turn, before, target, run, policy, model)
            before = target
            name = f"policy_{turn}" if last else f"policy_{turn}_{target}"
            measured = run if last else self.measurements.keep(name, run)
            self._measure_real(name, measured, target)
            self._measure_imagined(f"imagined_{name}", measured, model, target, name, videos=last)
        return run

    def _reinforce(self, turn: int, before: int, target: int, run: Path, policy: Path, model: Path) -> None:
        config = self.config

        def work() -> dict[str, Any]:
            data = self._episodes(turn)
            loaded = load_world_model(model, self._torch_device())
            keyframes = ()
            if config.keyframes.share > 0:
                keyframes = find_keyframes(
                    data, config.keyframes, memory=loaded.model.memory, horizon=self.real.task.horizon, seed=self.seed
                )
            starts = ImaginedStarts(data, keyframes, config.keyframes.share, self.seed)
            count = min(config.imagined_envs, self.reinforcement.rollouts)
            env = WorldModelVectorEnv(
                loaded, count, data, places=starts.places, task=self.real.task, graded=config.graded
            )  # fmt: skip
            result = reinforce(
                policy, self.reinforcement, env, run, iterations=target, previous=policy if turn else None,
                starts=starts,
                anchor=anchor_on(self.demonstrations, config.anchor_batch, self.seed, filter=config.imitation_filter),
                learner=lambda policy, config, anchor: ImaginedReinforcement(policy, config, starts, anchor),
                seeds=data.seeds, device=self.device,
                on_iteration=self._say,
            ).since(before)  # fmt: skip
            reasons = [one.reason for one in keyframes]
            return {
                "taken": [steps_taken(IMAGINATION, LEARNING, result.rollouts, result.control_steps)],
                "run": str(run.relative_to(self.output)), "dropped_rollouts": result.dropped_rollouts,
                "contexts": {
                    "beginnings": starts.beginnings, "keyframes": starts.keyframes,
                    "reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
                },
            }  # fmt: skip

        title = f"reinforcement in imagination up to iteration {target}"
        self.stages.run(f"reinforcement_{turn}_{target}", title, work, run.name)

    def _measure_real(self, name: str, policy: Path, iteration: int) -> None:
        def work() -> dict[str, Any]:
            rate, taken = self.measurements.in_world(name, policy)
            where = {"iteration": iteration, "policy": name, "run": self.measurements.name_of(policy)}
            return {"taken": [taken], "measurement": {**where, "real": rate}}

        title = f"measuring {name} in {self.measurement.episodes} real episodes"
        self.stages.run(f"measure_{name}", title, work, f"{MEASUREMENTS}/{name}")

    def _measure_imagined(
        self, name: str, policy: Path, model: Path, iteration: int, real: str, *, videos: bool = False
    ) -> None:
        def work() -> dict[str, Any]:
            folder = self.measurements.folder(real, REAL)
            gap, taken = self.measurements.imagined(name, policy, model, real=folder)
            entries, paths = [taken], []
            if videos:
                paths, shown = self.measurements.film(name, policy, model)
                entries.append(shown)
            where = {
                "iteration": iteration, "policy": real, "run": self.measurements.name_of(policy),
                "world_model": str(model.relative_to(self.output)),
            }  # fmt: skip
            return {"taken": entries, "measurement": {**where, **gap}, "videos": paths}

        title = f"imagining the same {self.measurement.episodes} episodes"
        self.stages.run(f"measure_{name}", title, work, f"{MEASUREMENTS}/{name}")

    def _rank(self, turn: int, policy: Path, model: Path) -> None:
        name, starts = f"rank_model_{turn}", min(self.config.ranked_starts, self.measurement.episodes)

        def work() -> dict[str, Any]:
            found, taken = self.measurements.ranked(
                name, policy, model, self.reinforcement, starts, graded=self.config.graded
            )
            if found["same_start"] is not None:
                self.notify(
                    f"of a success and a failure from the same start, the model tells which is which in "
                    f"{100 * found['same_start']:.0f} % of {found['same_start_pairs']} pairs (chance: 50 %)"
                )
            return {"taken": [taken], "ranking": {"world_model": str(model.relative_to(self.output)), **found}}

        self.stages.run(name, f"does the model rank rollouts from {starts} starts?", work, f"{MEASUREMENTS}/{name}")

    # What stages share --------------------------------------------------------------------------------------

    def _rollouts(self, turn: int) -> list[Path]:
        names = [IMITATION_ROLLOUTS] if self.config.imitation_rollouts else []
        return [self.output / name for name in (*names, *(f"rollouts_{number}" for number in range(turn + 1)))]

    def _frames_of(self, turn: int) -> str:
        sets = len(self._rollouts(turn))
        return "demonstrations and " + ("rollouts" if sets == 1 else f"{sets} sets of rollouts")

    def _episodes(self, turn: int) -> VideoData:
        """Everything real that was seen up to a turn; read once."""
        if self._data is None or self._data[0] != turn:
            self._data = None
            paths = [*self.demonstrations, *self._rollouts(turn)]
            self._data = turn, open_video_data(paths, embodiment=self.loaded.embodiment)
        return self._data[1]

    def _torch_device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _say(self, iteration: int, metrics: dict[str, Any]) -> None:
        parts = [f"iteration {iteration}: imagined success {100 * metrics['success']:.0f} %"]
        if "success_from_beginnings" in metrics and "success_from_keyframes" in metrics:
            begun, key = (metrics[f"success_from_{name}"] for name in ("beginnings", "keyframes"))
            parts.append(f"from first frames {100 * begun:.0f} %, from key frames {100 * key:.0f} %")
        if metrics["decisions"]:
            # A group that all succeeded, or all failed, says nothing about its actions.
            parts.append(
                f"learned from {100 * metrics['learned_decisions'] / metrics['decisions']:.0f} % of the decisions"
            )
        if metrics["dropped_rollouts"]:
            parts.append(f"{metrics['dropped_rollouts']} rollouts dropped")
        self.notify(", ".join(parts))
