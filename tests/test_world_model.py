"""The world model: it learns more than to repeat a picture, continues bit by bit, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_world import CLASSIFIER, FLOW, RESIDUAL, make_world_data, short_training

import simtoreal.configs
from simtoreal import cli
from simtoreal.commands import world_model_train
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.action import integrate_action
from simtoreal.envs.config import load_fields
from simtoreal.envs.errors import CheckpointError, ConfigError, DatasetError, EmbodimentMismatchError
from simtoreal.envs.panda import panda_embodiment
from simtoreal.policies import checkpoint as folders
from simtoreal.policies.training_log import read_metrics
from simtoreal.world_models import video_data, world_model
from simtoreal.world_models.checkpoint import LoadedWorldModel, load_world_model
from simtoreal.world_models.classifier import SuccessClassifier, calibrate_threshold, shows_success
from simtoreal.world_models.clips import imagine_clips, reconstruct
from simtoreal.world_models.config import (
    ClassifierConfig,
    DynamicsConfig,
    StageConfig,
    TokenizerConfig,
    WorldModelConfig,
)
from simtoreal.world_models.contexts import actions_at_rest
from simtoreal.world_models.latent_video import Window
from simtoreal.world_models.learned_episodes import describe_episodes, fresh_episodes, learned_seeds, unseen
from simtoreal.world_models.pixel_weights import PixelWeights
from simtoreal.world_models.stages import DynamicsStage, EncodedData, evenly_chosen
from simtoreal.world_models.state import Imagination
from simtoreal.world_models.trainer import train_world_model
from simtoreal.world_models.video_data import POSITIVE_FRAMES, VideoData, _held_out, open_video_data
from simtoreal.world_models.world_model import WorldModel, fit_world_statistics, require_possible

torch.set_num_threads(1)
# A few steps of everything, where only the mechanics matter.
MOMENT = short_training(
    tokenizer=StageConfig(steps=4, batch_size=4), dynamics=StageConfig(steps=4, batch_size=2),
    classifier=StageConfig(steps=4, batch_size=8), checkpoint_every=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_world_data(tmp_path_factory.mktemp("world") / "data", seed=100)


@pytest.fixture(scope="module")
def data(folder) -> VideoData:
    return open_video_data([folder])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    return train_world_model(RESIDUAL, short_training(log_every=1), data, run, device="cpu")


def rewrite(source: Path, target: Path, change) -> Path:
    """Copy a dataset; ``change(info)`` returns the description of each copied episode, or None to leave it out."""
    dataset = Dataset.open(source)
    with DatasetWriter(target, dataset.embodiment, dataset.tasks) as writer:
        for episode in dataset.episodes:
            if (info := change(episode)) is not None:
                writer.add(dataset.read(episode), info)
    return target


# Data ---------------------------------------------------------------------------------------------------------


def test_frames_in_which_the_goal_holds_are_the_last_of_successes(data):
    assert data.success.any()
    assert not data.success.all()
    for start, end, success in zip(data.starts, data.ends, data.success, strict=True):
        assert data.labels[start:end].sum() == (POSITIVE_FRAMES if success else 0)
        assert not success or data.labels[end - POSITIVE_FRAMES : end].all()
    assert data.held_out.any()
    assert not data.held_out.all()


def test_successes_and_failures_are_both_held_out(folder, tmp_path):
    number = iter(range(100))
    rare = rewrite(folder, tmp_path / "rare", lambda info: dataclasses.replace(info, success=next(number) % 3 == 0))
    # The tenth of 11 successes, the tenth and the twentieth of 21 failures.
    data = open_video_data([rare])
    assert np.flatnonzero(data.held_out).tolist() == [14, 27, 29]
    assert data.success[data.held_out].tolist() == [False, True, False]
    number = iter(range(100))
    rarer = rewrite(folder, tmp_path / "rarer", lambda info: dataclasses.replace(info, success=next(number) in (3, 20)))
    # The second of two successes, and every tenth of 30 failures.
    assert np.flatnonzero(open_video_data([rarer]).held_out).tolist() == [10, 20, 21, 31]


def test_what_was_learned_from_is_not_held_out_when_a_folder_has_grown():
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.3, 0.9):
        success = (rng.random(60) < rate).tolist()
        for before in range(1, 60):
            then, now = np.array(_held_out(success[:before])), np.array(_held_out(success))[:before]
            assert not (now & ~then).any()


def test_imagined_episodes_come_from_all_of_the_data():
    for count in (0, 1, 150, 160, 161, 320, 1000):
        chosen = evenly_chosen(np.arange(count) + 5, 160)
        assert len(np.unique(chosen)) == len(chosen) == min(count, 160)
        if count > 1:
            assert (chosen[0], chosen[-1]) == (5, count + 4)
            assert np.diff(chosen).max() <= np.ceil(count / 160) + 1


def test_actions_at_rest_leave_every_target_where_it_is(data):
    actions, targets = actions_at_rest(data, np.arange(len(data.ends)))
    assert np.abs(actions[:, :6]).max() < 1e-9
    assert np.allclose(integrate_action(targets.astype(np.float64), actions, data.embodiment), targets, atol=1e-6)
    # The arm is where it is told to be.
    columns = [data.embodiment.proprio.names.index(f"tcp_{axis}") for axis in "xyz"]
    assert np.allclose(targets[:, :3], data.proprio[data.starts][:, columns], atol=5e-3)
    unknown = dataclasses.replace(data.embodiment.action, mode="env", limits=(1.0,) * data.actions.shape[1])
    foreign = dataclasses.replace(data.embodiment, action=unknown)
    with pytest.raises(ConfigError, match="no motion is not known"):
        actions_at_rest(dataclasses.replace(data, embodiment=foreign), np.arange(2))


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_some_windows_show_an_arm_at_rest(data, share, monkeypatch):
    config = dataclasses.replace(RESIDUAL, dynamics=dataclasses.replace(RESIDUAL.dynamics, rest_share=share))
    model = WorldModel(config, data.embodiment, fit_world_statistics(data))
    stage = DynamicsStage(
        EncodedData(model, data, torch.device("cpu")), StageConfig(steps=9, batch_size=16).schedule(), fresh=True
    )
    stage.prepare()
    seen: list[Window] = []
    monkeypatch.setattr(model.dynamics, "loss", lambda window: seen.append(window) or {})
    stage.loss(8)
    window = seen[0]
    still = (window.latents == window.state.reference[:, None]).flatten(1).all(1)
    assert (len(still), int(still.sum())) == (16, round(16 * share))
    assert (window.latents.shape[1], window.valid[still].min() if share else 1) == (8, 1)
    actions, targets = (torch.from_numpy(part) for part in actions_at_rest(data, np.flatnonzero(~data.held_out)))
    allowed = model.scale_commands(actions, targets)
    for commands, proprio, state in zip(
        window.commands[still], window.proprio[still], window.state.proprio[still], strict=True
    ):
        assert (commands == commands[0]).all()
        assert (allowed == commands[0]).all(1).any()
        assert (proprio == state[-1]).all()


def test_an_arm_at_rest_stays_in_the_picture(data, trained, tmp_path):
    never = dataclasses.replace(RESIDUAL, dynamics=dataclasses.replace(RESIDUAL.dynamics, rest_share=0.0))
    other = train_world_model(never, short_training(), data, tmp_path / "never", device="cpu")
    episodes = np.flatnonzero(data.held_out)
    lengths = data.ends[episodes] - data.starts[episodes]
    actions = np.repeat(actions_at_rest(data, episodes)[0], lengths, 0)
    changed = {}
    for name, run in {"shown": trained.run, "never shown": other.run}.items():
        model = load_world_model(run, "cpu").model
        clips = imagine_clips(model, data, episodes, actions)
        first = reconstruct(model, clips.images[clips.starts])[clips.episode]
        changed[name] = np.abs(clips.images.astype(float) - first)[clips.step > 0].mean()
    assert changed["shown"] < 0.85 * changed["never shown"], changed


def test_what_any_training_learned_from_stays_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = describe_episodes(["a/0", "a/1", "b/0"], [0, 1, 7], np.array([True, False, False]))
    assert (first["held_out"], learned_seeds(first)) == ([str(tmp_path / name) for name in ("a/1", "b/0")], {0})
    # Trained on with another folder, and with one of the held-out ones, which it names by its whole path.
    second = describe_episodes([str(tmp_path / "b/0"), "c/0"], [7, 9], np.array([True, False]), first)
    assert (len(second["episodes"]), learned_seeds(second)) == (4, {0, 7})
    assert unseen(second, ["a/0", "a/1", "b/0", "c/0", "d/0", "d/1"], [0, 1, 7, 9, 7, 8]).tolist() == [
        False, True, False, True, False, True,
    ]  # fmt: skip
    # Somebody who works elsewhere, with data whose episodes have no initial condition to know them by.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert unseen(second, ["../a/0", str(tmp_path / "a/1"), "a/0"], [-1] * 3).tolist() == [False, True, True]


def test_images_that_no_memory_can_hold_are_refused(folder, monkeypatch):
    monkeypatch.setattr(video_data, "available_memory", lambda: 10**6)
    with pytest.raises(DatasetError, match=r"frames need 0\.0 GiB of memory, and 0\.0 GiB are free; take fewer"):
        open_video_data([folder])


def test_numbers_of_episodes_of_a_robot_are_no_initial_conditions(folder, tmp_path):
    """Every folder of a robot begins to count at 0, and so does what is imported."""

    def recorded(name: str, source: str) -> VideoData:
        def few(info):
            return dataclasses.replace(info, source=source) if int(info.name) < 4 else None

        return open_video_data([rewrite(folder, tmp_path / name, few)])

    monday, tuesday, imported = recorded("monday", "robot"), recorded("tuesday", "robot"), recorded("other", "lerobot")
    described = describe_episodes(monday.names, monday.seeds, ~monday.held_out)
    assert unseen(described, tuesday.names, tuesday.seeds).all()
    assert unseen(described, imported.names, imported.seeds).all()
    assert unseen(described, monday.names, monday.seeds).tolist() == monday.held_out.tolist()
    assert learned_seeds(described) == set()


def test_the_same_seed_of_another_task_is_another_condition(folder):
    data = open_video_data([folder])
    described = describe_episodes(
        [f"elsewhere/{row}" for row in range(len(data.seeds))], data.seeds, data.success | True
    )

    def model(task: str, initial: str | None = None) -> LoadedWorldModel:
        fields = {field.name: None for field in dataclasses.fields(LoadedWorldModel)}
        return LoadedWorldModel(
            **{**fields, "task": {"name": task}, "training": {"data": described, "initial": initial}}
        )

    assert not fresh_episodes(model(data.task["name"]), data).any()
    assert fresh_episodes(model("weld"), data).all()
    assert not fresh_episodes(model("weld", initial="of any task"), data).any()


def test_moving_scenes_are_left_out_and_counted(folder, tmp_path):
    number = iter(range(100))
    moved = rewrite(
        folder, tmp_path / "moved",
        lambda info: dataclasses.replace(info, extra={"motion": {}} if next(number) < 3 else {}),
    )  # fmt: skip
    data = open_video_data([moved])
    assert len(data.ends) == len(Dataset.open(folder).episodes) - 3
    assert "3 episodes" in data.notes[0]
    assert "MOVE" in data.notes[0]
    assert len(open_video_data([moved], moving=True).ends) == len(Dataset.open(folder).episodes)


def test_data_of_another_robot_are_refused(folder, tmp_path):
    other = make_world_data(tmp_path / "other", episodes=2)
    meta = json.loads((other / "meta.json").read_text())
    embodiment = panda_embodiment(16, render_profile="high")
    with pytest.raises(EmbodimentMismatchError, match="render_profile"):
        open_video_data([folder], embodiment=embodiment)
    assert meta["embodiment"]["render_profile"] == "fast"
    assert len(open_video_data([folder, other]).ends) == 34


def test_images_must_fit_the_latent_grid(data):
    embodiment = panda_embodiment(20)
    with pytest.raises(ConfigError, match="multiple of 8"):
        WorldModel(RESIDUAL, embodiment, fit_world_statistics(data))


def test_what_no_world_model_can_be_made_of_is_said_without_data(data, tmp_path):
    with pytest.raises(ConfigError, match=r"policy base: cameras are front 20x20, .* multiple of 8"):
        require_possible(RESIDUAL, panda_embodiment(20), "policy base")
    halves = dataclasses.replace(FLOW, dynamics=dataclasses.replace(FLOW.dynamics, patch=2))
    with pytest.raises(ConfigError, match=r"patch is 2, which does not divide the latents of \(3, 3\)"):
        require_possible(halves, panda_embodiment(24), "policy base")
    # No recorded success shows its goal for so long.
    long = dataclasses.replace(RESIDUAL, classifier=dataclasses.replace(CLASSIFIER, consecutive=POSITIVE_FRAMES + 1))
    with pytest.raises(ConfigError, match=f"choose 1 to {POSITIVE_FRAMES}"):
        train_world_model(long, MOMENT, data, tmp_path / "run", device="cpu")
    for config in (RESIDUAL, FLOW):
        require_possible(config, data.embodiment, "the data")


def test_one_class_only_is_refused_before_anything_is_trained(folder, tmp_path):
    successes = rewrite(folder, tmp_path / "good", lambda info: info if info.success else None)
    with pytest.raises(DatasetError, match="one class only"):
        train_world_model(RESIDUAL, MOMENT, open_video_data([successes]), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_rare_colours_weigh_more(data):
    weights = PixelWeights(data, TokenizerConfig())
    frames = data.starts[:8]
    images, weight = data.images[frames, 0].astype(int), weights(frames, 0).numpy()
    # The goal marker is the only coloured thing on a grey table.
    coloured = images.max(-1) - images.min(-1) > 60
    assert 0 < coloured.mean() < 0.1
    assert weight[coloured].mean() > 3 * weight[~coloured].mean()
    flat = PixelWeights(data, TokenizerConfig(rarity=0.0, change=0.0))(frames, 0)
    assert torch.allclose(flat, torch.ones_like(flat))


# Model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RESIDUAL, FLOW])
def test_shapes(config, data):
    torch.manual_seed(0)
    model = WorldModel(config, data.embodiment, fit_world_statistics(data)).eval()
    first = data.starts[:3]
    state = model.first_state(data.images[first], data.proprio[first])
    assert state.reference.shape == (3, 16, 2, 2)
    assert state.memory.shape == (3, model.memory, 16, 2, 2)
    ahead = first[:, None] + np.arange(5)
    commands = model.scale_commands(torch.from_numpy(data.actions[ahead]), torch.from_numpy(data.targets[ahead]))
    with torch.no_grad():
        after, latents, proprio = model.imagine(state, commands, [torch.Generator().manual_seed(i) for i in range(3)])
        images = model.decode(latents[:, -1])
        probability = model.success_probability(latents[:, -1], proprio[:, -1])
    assert latents.shape == (3, 5, 16, 2, 2)
    assert proprio.shape == (3, 5, 20)
    assert images.shape == (3, 2, 16, 16, 3)
    assert images.dtype == torch.uint8
    assert probability.shape == (3,)
    assert torch.equal(after.memory[:, -1], latents[:, -1])
    # The commanded target is arithmetic: the next proprio repeats it, whatever the networks say.
    names = data.embodiment.proprio.names
    column = names.index("target_x")
    told = model.unscale_proprio(proprio)[:, :, column : column + 3].numpy()
    np.testing.assert_allclose(told, data.targets[ahead][:, :, :3], atol=1e-5)


def test_flow_does_not_look_ahead(data):
    """A frame of a chunk depends on the actions before it only, so that chunks can be cut anywhere."""
    torch.manual_seed(0)
    model = WorldModel(FLOW, data.embodiment, fit_world_statistics(data)).eval()
    for parameter in model.dynamics.parameters():
        # Zero-initialised layers would hide every dependence.
        torch.nn.init.normal_(parameter, std=0.05)
    state = model.first_state(data.images[:2], data.proprio[:2])
    commands = torch.randn(2, 3, model.command_dim)
    changed = commands.clone()
    changed[:, 2] += 1.0
    frames, vectors = torch.randn(2, 3, 16, 2, 2), torch.randn(2, 3, 20)
    expected, time = torch.zeros(2, 3, 20), torch.full((2,), 0.5)
    with torch.no_grad():
        before, _ = model.dynamics(state, commands, expected, frames, vectors, time)
        after, _ = model.dynamics(state, changed, expected, frames, vectors, time)
        short, _ = model.dynamics(state, commands[:, :1], expected[:, :1], frames[:, :1], vectors[:, :1], time)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2])
    torch.testing.assert_close(before[:, :1], short)


def test_cells_count_more_where_something_moves_or_was_at_first():
    def picture(bright: int) -> torch.Tensor:
        return torch.eye(4)[bright].view(1, 1, 1, 2, 2)

    # An object lay in cell 0, was in cell 2 when the window begins, and goes to cell 3; cell 1 is always dark.
    state = Imagination(picture(0)[:, 0], picture(2), torch.zeros(1, 2, 1), torch.zeros(1, 1, 1))
    vectors = torch.zeros(1, 1, 1)
    window = Window(state, picture(3), vectors, vectors, torch.full((1, 1, 1, 2, 2), 2.0), torch.ones(1, 1))
    assert window.importance(8.0).flatten().tolist() == [18.0, 2.0, 18.0, 18.0]


def test_success_is_known_where_training_never_showed_it():
    """A bright cell beside a dark one, in the left half of the picture only; judged in the right half."""
    torch.manual_seed(0)

    def frames(columns: slice, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        latents, labels = 0.3 * torch.randn(count, 4, 8, 8), torch.arange(count) % 2 == 0
        for row, label in enumerate(labels):
            place = int(torch.randint(columns.start, columns.stop - 1, ()))
            latents[row, 0, 3, place], latents[row, 1, 3, place + (1 if label else -1)] = 3.0, 3.0
        return latents, labels

    classifier = SuccessClassifier(ClassifierConfig(width=16), 4, 2, 3).train()
    optimizer = torch.optim.Adam(classifier.parameters(), 3e-3)
    for _ in range(150):
        latents, labels = frames(slice(1, 4))
        optimizer.zero_grad()
        classifier.loss(latents, torch.zeros(len(latents), 3), labels)["loss"].backward()
        optimizer.step()
    latents, labels = frames(slice(5, 8), 400)
    with torch.no_grad():
        told = classifier.eval()(latents, torch.zeros(len(latents), 3)) > 0
    assert (told == labels).float().mean() > 0.9


def test_two_frames_in_a_row():
    probability = np.array([0.1, 0.9, 0.2, 0.9, 0.9, 0.1])
    assert shows_success(probability, 0.5, 2).tolist() == [False, False, False, False, True, True]
    assert shows_success(probability[:1], 0.05, 2).tolist() == [False]
    episodes = [probability, np.array([0.1, 0.9, 0.1]), np.array([0.3, 0.3, 0.2])]
    threshold, accuracy = calibrate_threshold(episodes, np.array([True, False, False]), 2)
    assert 0.3 < threshold <= 0.9
    assert accuracy == 1.0


def test_one_episode_alone_does_not_make_the_threshold_lenient():
    def episodes(low: int) -> list[np.ndarray]:
        reached = [0.1] * low + [0.8] * (50 - low) + [0.02] * 50
        return [np.full(4, value) for value in reached]

    success = np.arange(100) < 50
    threshold, accuracy = calibrate_threshold(episodes(1), success, 2)
    assert 0.3 < threshold < 0.6
    assert accuracy == pytest.approx(0.99)
    threshold, accuracy = calibrate_threshold(episodes(10), success, 2)
    assert threshold <= 0.1
    assert accuracy == 1.0


# Training -----------------------------------------------------------------------------------------------------


def test_it_learns_more_than_to_repeat_a_picture(trained):
    lines = read_metrics(trained.run)
    for stage in ("tokenizer", "dynamics", "classifier"):
        losses = [line["loss"] for line in lines if line.get("stage") == stage]
        # The windows of the dynamics get longer, so that their loss is of something harder in the end.
        assert np.mean(losses[-10:]) < (0.7 if stage == "tokenizer" else 0.9) * losses[0], stage
    assert trained.metrics["dynamics_error"] < 0.85 * trained.metrics["dynamics_still_error"]
    assert trained.metrics["tokenizer_psnr_db"] > 15


def test_the_checkpoint_is_the_model(trained, data):
    loaded = load_world_model(trained.run)
    again = load_world_model(loaded.folder)
    assert loaded.embodiment == data.embodiment
    assert loaded.task["name"] == "reach"
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    frames = data.starts[:2]
    images = [one.model.decode(one.model.encode(torch.from_numpy(data.images[frames]))) for one in (loaded, again)]
    assert torch.equal(*images)


@pytest.mark.parametrize("interrupted_at", [3, 6, 9])
def test_resuming_equals_not_being_interrupted(interrupted_at, data, tmp_path, monkeypatch):
    """Killed after its n-th step, in any of the three stages, and continued: the same weights, bit by bit."""
    whole = train_world_model(RESIDUAL, MOMENT, data, tmp_path / "whole", device="cpu")

    class KilledError(Exception):
        pass

    with monkeypatch.context() as patch:
        write = folders.write_checkpoint

        def write_and_die(run, step, fill):
            write(run, step, fill)
            if step == interrupted_at:
                raise KilledError

        patch.setattr(folders, "write_checkpoint", write_and_die)
        with pytest.raises(KilledError):
            train_world_model(RESIDUAL, MOMENT, data, tmp_path / "killed", device="cpu")
    with pytest.raises(CheckpointError, match="stopped in its stage"):
        load_world_model(tmp_path / "killed")
    with pytest.raises(ConfigError, match="--resume"):
        train_world_model(RESIDUAL, MOMENT, data, tmp_path / "killed", device="cpu")
    resumed = train_world_model(RESIDUAL, MOMENT, data, tmp_path / "killed", resume=True, device="cpu")
    assert resumed.steps == whole.steps == 12
    mine, theirs = (load_world_model(one.run).model.state_dict() for one in (whole, resumed))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert resumed.metrics == whole.metrics


def test_pictures_do_not_depend_on_how_many_are_decoded_together(trained, data, monkeypatch):
    model = load_world_model(trained.run).model
    latents = model.encode(torch.from_numpy(data.images[:7]))
    whole = model.decode(latents)
    monkeypatch.setattr(world_model, "CPU_PICTURES", 4)
    parts = model.decode(latents)
    assert parts.shape == whole.shape == (7, *data.images.shape[1:])
    assert (parts.int() - whole.int()).abs().max() <= 1
    assert model.decode(latents[:0]).shape == (0, *data.images.shape[1:])


def test_other_settings_cannot_continue_a_run(data, tmp_path):
    train_world_model(RESIDUAL, MOMENT, data, tmp_path, device="cpu")
    other = dataclasses.replace(MOMENT, seed=1)
    with pytest.raises(ConfigError, match="trainer"):
        train_world_model(RESIDUAL, other, data, tmp_path, resume=True, device="cpu")


def test_an_episode_that_ended_at_once_can_be_held_out(folder, tmp_path):
    """Nothing of it is imagined; the classifier is judged on it all the same."""
    dataset, held_out = Dataset.open(folder), np.flatnonzero(open_video_data([folder]).held_out)
    with DatasetWriter(tmp_path / "short", dataset.embodiment, dataset.tasks) as writer:
        for number, episode in enumerate(dataset.episodes):
            steps = 1 if number == held_out[0] else episode.steps
            arrays = {key: values[:steps] for key, values in dataset.read(episode).items()}
            writer.add(arrays, dataclasses.replace(episode, steps=steps))
    short = open_video_data([tmp_path / "short"])
    assert (short.ends - short.starts)[short.held_out].min() == 1
    train_world_model(RESIDUAL, MOMENT, short, tmp_path / "run", device="cpu")


def test_training_on_keeps_the_tokenizer(trained, data, tmp_path):
    part = dataclasses.replace(MOMENT, fine_tune_share=0.3)
    result = train_world_model(RESIDUAL, part, data, tmp_path, initial=trained.run, device="cpu")
    before, after = (load_world_model(run).model for run in (trained.run, tmp_path))
    assert result.steps == 4  # 30 % of 4 steps, rounded up, twice
    for name, value in before.tokenizer.state_dict().items():
        assert torch.equal(value, after.tokenizer.state_dict()[name])
    assert not torch.equal(before.dynamics.outputs.weight, after.dynamics.outputs.weight)


def test_training_on_remembers_what_the_model_learned_from_before(trained, data, tmp_path):
    other = open_video_data([make_world_data(tmp_path / "other", episodes=12, seed=0)])
    train_world_model(RESIDUAL, MOMENT, other, tmp_path / "run", initial=trained.run, device="cpu")
    described = load_world_model(tmp_path / "run").training["data"]
    for folder in (data, other):
        assert unseen(described, folder.names, folder.seeds).tolist() == folder.held_out.tolist()


def test_a_flow_model_trains(data, tmp_path):
    result = train_world_model(FLOW, MOMENT, data, tmp_path, device="cpu")
    assert result.steps == 12
    assert load_world_model(tmp_path).model.config == FLOW


def test_damaged_and_foreign_checkpoints(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders.find_checkpoint(trained.run), copy)
    (copy / folders.MODEL).write_bytes((copy / folders.MODEL).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_world_model(copy)
    training = json.loads((copy / folders.TRAINING).read_text())
    (copy / folders.TRAINING).write_text(json.dumps({**training, "format": "something"}))
    with pytest.raises(CheckpointError, match="is not a world model"):
        load_world_model(copy)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_world_model(tmp_path / "nowhere")


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="multiple of 64"):
        DynamicsConfig(kind="flow", width=96)
    with pytest.raises(ValueError, match="multiples of 8"):
        TokenizerConfig(encoder_widths=(4, 8, 8))
    assert WorldModelConfig().dynamics.kind == "residual"


# Command line -------------------------------------------------------------------------------------------------


def test_the_command_trains_with_a_shipped_preset(folder, tmp_path, capsys):
    run = tmp_path / "run"
    options = [word for part in ("tokenizer", "dynamics", "classifier") for word in (f"--trainer.{part}.steps", "2")]
    # Explicitly, because "auto" means bfloat16 on some processors only.
    options += ["--trainer.precision", "bf16"]
    cli.run(["world-model", "train", "--config", "cpu", "--data", str(folder), "--output", str(run), *options])
    assert "trained a world model: 6 steps" in " ".join(capsys.readouterr().out.split())
    results = json.loads((run / "results.json").read_text())["world_model"]
    assert results["episodes"] == 32
    assert results["metrics"].keys() >= {"tokenizer_psnr_db", "dynamics_error", "classifier_threshold"}
    assert load_world_model(run).model.config == WorldModelConfig()
    with pytest.raises(ConfigError, match="no shipped preset"):
        cli.run(["world-model", "train", "--config", "cpuu", "--data", str(folder), "--output", str(run)])
    with pytest.raises(ConfigError, match="'wovr' is no file, and this command has no shipped presets"):
        cli.run(["deploy", "--config", "wovr"])


def test_the_gpu_preset_is_a_flow_model():
    preset = Path(simtoreal.configs.__path__[0]) / "world_models" / "gpu.yaml"
    given = load_fields(world_model_train.Config, preset)
    assert given["model"].dynamics.kind == "flow"
    assert given["model"].dynamics.memory == 4
