"""Simulation and reality together (RL-Co, arXiv 2602.12628): imitate a mixture of few real and many simulated
demonstrations, then improve the policy by reinforcement where episodes are cheap, with the imitation loss on the real
demonstrations as an anchor, so that it does not forget the real world.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.writer import lock_folder
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError
from simtoreal.evaluation.evaluate import task_digest
from simtoreal.evaluation.policies import checkpoint_digest
from simtoreal.policies.checkpoint import find_checkpoint, load_policy, plain_config
from simtoreal.policies.exploring_actor import require_denoising
from simtoreal.policies.mixed_windows import open_mixed_data
from simtoreal.policies.reinforcement import Reinforcement
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.policies.reinforcement_run import Learner, reinforce
from simtoreal.policies.schedulers import noise_process
from simtoreal.policies.trainer import train
from simtoreal.world_models.checkpoint import load_world_model
from simtoreal.world_models.cotrain_anchor import anchor_on, demonstrated_seeds
from simtoreal.world_models.cotrain_config import KeyframeConfig, MeasurementConfig, RlcoConfig
from simtoreal.world_models.cotrain_measurement import Measurements, World, require_same_embodiment, require_task
from simtoreal.world_models.cotrain_report import write_report
from simtoreal.world_models.cotrain_stages import (
    DEMONSTRATIONS,
    IMAGINATION,
    LEARNING,
    REAL,
    SIMULATION,
    Stages,
    steps_taken,
)
from simtoreal.world_models.hallucination import world_gap
from simtoreal.world_models.imagined_starts import ImaginedReinforcement, ImaginedStarts
from simtoreal.world_models.keyframes import find_keyframes
from simtoreal.world_models.vector_env import WorldModelVectorEnv, require_no_failure, require_shown
from simtoreal.world_models.video_data import open_video_data


class Rlco:
    """One co-training; :meth:`run` does what is left of it.

    Args:
        config: sizes of the stages.
        reinforcement: how the policy is improved; ``anchor_weight`` is β.
        measurement: how success is measured, in the real world and in the one that the policy learns in.
        demonstrations: dataset folders from the real world (or its stand-in, a simulation with hidden differences).
        simulated: dataset folders from the simulation; they are not needed with ``policy``.
        real: the world that counts; it is only used to measure.
        practice: the simulation of the second stage.
        output: folder.
        policy: run or checkpoint folder of a policy that takes the place of the first stage.
        world_model: the world of the second stage, if ``config.world`` says so; imagined rollouts begin in frames of
            the demonstrations.
        keyframes: which of these frames.
        device, seed, notify, progress: see :class:`~simtoreal.world_models.wovr.Wovr`.

    Raises:
        ConfigError: something needed is missing, the folder holds another co-training, or the policy cannot be
            improved.
        CheckpointError, DatasetError: policy, world model or data are missing or damaged.
        EmbodimentMismatchError: they are of different embodiments or render profiles.
    """

    def __init__(
        self,
        config: RlcoConfig,
        reinforcement: ReinforcementConfig,
        measurement: MeasurementConfig,
        *,
        demonstrations: Sequence[Path],
        simulated: Sequence[Path],
        real: World,
        practice: World,
        output: Path,
        policy: Path | None = None,
        world_model: Path | None = None,
        keyframes: KeyframeConfig | None = None,
        device: str | None = None,
        seed: int = 0,
        notify: Callable[[str], None] = lambda text: None,
        progress: bool = False,
    ) -> None:
        if not demonstrations:
            raise ConfigError("RL-Co needs demonstrations from the real world; give --demonstrations")
        if policy is None and not simulated and config.real_share < 1:
            raise ConfigError("there are no simulated demonstrations to mix; give --simulated, or rlco.real_share 1")
        if (config.world == "world_model") != (world_model is not None):
            raise ConfigError("--world-model and rlco.world world_model belong together")
        self.config, self.reinforcement = config, dataclasses.replace(reinforcement, seed=seed)
        self.measurement, self.demonstrations, self.simulated = measurement, list(demonstrations), list(simulated)
        self.real, self.practice, self.output = real, practice, Path(output)
        self.policy, self.world_model = policy, world_model
        self.keyframes = keyframes or KeyframeConfig()
        self.device, self.seed, self.notify, self.progress = device, seed, notify, progress
        self.imitation = dataclasses.replace(config.imitation, seed=config.imitation.seed + seed)
        self._check()
        self.measurements = Measurements(measurement, real, self.output, device, seed, config.envs)
        for folders, kind in ((self.demonstrations, "demonstrations"), (self.simulated, "simulated demonstrations")):
            self.measurements.require_apart(demonstrated_seeds(folders), f"the {kind} began in")
        self.measurements.require_apart(
            self._practised(config.iterations), "reinforcement is going to begin in (reinforcement.first_seed)"
        )
        if policy is not None:
            self.measurements.require_unseen(policy)
        if world_model is not None:
            self.measurements.require_new_to(world_model)

    def _check(self) -> None:
        """Find out now what does not fit."""
        needed: Embodiment | None = None
        if self.policy is not None:
            loaded = load_policy(self.policy)
            require_denoising(loaded.policy, self.reinforcement.denoising_steps, f"policy {self.policy}")
            needed = loaded.embodiment
        elif self.config.iterations:
            steps = self.reinforcement.denoising_steps
            noise_process(dataclasses.replace(self.config.diffusion, inference_steps=steps)).levels()
        sizes = []
        for path in (*self.demonstrations, *self.simulated):
            dataset = Dataset.open(path, embodiment=needed)
            needed = dataset.embodiment
            require_task([dataset], self.real.task)
            sizes.append((len(dataset.episodes), sum(episode.steps for episode in dataset.episodes)))
        self.real_sizes, self.simulated_sizes = sizes[: len(self.demonstrations)], sizes[len(self.demonstrations) :]
        if self.world_model is not None:
            require_no_failure(self.real.task)
            require_same_embodiment(dataset, self.world_model)
            reads = self.config.diffusion if self.policy is None else loaded.config
            require_shown(reads.keys, dataset.embodiment, f"policy {self.policy or 'of the first stage'}")

    def run(self) -> dict[str, Any]:
        """Do the stages that are left; return and write the results."""
        with contextlib.closing(lock_folder(self.output)), contextlib.closing(self.measurements):
            self.stages = Stages(self.output, self._settings(), self.notify)
            self._count_demonstrations()
            base = self.policy if self.policy is not None else self._imitate()
            self._measure("base", base, 0)
            current, name, before = base, "base", 0
            every = self.measurement.every or max(1, self.config.iterations)
            ends = [*range(every, self.config.iterations, every), self.config.iterations]
            for target in ends if self.config.iterations else ():
                current, name = self._reinforce(base, before, target), f"policy_{target}"
                if target != self.config.iterations:
                    current = self.measurements.keep(name, current)
                self._measure(name, current, target)
                before = target
            return write_report(
                self.stages, self._settings(), self.measurements, base="base", final=name, policy=current
            )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        return {
            "method": "rlco", "task": self.real.task.name, "task_digest": task_digest(self.real.task),
            "real": dict(self.real.settings), "seed": self.seed,
            "practice": dict(self.practice.settings),
            "policy": checkpoint_digest(find_checkpoint(self.policy)) if self.policy else None,
            "world_model": checkpoint_digest(find_checkpoint(self.world_model)) if self.world_model else None,
            "demonstrations": [list(size) for size in self.real_sizes],
            "simulated": [list(size) for size in self.simulated_sizes],
            "rlco": plain_config(self.config), "reinforcement": plain_config(self.reinforcement),
            "measurement": plain_config(self.measurement), "keyframes": plain_config(self.keyframes),
        }  # fmt: skip

    # Stages -----------------------------------------------------------------------------------------------

    def _count_demonstrations(self) -> None:
        taken = [
            steps_taken(world, DEMONSTRATIONS, *(sum(column) for column in zip(*sizes, strict=True)))
            for world, sizes in ((REAL, self.real_sizes), (SIMULATION, self.simulated_sizes))
            if sizes
        ]
        self.stages.run("demonstrations", "counting the demonstrations", lambda: {"taken": taken})

    def _imitate(self) -> Path:
        config, run = self.config, self.output / "imitation"

        def work() -> dict[str, Any]:
            data = open_mixed_data(
                self.demonstrations, self.simulated, config.diffusion, real_share=config.real_share
            )  # fmt: skip
            result = train(
                config.diffusion, self.imitation, data, run, resume=True, device=self.device, progress=self.progress
            )
            return {"validation_error": result.validation_error, "training_seconds": result.seconds}

        share = f"{100 * config.real_share:.0f} % real windows"
        self.stages.run("imitation", f"imitating demonstrations, {share}", work)
        self.measurements.require_unseen(run)
        return run

    def _reinforce(self, base: Path, before: int, target: int) -> Path:
        run = self.output / "reinforcement"

        def work() -> dict[str, Any]:
            env, starts = self._world_of_practice()
            learner: Learner | None = None
            if isinstance(starts, ImaginedStarts):
                learner = lambda policy, config, anchor: ImaginedReinforcement(policy, config, starts, anchor)  # noqa: E731
            result = reinforce(
                base, self.reinforcement, env, run, iterations=target, starts=starts, learner=learner,
                anchor=anchor_on(self.demonstrations, self.config.anchor_batch, self.seed),
                seeds=[*self._practised(target), *demonstrated_seeds(self.demonstrations)],
                device=self.device, on_iteration=self._say,
            ).since(before)  # fmt: skip
            world = IMAGINATION if self.world_model else SIMULATION
            return {
                "taken": [steps_taken(world, LEARNING, result.rollouts, result.control_steps)],
                "run": str(run.relative_to(self.output)), "dropped_rollouts": result.dropped_rollouts,
            }  # fmt: skip

        weight = self.reinforcement.anchor_weight
        title = f"reinforcement up to iteration {target}, anchor weight {weight:g}"
        self.stages.run(f"reinforcement_{target}", title, work)
        return run

    def _world_of_practice(self) -> tuple[VectorEnv, Callable[[Reinforcement], Any] | None]:
        """The environment of the second stage, and where rollouts begin in it (None: at new seeds)."""
        if self.world_model is None:
            return self.measurements.env(self.practice), None  # type: ignore[return-value]
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_world_model(self.world_model, device)
        data = open_video_data(self.demonstrations, embodiment=loaded.embodiment)
        share, found = self.keyframes.share, ()
        if share > 0:
            found = find_keyframes(
                data, self.keyframes, memory=loaded.model.memory, horizon=self.real.task.horizon, seed=self.seed
            )
        starts = ImaginedStarts(data, found, share, self.seed)
        count = min(self.config.envs, self.reinforcement.rollouts)
        return WorldModelVectorEnv(loaded, count, data, places=starts.places, task=self.real.task), starts

    def _practised(self, iterations: int) -> range:
        """Initial conditions of the simulation that the policy has learned from after so many iterations."""
        if self.world_model is not None:
            return range(0)
        config = self.reinforcement
        times = config.grpo.group_size if config.algorithm == "grpo" else 1
        return range(config.first_seed, config.first_seed + iterations * (config.rollouts // times))

    def _measure(self, name: str, policy: Path, iteration: int) -> None:
        def work() -> dict[str, Any]:
            _, taken = self.measurements.in_world(name, policy)
            real = self.measurements.folder(name, REAL)
            if self.world_model is not None:
                gap, other = self.measurements.imagined(name, policy, self.world_model, real=real)
            else:
                _, other = self.measurements.in_world(name, policy, world=self.practice)
                gap = world_gap(real, self.measurements.folder(name, SIMULATION), SIMULATION)
            where = {"iteration": iteration, "policy": name, "run": self.measurements.name_of(policy)}
            return {"taken": [taken, other], "measurement": {**where, **gap}}

        title = f"measuring the policy after {iteration} iterations in {self.measurement.episodes} episodes per world"
        self.stages.run(f"measure_{name}", title, work)

    def _say(self, iteration: int, metrics: dict[str, Any]) -> None:
        anchor = ""
        if "anchor_loss" in metrics:
            # An anchor whose gradient is far smaller changes nothing, and one that is far larger is imitation only.
            ratio = metrics["anchor_gradient_norm"] / max(metrics["gradient_norm"], 1e-12)
            anchor = (
                f", imitation loss on real demonstrations {metrics['anchor_loss']:.4f}, its gradient {ratio:.2g} times "
                "that of reinforcement"
            )
        self.notify(f"iteration {iteration}: success {100 * metrics['success']:.0f} %{anchor}")
