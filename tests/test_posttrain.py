"""Post-training with inverse rewards: exact densities, GRPO that raises a reward, and judges that notice hacking."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_world import FLOW, MOMENT, RESIDUAL, make_world_data

from simtoreal.cli import run as command_line
from simtoreal.envs.errors import ConfigError, EmbodimentMismatchError
from simtoreal.envs.panda import panda_embodiment
from simtoreal.policies.config import TrainerConfig, VisionConfig
from simtoreal.policies.inverse_dynamics import InverseDynamics
from simtoreal.policies.inverse_dynamics_config import InverseDynamicsConfig
from simtoreal.policies.inverse_dynamics_data import open_frame_pairs
from simtoreal.policies.trainer import train
from simtoreal.world_models import posttrain as posttraining
from simtoreal.world_models.checkpoint import load_world_model
from simtoreal.world_models.clips import real_clips
from simtoreal.world_models.inverse_reward import InverseReward, require_whole_pairs
from simtoreal.world_models.learned_episodes import unseen
from simtoreal.world_models.posttrain import posttrain
from simtoreal.world_models.posttrain_config import PosttrainConfig
from simtoreal.world_models.posttrain_judgement import judge_change
from simtoreal.world_models.posttrain_run import run_posttraining
from simtoreal.world_models.random_videos import video_walk
from simtoreal.world_models.stages import EncodedData
from simtoreal.world_models.trainer import train_world_model
from simtoreal.world_models.video_data import open_video_data

torch.set_num_threads(1)
CHUNKS = dataclasses.replace(
    FLOW, dynamics=dataclasses.replace(FLOW.dynamics, chunk=4, sampling_steps=3, memory=2)
)  # fmt: skip
MODELS = {"residual": RESIDUAL, "flow": CHUNKS}
SHORT = PosttrainConfig(steps=4, contexts=3, group_size=3, batch_size=4, checkpoint_every=1, precision="fp32", epochs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_world_data(tmp_path_factory.mktemp("world") / "data", episodes=20)


@pytest.fixture(scope="module")
def data(folder):
    return open_video_data([folder])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("runs")
    return {
        kind: train_world_model(config, MOMENT, data, parent / kind, device="cpu").run
        for kind, config in MODELS.items()
    }


@pytest.fixture(scope="module")
def inverse(folder, tmp_path_factory) -> Path:
    config = InverseDynamicsConfig(vision=VisionConfig(widths=(8, 16), keypoints=8, features=16), hidden=32)
    pairs, config = open_frame_pairs([folder], config)
    schedule = TrainerConfig(steps=20, batch_size=16, warmup_steps=2, precision="fp32")
    return train(config, schedule, pairs, tmp_path_factory.mktemp("idm"), kind=InverseDynamics, device="cpu").run


def make_reward(loaded, data, inverse) -> InverseReward:
    from simtoreal.policies.inverse_dynamics import load_inverse_dynamics

    real = real_clips(loaded.model, data, np.flatnonzero(data.held_out))
    return InverseReward(load_inverse_dynamics(inverse)[0], real, 0.2)


# Densities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["residual", "flow"])
def test_densities_are_those_of_the_noise_that_was_drawn(kind, runs, data):
    loaded = load_world_model(runs[kind])
    model = loaded.model
    with torch.no_grad():
        video = EncodedData(model, data, model.device).video
    walk = video_walk(model.dynamics, 0.2)
    frames = np.array([5, 40])
    commands = video.commands[torch.from_numpy(frames[:, None] + np.arange(4))]
    videos = walk.sample(video.state(frames), commands, torch.Generator().manual_seed(0))
    assert videos.latents.shape == (2, 4, 16, 2, 2)
    assert len(videos.video) == {"residual": 2, "flow": 2 * 2}[kind]
    rows = torch.arange(len(videos.video))
    with torch.no_grad():
        means = walk.means(videos, rows)
    standard = (videos.outcome - means) / videos.deviation[:, None]
    # White noise of the stated deviation: its spread, and the density of a normal distribution.
    assert standard.std() == pytest.approx(1.0, abs=0.1)
    normal = torch.distributions.Normal(means, videos.deviation[:, None])
    constant = -np.log(np.sqrt(2 * np.pi)) - videos.deviation.log()
    expected = normal.log_prob(videos.outcome).mean(-1) - constant
    torch.testing.assert_close(videos.log_density(means, rows), expected, atol=1e-4, rtol=1e-4)
    # Of the same memory, group members differ; without noise they would be the model's own video.
    again = walk.sample(video.state(frames), commands, torch.Generator().manual_seed(1))
    assert (again.latents - videos.latents).abs().mean() > 0.01
    if kind == "residual":
        quiet = video_walk(model.dynamics, 1e-6).sample(video.state(frames), commands, None)
        with torch.no_grad():
            _, latents, _ = model.imagine(video.state(frames), commands)
        torch.testing.assert_close(quiet.latents, latents, atol=1e-3, rtol=1e-3)


def test_a_flow_model_with_one_step_has_nothing_random(runs):
    model = load_world_model(runs["flow"]).model
    model.dynamics.config = dataclasses.replace(model.dynamics.config, sampling_steps=1)
    with pytest.raises(ConfigError, match="at least two"):
        video_walk(model.dynamics, 0.1)


# Reward ---------------------------------------------------------------------------------------------------------


def test_the_reward_is_highest_for_the_commanded_action(runs, data, inverse):
    reward = make_reward(load_world_model(runs["residual"]), data, inverse)
    wanted = torch.zeros(3, 7)
    wanted[:, -1] = 1.0
    read = wanted.clone()
    read[1, 0] += reward.deviation[0]
    read[2, -1] = -1.0
    values = reward.of_pairs(read, wanted)
    # One of six dimensions is off by one standard deviation; the sign of the gripper is wrong.
    assert values.tolist() == pytest.approx([1.0, 0.8 * np.exp(-1 / 6) + 0.2, 0.8], abs=1e-5)
    with pytest.raises(ConfigError, match="multiple of 4"):
        require_whole_pairs(reward.model, 6)


def test_gradients_flow_from_the_reward_into_the_pictures(runs, data, inverse):
    reward = make_reward(load_world_model(runs["residual"]), data, inverse)
    images = torch.from_numpy(data.images[None, :5]).float().requires_grad_(True)
    reward.error(images, torch.zeros(1, 1, 7)).backward()
    assert images.grad[0, 0].abs().max() > 0
    assert images.grad[0, 4].abs().max() > 0
    # The frames between are not looked at.
    assert images.grad[0, 1:4].abs().max() == 0


# Training -------------------------------------------------------------------------------------------------------


class Bright:
    """Stands for the inverse-dynamics model with a reward whose optimum is known: bright pictures."""

    def __init__(self, reward: InverseReward) -> None:
        self.model, self.deviation = reward.model, reward.deviation

    def __call__(self, images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return images[:, 1:].mean((1, 2, 3, 4, 5)) / 255


@pytest.mark.parametrize("kind", ["residual", "flow"])
def test_grpo_raises_the_reward(kind, runs, data, inverse, tmp_path):
    loaded = load_world_model(runs[kind])
    reward = Bright(make_reward(loaded, data, inverse))
    config = dataclasses.replace(
        SHORT, contexts=4, group_size=8, noise_scale=0.2, learning_rate=2e-3, kl_weight=0.0, checkpoint_every=1000,
        log_every=1, epochs=2, frame_passes=24 * 4 * 8 * 4 * {"residual": 9, "flow": 27}[kind],
    )  # fmt: skip
    result = posttrain(loaded, config, data, ~data.held_out, reward, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.steps == len(lines) == 24
    rewards = np.array([line["reward"] for line in lines])
    # Every one of the last steps, on other contexts, is better than every one of the first.
    assert rewards[-4:].min() > rewards[:4].max()
    # The first update begins with a ratio of 1.
    assert lines[0]["clip_fraction"] < 0.3
    assert all(line["differing"] == 1.0 for line in lines)


def test_videos_whose_rewards_differ_by_little_are_told_apart_as_clearly(runs, data, inverse, tmp_path, monkeypatch):
    advantages, original = [], posttraining.clipped_surrogate
    monkeypatch.setattr(
        posttraining, "clipped_surrogate",
        lambda ratio, advantage, clip: advantages.append(advantage) or original(ratio, advantage, clip),
    )  # fmt: skip
    loaded = load_world_model(runs["residual"])
    # Pictures of noisy latents are about equally bright.
    reward = Bright(make_reward(loaded, data, inverse))
    config = dataclasses.replace(SHORT, frame_passes=1, noise_scale=0.2)
    posttrain(loaded, config, data, ~data.held_out, reward, tmp_path)
    # Three videos of a group per part: in units of their standard deviation, as Shao et al. 2024 have it.
    assert [len(part) for part in advantages] == [3, 3, 3]
    for part in advantages:
        assert part.std(unbiased=False).item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("method", ["rlir", "sft", "sft_idm"])
def test_every_method_trains_the_dynamics_only_and_continues_bit_by_bit(method, runs, data, inverse, tmp_path):
    def start(output: Path, passes: int, *, resume: bool = False):
        loaded = load_world_model(runs["residual"])
        before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        config = dataclasses.replace(SHORT, method=method, frame_passes=passes)
        reward = make_reward(loaded, data, inverse)
        return posttrain(loaded, config, data, ~data.held_out, reward, output, resume=resume), before, loaded

    one = {"rlir": 9 * 4 * 6, "sft": 3 * 4 * 8, "sft_idm": 3 * 4 * 8 + 3 * 3 * 4}[method]
    result, before, loaded = start(tmp_path / "whole", 3 * one)
    assert (result.steps, result.frame_passes) == (3, 3 * one)
    described = load_world_model(tmp_path / "whole").training["data"]
    assert unseen(described, data.names, data.seeds).tolist() == data.held_out.tolist()
    changed = {name for name, value in loaded.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("dynamics.") for name in changed)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    shutil.rmtree(tmp_path / "cut/checkpoints/000003")
    (tmp_path / "cut/checkpoints/last").unlink()
    with pytest.raises(ConfigError, match="--resume"):
        start(tmp_path / "cut", 3 * one)
    resumed, _, _ = start(tmp_path / "cut", 3 * one, resume=True)
    assert resumed.steps == 3
    first, second = (load_world_model(tmp_path / name).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match="frame_passes"):
        start(tmp_path / "cut", 4 * one, resume=True)


def test_what_does_not_fit_is_refused(runs, data, inverse, tmp_path):
    loaded = load_world_model(runs["flow"])
    reward = make_reward(loaded, data, inverse)
    with pytest.raises(ConfigError, match="more than the chunk"):
        posttrain(loaded, dataclasses.replace(SHORT, steps=8), data, ~data.held_out, reward, tmp_path / "long")
    other = dataclasses.replace(data, embodiment=panda_embodiment(16, render_profile="high"))
    with pytest.raises(EmbodimentMismatchError, match="render_profile"):
        posttrain(loaded, SHORT, other, ~data.held_out, reward, tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot judge"):
        run_posttraining(
            runs["residual"], inverse, [Path(data.names[0]).parent], tmp_path / "same", SHORT, judge=inverse,
            device="cpu",
        )  # fmt: skip
    with pytest.raises(ValueError, match="at least 2 videos"):
        PosttrainConfig(group_size=1)


# Judgement ------------------------------------------------------------------------------------------------------


def scores(training: float, held_out: float, tcp: float) -> dict[str, np.ndarray]:
    noise = 0.01 * np.random.default_rng(0).normal(size=20)
    return {"training_reward": training + noise, "held_out_reward": held_out + noise, "tcp_error_m": tcp + 0.01 * noise}


def test_hacking_is_noticed():
    rng = np.random.default_rng(1)

    def moved(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value + 1e-3 * rng.normal(size=20) * (1 if "reward" in name else 0.1)
                for name, value in values.items()}  # fmt: skip

    before = scores(0.3, 0.3, 0.02)
    only_trainer = judge_change(before, moved(scores(0.5, 0.3, 0.02)))
    assert only_trainer["reward_hacking"]
    assert "reward hacking" in only_trainer["verdict"]
    everybody = judge_change(before, moved(scores(0.5, 0.4, 0.01)))
    assert not everybody["reward_hacking"]
    assert everybody["verdict"] == "better by held_out_reward, tcp_error_m"
    few = {name: value[:4] for name, value in before.items()}
    raised = {name: value + 0.1 for name, value in few.items()}
    assert {row["verdict"] for row in judge_change(few, raised)["measures"].values()} == {"not distinguishable"}
    nothing = judge_change(before, moved(before))
    assert not nothing["reward_hacking"]
    assert "no judge" in nothing["verdict"]
    harm = judge_change(before, moved(scores(0.5, 0.2, 0.04)))
    assert harm["reward_hacking"]
    assert "worse by held_out_reward, tcp_error_m" in harm["verdict"]


def test_the_command_judges_before_and_after(folder, runs, inverse, tmp_path, capsys):
    output = tmp_path / "out"
    command_line(
        ["world-model", "posttrain", "--model", str(runs["residual"]), "--idm", str(inverse), "--data", str(folder),
         "--output", str(output), "--judge-steps", "3", "--device", "cpu", "--posttrain.steps", "4",
         "--posttrain.contexts", "2", "--posttrain.group-size", "2", "--posttrain.frame-passes", "300"]
    )  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    assert results["frame_passes"] >= 300
    assert {"training_reward", "held_out_reward", "psnr_db", "tcp_error_m"} <= set(results["measures"])
    assert results["measures"]["held_out_reward"]["before"]["n"] == 2
    # Trained on the same folder as the world model: said in the notes.
    assert any("in common" in note for note in results["notes"])
    # And on the episodes that are judged.
    assert any("of the 2 initial conditions judged" in note for note in results["notes"])
    assert "post-trained" in capsys.readouterr().out
    # The result is a world model like any other.
    assert load_world_model(output).training["stage"] == "posttrain"
