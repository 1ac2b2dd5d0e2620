"""Success of policies during co-training, in the real world and in the one they learn in, always paired."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.rollouts import record_rollouts
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.task import TaskSpec
from simtoreal.evaluation.evaluate import evaluate, task_digest
from simtoreal.evaluation.policies import checkpoint_digest, load_actor, training_seeds
from simtoreal.evaluation.results import read_episodes
from simtoreal.policies.checkpoint import find_checkpoint
from simtoreal.policies.exploring_actor import ExploringActor, require_denoising
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.world_models.checkpoint import load_world_model
from simtoreal.world_models.cotrain_config import MeasurementConfig
from simtoreal.world_models.cotrain_stages import EVALUATION, REAL, SIMULATION, steps_taken
from simtoreal.world_models.hallucination import film_both_worlds, first_frames, places_by_seed, world_gap
from simtoreal.world_models.learned_episodes import learned_seeds
from simtoreal.world_models.ranking import rank_rollouts
from simtoreal.world_models.vector_env import WorldModelVectorEnv
from simtoreal.world_models.video_data import VideoData, open_video_data

MEASUREMENTS = "measurements"
IMAGINED = "imagined"
# Rollouts from each start that is ranked; as in a group of GRPO.
RANKED_ROLLOUTS = 8
_RATE = ("success_rate", "successes", "n", "interval")


@dataclass(frozen=True, kw_only=True)
class World:
    """An environment that can be made: a simulation, a twin, a robot.

    Attributes:
        make: makes it.
        task: what is done in it.
        settings: what decides outcomes in it, JSON-compatible, e.g. its ``randomization``.
    """

    make: Callable[[], VectorEnv | gym.Env]
    task: TaskSpec
    settings: Mapping[str, Any]


def require_task(datasets: Iterable[Dataset], task: TaskSpec) -> None:
    """Refuse demonstrations of something else: they would be practised, too.

    Raises:
        ConfigError: an episode is of another task.
    """
    for dataset in datasets:
        others = [episode for episode in dataset.episodes if episode.task != task.name]
        if others:
            names = ", ".join(sorted({episode.task for episode in others}))
            raise ConfigError(
                f"{dataset.path}: {len(others)} of {len(dataset.episodes)} episodes are of {names}, and co-training is "
                f"of '{task.name}'; leave them out with 'simtoreal data edit --episodes'"
            )


class Measurements:
    """Measures policies from the same initial conditions, with the same noise of the policy.

    Args:
        config: how often.
        real: the world that counts.
        output: folder of the co-training; everything goes below its ``measurements``.
        device: torch device, None for a GPU if there is one.
        seed: of the policy's noise.
        imagined_envs: episodes imagined together.
    """

    def __init__(
        self, config: MeasurementConfig, real: World, output: Path, device: str | None, seed: int, imagined_envs: int
    ) -> None:
        self.config, self.real, self.output, self.device, self.seed = config, real, output, device, seed
        self.seeds = range(config.first_seed, config.first_seed + config.episodes)
        self.imagined_envs = imagined_envs
        self._worlds: dict[int, VectorEnv | gym.Env] = {}
        self._frames: VideoData | None = None

    def env(self, world: World | None = None) -> VectorEnv | gym.Env:
        """The environment of a world, the real one by default; made once."""
        world = world or self.real
        if id(world) not in self._worlds:
            self._worlds[id(world)] = world.make()
        return self._worlds[id(world)]

    def close(self) -> None:
        """Close what was made."""
        for env in self._worlds.values():
            env.close()
        self._worlds.clear()

    def require_unseen(self, policy: Path) -> None:
        """Refuse to measure on what a policy was trained on.

        Raises:
            ConfigError: initial conditions overlap.
        """
        loaded, _ = load_actor(policy, device="cpu")
        self.require_apart(training_seeds(loaded), f"{policy} was trained on")

    def require_new_to(self, model: Path) -> None:
        """Refuse to measure on what a world model was trained on: there it imagines what it remembers.

        Raises:
            CheckpointError: the model cannot be loaded.
            ConfigError: initial conditions overlap.
        """
        described = load_world_model(model, "cpu").training.get("data") or {}
        self.require_apart(learned_seeds(described), f"world model {model} was trained on")

    def require_apart(self, seeds: Collection[int], where: str) -> None:
        """Refuse to measure on initial conditions ``seeds`` that are learned from; ``where`` says by whom.

        Raises:
            ConfigError: they overlap.
        """
        common = sorted(set(self.seeds) & set(seeds))
        if common:
            raise ConfigError(
                f"measurement.first_seed is {self.config.first_seed}: {len(common)} of the {len(self.seeds)} initial "
                f"conditions to measure on ({common[0]} to {common[-1]}) are among those that {where}. Choose another "
                "--measurement.first-seed."
            )

    def keep(self, name: str, run: Path) -> Path:
        """Copy the newest checkpoint of a run that goes on, so that what is measured can be used; return the folder.

        Args:
            name: folder below the output; left alone if it is there.
            run: run folder.
        """
        kept = self.output / name
        if not kept.exists():
            copy = kept.with_name(f".{name}.tmp")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(find_checkpoint(run), copy)
            os.replace(copy, kept)
        return kept

    def in_world(self, name: str, policy: Path, *, world: World | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measure a policy in a world; return rate and what it took.

        Args:
            name: folder below ``measurements``; of the real world ``real`` in it, otherwise ``simulation``.
            policy: run or checkpoint folder.
            world: the real one by default.
        """
        label = REAL if world is None else SIMULATION
        folder = self.folder(name, label)
        chosen = world or self.real
        results = self._evaluate(policy, self.env(world), folder, "simulation", chosen.settings)
        steps = sum(episode.steps for episode in read_episodes(folder))
        return (
            {key: results[key] for key in _RATE},
            steps_taken(label, EVALUATION, self.config.episodes, steps),
        )  # fmt: skip

    def imagined(self, name: str, policy: Path, model: Path, *, real: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measure a policy in a world model; return its hallucination and what that took.

        Args:
            name: folder below ``measurements``.
            policy, model: run or checkpoint folders.
            real: evaluation folder of the same policy in the real world.
        """
        folder = self.folder(name, IMAGINED)
        env = self._imagination(model, min(self.imagined_envs, self.config.episodes))
        settings = {
            "world_model": self.name_of(model),
            "world_model_checkpoint": checkpoint_digest(find_checkpoint(model)),
        }
        self._evaluate(policy, env, folder, "world_model", settings)
        steps = sum(episode.steps for episode in read_episodes(folder))
        return world_gap(real, folder), steps_taken("imagination", EVALUATION, self.config.episodes, steps)

    def film(self, name: str, policy: Path, model: Path) -> tuple[list[str], dict[str, Any]]:
        """Write a video of real and imagined episodes side by side; return its path and the real steps it took."""
        seeds = list(self.seeds)[: self.config.videos]
        if not seeds:
            return [], steps_taken(REAL, EVALUATION, 0, 0)
        _, actor = load_actor(policy, device=self._device(), seed=self.seed)
        path = self.folder(name, "side_by_side.mp4")
        steps = film_both_worlds(self.env(), self._imagination(model, len(seeds)), actor, seeds, path)
        return [str(path.relative_to(self.output))], steps_taken(REAL, EVALUATION, len(seeds), steps)

    def ranked(
        self, name: str, policy: Path, model: Path, reinforcement: ReinforcementConfig, starts: int, *, graded: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return how a world model ranks real rollouts from the same starts, and what that took.

        Args:
            name: folder below ``measurements``.
            policy, model: run or checkpoint folders.
            reinforcement: whose noise, denoising steps and length the rollouts have.
            starts: number of initial conditions, the first ones; no more than are measured.
            graded: whether what comes close to success is rewarded, too.
        """
        loaded, _ = load_actor(policy, device=self._device())
        require_denoising(loaded.policy, reinforcement.denoising_steps)
        seeds, folders, steps = self.seeds[:starts], [], 0
        for number in range(RANKED_ROLLOUTS):
            actor = ExploringActor(
                loaded.policy, reinforcement.exploration, self.seed + number  # type: ignore[arg-type]
            )  # fmt: skip
            folders.append(self.folder(name, f"rollouts_{number}"))
            settings = {"checkpoint": checkpoint_digest(loaded.folder), "noise": number, **self.real.settings}
            outcomes = record_rollouts(
                self.env(), actor, seeds, folders[-1], task=self.real.task, operator=loaded.config.type,
                settings=settings,
            )  # fmt: skip
            steps += sum(one.steps for one in outcomes)
        data = open_video_data(folders, embodiment=loaded.embodiment)
        chunks = reinforcement.max_chunks
        most = None if chunks is None else chunks * loaded.policy.config.execute_steps
        net = load_world_model(model, str(loaded.policy.device)).model
        found = rank_rollouts(net, data, most_steps=most, graded=graded, seed=self.seed)
        return found, steps_taken(REAL, EVALUATION, len(seeds) * RANKED_ROLLOUTS, steps)

    def folder(self, name: str, world: str) -> Path:
        """Where the evaluation of a measurement lies."""
        return self.output / MEASUREMENTS / name / world

    def _device(self) -> str:
        return self.device or "auto"

    def name_of(self, run: Path) -> str:
        """What to call a run: relative to the output, which may be moved, or written another way, and continued."""
        return os.path.relpath(run.resolve(), self.output.resolve())

    def _imagination(self, model: Path, count: int) -> WorldModelVectorEnv:
        if self._frames is None:
            self._frames = first_frames(self.env(), self.seeds, self.real.task)
        return WorldModelVectorEnv(
            model, count, self._frames, places=places_by_seed(self.seeds), task=self.real.task, device=self.device
        )

    def _evaluate(
        self, policy: Path, env: VectorEnv | gym.Env, folder: Path, backend: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        loaded, actor = load_actor(policy, device=self._device(), seed=self.seed)
        task = self.real.task
        identity = {
            "task": task.name, "label": loaded.config.type, "policy": self.name_of(policy),
            "checkpoint": checkpoint_digest(loaded.folder), "horizon": task.horizon, "backend": backend,
            "first_seed": self.config.first_seed, "policy_seed": self.seed,
            "task_digest": task_digest(task), **settings,
        }  # fmt: skip
        return evaluate(env, actor, self.seeds, folder, identity, videos=self.config.videos)


def require_same_embodiment(policy: Any, model: Path) -> None:
    """Refuse a policy and a world model of different robots, cameras, rates or render profiles.

    Raises:
        EmbodimentMismatchError: lists every difference.
        CheckpointError: the world model cannot be loaded.
    """
    load_world_model(model).embodiment.require_equal(policy.embodiment, f"world model {model}", "the policy")
