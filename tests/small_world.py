"""A dataset of the real simulator at 16 pixels, and a world model small enough to train on it in seconds."""

from __future__ import annotations

from pathlib import Path

from gymnasium.vector import AutoresetMode

from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import make_vector_env, rollout
from simtoreal.world_models.config import (
    ClassifierConfig,
    DynamicsConfig,
    StageConfig,
    TokenizerConfig,
    WorldModelConfig,
    WorldModelTrainerConfig,
)
from simtoreal.world_models.disturbance import DisturbanceConfig, DisturbedActor

TOKENIZER = TokenizerConfig(channels=8, encoder_widths=(8, 16, 32), decoder_widths=(32, 16, 8))
CLASSIFIER = ClassifierConfig(width=16, generated_episodes=4)
RESIDUAL = WorldModelConfig(
    tokenizer=TOKENIZER, dynamics=DynamicsConfig(width=64, layers=2, chunk=4, unroll=(4, 8)), classifier=CLASSIFIER
)
FLOW = WorldModelConfig(
    tokenizer=TOKENIZER,
    dynamics=DynamicsConfig(kind="flow", width=64, layers=2, memory=3, chunk=3, patch=1, sampling_steps=2),
    classifier=CLASSIFIER,
)


def make_world_data(path: Path, episodes: int = 32, seed: int = 0, **disturbance: float) -> Path:
    """Demonstrations of ``reach`` by an expert that is disturbed in some of them, failures included."""
    env = make_vector_env("reach", episodes, image_size=16, autoreset_mode=AutoresetMode.DISABLED)
    column = env.task.object_state_names.index(f"{env.task.objects[0].name}_x")
    config = DisturbanceConfig(**{"clean_share": 0.7, "misjudgement_m": 0.2, "wandering": 4.0, **disturbance})
    actor = DisturbedActor(ScriptedExpert(env.task, env.embodiment), [column], config)
    with DatasetWriter(path, env.embodiment, {env.task.name: env.task.to_dict()}) as writer:
        recorder = Recorder(
            memory_takes(writer), task=env.task.name, embodiment=env.embodiment, source="expert", operator="clumsy",
            keep=lambda result: True,
        )  # fmt: skip
        rollout(env, actor, range(seed, seed + episodes), listeners=[recorder])
    env.close()
    return path


def short_training(**changes: object) -> WorldModelTrainerConfig:
    """A training of seconds."""
    settings: dict[str, object] = {
        "tokenizer": StageConfig(steps=120, batch_size=16, learning_rate=3e-3, warmup_steps=5),
        "dynamics": StageConfig(steps=200, batch_size=32, learning_rate=3e-3, warmup_steps=10),
        "classifier": StageConfig(steps=120, batch_size=32, learning_rate=2e-3, warmup_steps=5),
        "precision": "fp32",
        "checkpoint_every": 1000,
    }
    return WorldModelTrainerConfig(**{**settings, **changes})  # type: ignore[arg-type]


# For tests that need a model of the right shape, whatever it imagines.
MOMENT = short_training(
    tokenizer=StageConfig(steps=30, batch_size=8), dynamics=StageConfig(steps=10, batch_size=4),
    classifier=StageConfig(steps=5, batch_size=8),
)  # fmt: skip
