"""The inverse-dynamics model reads actions from pictures of the real simulator, and hands its encoders to policies."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import make_vector_env, rollout
from simtoreal.envs.errors import CheckpointError, ConfigError, DatasetError
from simtoreal.evaluation.bootstrap import explained_variance
from simtoreal.evaluation.policies import training_seeds
from simtoreal.policies.checkpoint import load_policy
from simtoreal.policies.config import AugmentationConfig, BCConfig, TrainerConfig, VisionConfig
from simtoreal.policies.inverse_dynamics import (
    InverseDynamics,
    load_inverse_dynamics,
    mean_actions,
    pair_starts,
    predict_windows,
)
from simtoreal.policies.inverse_dynamics_config import InverseDynamicsConfig
from simtoreal.policies.inverse_dynamics_data import estimate_lag, open_frame_pairs
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import open_training_data

torch.set_num_threads(1)
VISION = VisionConfig(widths=(16, 32), keypoints=8, features=32)
PLAIN = AugmentationConfig(shift_px=0, brightness=0, contrast=0, colour=0)
CONFIG = InverseDynamicsConfig(vision=VISION, augmentation=PLAIN, hidden=64)
SCHEDULE = TrainerConfig(
    steps=400, batch_size=32, warmup_steps=10, learning_rate=4e-3, precision="fp32", validate_every=1000
)
MOMENT = dataclasses.replace(SCHEDULE, steps=4, batch_size=4, warmup_steps=1, checkpoint_every=2)


class Wanderer:
    """Moves at random, a third of a second in one direction: nothing but the motion tells the action."""

    observation_steps, execute_steps, ensembling = 1, 6, None

    def __init__(self) -> None:
        self.generators: dict[int, np.random.Generator] = {}

    def reset(self, slots, seeds):
        for slot, seed in zip(slots, seeds, strict=True):
            self.generators[int(slot)] = np.random.default_rng(seed)

    def act(self, observation, instructions, slots):
        drawn = np.stack([self.generators[int(slot)].uniform(-1, 1, 7) for slot in slots]).astype(np.float32)
        drawn[:, 3:6] = 0
        return np.repeat(drawn[:, None], 6, axis=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("idm") / "data"
    env = make_vector_env("reach", 60, image_size=16)
    with DatasetWriter(path, env.embodiment, {env.task.name: env.task.to_dict()}) as writer:
        recorder = Recorder(
            memory_takes(writer), task=env.task.name, embodiment=env.embodiment, source="expert", operator="wanderer",
            keep=lambda result: True,
        )  # fmt: skip
        rollout(env, Wanderer(), range(60), listeners=[recorder])
    env.close()
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    data, config = open_frame_pairs([folder], CONFIG)
    return train(config, SCHEDULE, data, tmp_path_factory.mktemp("run"), kind=InverseDynamics, device="cpu").run


def test_it_reads_the_motion_from_real_pictures(folder, run):
    data, _ = open_frame_pairs([folder], CONFIG)
    model, _ = load_inverse_dynamics(run)
    assert model.gap == 4
    found = {}
    for name, pairs in (("train", data.train), ("valid", data.valid)):
        scores = explained_variance(predict_windows(model, pairs), pairs.actions, pairs.episode_of_window)
        found[name] = dict(zip(data.embodiment.action.names, scores, strict=True))
    # After seconds of training at 16 pixels; a model that learned nothing is at 0.
    known = ("dx", "dz", "gripper")
    read = np.mean([found["valid"][name]["r2"] for name in known])
    assert read > 0.2, found
    # Frames in the wrong order show the opposite.
    pairs = data.valid
    pairs.frames = pairs.frames[:, ::-1].copy()
    scores = explained_variance(predict_windows(model, pairs), pairs.actions, pairs.episode_of_window)
    backwards = dict(zip(data.embodiment.action.names, scores, strict=True))
    assert np.mean([backwards[name]["r2"] for name in known]) < read - 0.2


def test_pairs_stay_inside_their_episode_and_take_the_lagged_actions():
    first, episode = pair_starts(np.array([0, 10]), np.array([10, 18]), gap=4, lag=2)
    assert first.tolist() == [2, 3, 4, 5, 12, 13]
    assert episode.tolist() == [0, 0, 0, 0, 1, 1]
    actions = np.arange(18, dtype=np.float32)[:, None]
    # Frames 2 and 6 show what the actions of steps 0 to 3 did.
    assert mean_actions(actions, first, 4, 2)[0, 0] == pytest.approx(1.5)


def test_the_lag_of_the_arm_is_found(folder):
    dataset = Dataset.open(folder)
    embodiment = dataset.embodiment
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (200, 7)).astype(np.float32)
    # An arm that does exactly what it was told three steps ago.
    moved = np.roll(actions[:, :3], 3, axis=0)
    moved[:3] = 0
    position = np.concatenate([np.zeros((1, 3)), np.cumsum(moved, axis=0)[:-1]])
    proprio = np.zeros((200, embodiment.proprio.dim), np.float32)
    columns = [embodiment.proprio.names.index(f"tcp_{axis}") for axis in "xyz"]
    proprio[:, columns] = position
    assert estimate_lag(actions, proprio, embodiment, np.array([0]), np.array([200]), 4) == 3
    config = open_frame_pairs([folder], CONFIG)[1]
    assert 1 <= config.lag_steps <= 4


def test_training_continues_bit_by_bit(folder, tmp_path):
    data, config = open_frame_pairs([folder], CONFIG)
    whole = train(config, MOMENT, data, tmp_path / "whole", kind=InverseDynamics, device="cpu").run
    train(config, dataclasses.replace(MOMENT, checkpoint_every=2), data, tmp_path / "cut", kind=InverseDynamics,
          device="cpu")  # fmt: skip
    folders = sorted((tmp_path / "cut" / "checkpoints").glob("0*"))
    assert [path.name for path in folders] == ["000002", "000004"]
    (tmp_path / "cut" / "checkpoints" / "last").unlink()
    shutil.rmtree(folders[-1])
    resumed = train(config, MOMENT, data, tmp_path / "cut", kind=InverseDynamics, resume=True, device="cpu").run
    first, second = (load_inverse_dynamics(path)[0].state_dict() for path in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_no_policy(run, folder, tmp_path):
    with pytest.raises(CheckpointError, match="inverse_dynamics"):
        load_policy(run)
    data = open_training_data(folder, BCConfig(vision=VISION, hidden=32), mask="all")
    policy = train(BCConfig(vision=VISION, hidden=32), MOMENT, data, tmp_path, device="cpu").run
    with pytest.raises(CheckpointError, match="inverse_dynamics"):
        load_inverse_dynamics(policy)


def test_a_policy_begins_with_its_encoders(folder, run, tmp_path):
    still = dataclasses.replace(MOMENT, steps=1, learning_rate=1e-12, weight_decay=0.0)
    config = BCConfig(vision=VISION, hidden=32, image_keys=("wrist_image",))
    data = open_training_data(folder, config, mask="all")
    result = train(config, still, data, tmp_path / "policy", encoder=run, device="cpu")
    mine = load_policy(result.run).policy.state_dict()
    theirs = load_inverse_dynamics(run)[0].state_dict()
    # The wrist camera is the second one there, the first one here.
    for name in (one for one in mine if one.startswith("encoder.images.0.")):
        assert torch.allclose(mine[name], theirs[name.replace("images.0.", "images.1.")], atol=1e-6), name
    assert json.loads((result.run / "checkpoints/last/training.json").read_text())["encoder"].startswith(str(run))
    with pytest.raises(ConfigError, match="encoder"):
        train(config, dataclasses.replace(still, steps=2), data, tmp_path / "policy", resume=True, device="cpu")


def test_a_policy_that_began_with_encoders_is_continued_by_their_weights(folder, run, tmp_path, monkeypatch):
    config = BCConfig(vision=VISION, hidden=32, image_keys=("wrist_image",))
    data = open_training_data(folder, config, mask="all")
    source = tmp_path / "source"
    shutil.copytree(run, source, symlinks=True)
    seen = source / "checkpoints" / "last" / "training.json"
    learned = json.loads(seen.read_text())
    learned["data"]["seeds"] = [77_777]
    seen.write_text(json.dumps(learned))
    begun = train(config, MOMENT, data, tmp_path / "policy", encoder=source, device="cpu").run

    def resume(encoder: Path) -> None:
        # Back to the first checkpoint, so that there are steps left.
        shutil.rmtree(begun / "checkpoints" / "000004", ignore_errors=True)
        train(config, MOMENT, data, begun, encoder=encoder, resume=True, device="cpu")
        described = json.loads((begun / "checkpoints/000004/training.json").read_text())
        assert described["encoder"] == str(source / "checkpoints" / "last")
        # What the encoders have seen is no longer unseen.
        assert described["data"]["seeds"] == sorted({77_777, *data.seeds})
        assert training_seeds(load_policy(begun)) == {77_777, *data.seeds}

    monkeypatch.chdir(tmp_path)
    resume(Path("source"))
    shutil.copytree(source, tmp_path / "copy", symlinks=True)
    resume(tmp_path / "copy")
    model = tmp_path / "copy" / "checkpoints" / "last" / "model.safetensors"
    tensors = safetensors.torch.load_file(model)
    tensors[next(name for name in tensors if name.startswith("encoder.images."))] += 1
    safetensors.torch.save_file(tensors, model)
    with pytest.raises(ConfigError, match=r"encoder: .*source.*weights .* != .*copy.*weights "):
        resume(tmp_path / "copy")
    # Checkpoints of earlier versions hold the path only.
    record = begun / "checkpoints" / "000002" / "training.json"
    content = json.loads(record.read_text())
    del content["encoder_digest"]
    record.write_text(json.dumps({**content, "encoder": "source/checkpoints/last"}))
    shutil.rmtree(begun / "checkpoints" / "000004", ignore_errors=True)
    train(config, MOMENT, data, begun, encoder=source, resume=True, device="cpu")
    record.write_text(json.dumps(content))
    shutil.rmtree(source)
    resume(source)


def test_encoders_that_do_not_fit(folder, run, tmp_path):
    def begin(config: BCConfig, source: Path = run) -> None:
        data = open_training_data(folder, config, mask="all")
        train(config, MOMENT, data, tmp_path / "policy", encoder=source, device="cpu")

    wider = dataclasses.replace(VISION, widths=(24, 32))
    with pytest.raises(ConfigError, match=r"widths is \[24, 32\] here, \[16, 32\] there"):
        begin(BCConfig(vision=wider, hidden=32))
    with pytest.raises(ConfigError, match="no image encoder"):
        begin(BCConfig(image_keys=(), hidden=32))
    with pytest.raises(CheckpointError, match="does not exist"):
        begin(BCConfig(vision=VISION, hidden=32), tmp_path / "nowhere")
    one_eyed = train_one_camera(folder, tmp_path)
    with pytest.raises(ConfigError, match="reads 'wrist_image'"):
        begin(BCConfig(vision=VISION, hidden=32), one_eyed)


def train_one_camera(folder: Path, tmp_path: Path) -> Path:
    data, config = open_frame_pairs([folder], dataclasses.replace(CONFIG, image_keys=("front_image",)))
    return train(config, MOMENT, data, tmp_path / "one", kind=InverseDynamics, device="cpu").run


def test_data_that_do_not_suit(folder, tmp_path):
    with pytest.raises(DatasetError, match="has no camera 'top_image'"):
        open_frame_pairs([folder], dataclasses.replace(CONFIG, image_keys=("top_image",)))
    with pytest.raises(ValueError, match="sees nothing but images"):
        dataclasses.replace(CONFIG, image_keys=())
    source = Dataset.open(folder)
    with DatasetWriter(tmp_path / "moved", source.embodiment, source.tasks) as writer:
        for episode in source.episodes[:3]:
            writer.add(source.read(episode), dataclasses.replace(episode, extra={"motion": {}}))
    with pytest.raises(DatasetError, match=r"3 episodes of .*MOVE"):
        open_frame_pairs([tmp_path / "moved"], CONFIG)
