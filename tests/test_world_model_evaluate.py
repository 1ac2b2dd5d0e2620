"""The evaluation of a world model tells a perfect one from a frozen one, and finds violated physics."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from safetensors.torch import save_file
from small_world import FLOW, MOMENT, RESIDUAL, make_world_data

from simtoreal.cli import run as command_line
from simtoreal.commands.world_model_train_idm import describe
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import make_vector_env, rollout
from simtoreal.envs.errors import ConfigError, DatasetError, EmbodimentMismatchError
from simtoreal.envs.panda import panda_embodiment
from simtoreal.envs.video import read_video
from simtoreal.evaluation.bootstrap import curve_with_interval, explained_variance, mean_with_interval
from simtoreal.evaluation.results import EvaluationError
from simtoreal.evaluation.validity import mean_maximum_rank_violation, policy_validity
from simtoreal.policies.checkpoint import load_tensors
from simtoreal.policies.config import BCConfig, DiffusionConfig, TrainerConfig, VisionConfig
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import open_training_data
from simtoreal.world_models import measure
from simtoreal.world_models.action_following import train_judge
from simtoreal.world_models.checkpoint import load_world_model
from simtoreal.world_models.clips import altered_actions, imagine_clips, real_clips
from simtoreal.world_models.evaluate import (
    KIND,
    Judges,
    choose_episodes,
    evaluate_world_model,
    judge_videos,
    policy_warnings,
)
from simtoreal.world_models.evaluate_page import number, write_page
from simtoreal.world_models.learned_episodes import unseen
from simtoreal.world_models.policy_evaluation import evaluate_policies
from simtoreal.world_models.positions import decode_positions, read_positions, train_probe
from simtoreal.world_models.posttrain_judgement import judge_change
from simtoreal.world_models.trainer import train_world_model
from simtoreal.world_models.video_data import open_video_data
from simtoreal.world_models.violations import find_violations, learn_evidence
from simtoreal.world_models.world_model import WorldModel, fit_world_statistics

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_world_data(tmp_path_factory.mktemp("world") / "data", episodes=30)


@pytest.fixture(scope="module")
def data(folder):
    return open_video_data([folder])


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return train_world_model(RESIDUAL, MOMENT, data, tmp_path_factory.mktemp("run"), device="cpu").run


@pytest.fixture(scope="module")
def loaded(run):
    return load_world_model(run)


@pytest.fixture(scope="module")
def judges(data, tmp_path_factory) -> Judges:
    output, learned = tmp_path_factory.mktemp("judges"), ~data.held_out
    positions = read_positions(data)
    return Judges(
        positions=positions, probe=train_probe(data, positions, learned, output / "probe", steps=60, device="cpu"),
        actions=train_judge(data, learned, output / "judge", steps=40, device="cpu"),
    )  # fmt: skip


# Judging videos -------------------------------------------------------------------------------------------------


def test_a_perfect_model_has_no_error(loaded, data, judges):
    real = real_clips(loaded.model, data, np.flatnonzero(data.held_out))
    found = judge_videos(loaded, data, judges, ~data.held_out, real, real)
    assert found["psnr_db"]["mean"] == measure.LARGEST_PSNR_DB
    assert found["perceptual"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert found["proprio_tcp_m"]["mean"] == 0.0
    for entry in found["positions"].values():
        assert entry["imagined"]["mean"] == entry["floor"]["mean"] > 0
    assert found["classifier"]["imagined"] == found["classifier"]["real"]
    for name, score in found["actions"]["real"]["r2"].items():
        assert found["actions"]["imagined"]["r2"][name] == score
    for rates in (found["violations"] or {}).values():
        assert rates["imagined"]["rate"] == rates["real"]["rate"]


def test_a_frozen_model_is_found_out(loaded, data, judges):
    """Judged on what it learned from, because 40 steps are too few for a judge that knows other episodes."""
    episodes = np.flatnonzero(~data.held_out)[:12]
    real = real_clips(loaded.model, data, episodes)
    first = real.starts[real.episode]
    frozen = dataclasses.replace(
        real, images=real.images[first], proprio=real.proprio[first],
        success_probability=real.success_probability[first],
    )  # fmt: skip
    found = judge_videos(loaded, data, judges, ~data.held_out, real, frozen)
    assert found["psnr_db"]["mean"] < 40
    assert found["perceptual"]["mean"] > 0.01
    tcp = found["positions"]["tcp"]
    # Further ahead it is further from where it stopped.
    assert tcp["imagined"]["curve"]["mean"][11] > tcp["imagined"]["curve"]["mean"][0] + 0.02
    assert tcp["imagined"]["mean"] > tcp["floor"]["mean"]
    assert found["proprio_tcp_m"]["mean"] > 0.02
    assert found["actions"]["imagined"]["following"] is None or found["actions"]["imagined"]["following"] < 0.2
    if found["actions"]["readable"]:
        assert any("does not follow" in text for text in found["warnings"])


def test_a_picture_that_dissolves_at_rest_is_found_out(loaded, data, judges):
    real = real_clips(loaded.model, data, np.flatnonzero(data.held_out))
    noisy = np.random.default_rng(0).integers(0, 256, real.images.shape, np.uint8)
    blurred = dataclasses.replace(real, images=np.where(real.step[:, None, None, None, None] > 0, noisy, real.images))
    stays = dataclasses.replace(real, images=real.images[real.starts][real.episode])
    for resting, warned in ((blurred, True), (stays, False)):
        found = judge_videos(loaded, data, judges, ~data.held_out, real, real, None, resting)
        assert any("dissolves" in text for text in found["warnings"]) == warned
        assert (found["psnr_at_rest_db"]["mean"] == measure.LARGEST_PSNR_DB) != warned
    assert judge_videos(loaded, data, judges, ~data.held_out, real, real)["psnr_at_rest_db"] is None


def test_following_is_a_share_of_what_can_be_read(loaded, data, judges, monkeypatch):
    from simtoreal.world_models import action_following as module

    real = real_clips(loaded.model, data, np.flatnonzero(data.held_out))
    wanted = module.clip_pairs(judges.actions, real).actions
    noise = np.random.default_rng(0).normal(size=wanted.shape).astype(np.float32)
    answers = iter([wanted + 0.1 * noise, np.zeros_like(wanted) + wanted.mean(0)])
    monkeypatch.setattr(module, "predict_windows", lambda model, pairs: next(answers))
    found = module.action_following(judges.actions, real, {"imagined": real})
    assert found["real"]["following"] == pytest.approx(1.0)
    assert found["real"]["follows"]
    assert found["imagined"]["following"] == pytest.approx(0.0, abs=1e-3)
    assert not found["imagined"]["follows"]


def test_imagination_begins_in_the_real_frame_and_obeys_other_actions(loaded, data):
    episodes = np.flatnonzero(data.held_out)
    imagined = imagine_clips(loaded.model, data, episodes)
    assert np.array_equal(imagined.images[imagined.starts], data.images[data.starts[episodes]])
    assert imagined.frames.tolist() == real_clips(loaded.model, data, episodes).frames.tolist()
    again = imagine_clips(loaded.model, data, episodes[1:])
    inside = slice(imagined.starts[1], imagined.ends[1])
    np.testing.assert_allclose(again.proprio[: again.ends[0]], imagined.proprio[inside], atol=1e-3)
    still = altered_actions(data, episodes, "still")
    gripper = data.embodiment.action.names.index("gripper")
    assert not np.delete(still, gripper, 1).any()
    assert np.array_equal(still[:, gripper], imagined.actions[:, gripper])
    reversed_actions = altered_actions(data, episodes, "reversed")
    assert np.array_equal(reversed_actions[:, :3], -imagined.actions[:, :3])
    swapped = altered_actions(data, episodes, "swapped")
    assert np.array_equal(swapped[imagined.starts[0]], imagined.actions[imagined.starts[1]])
    other = imagine_clips(loaded.model, data, episodes, still)
    # The commanded target is arithmetic, so proprio must differ whatever the networks learned.
    assert np.abs(other.proprio - imagined.proprio).max() > 0.01
    with pytest.raises(ConfigError, match="at least two"):
        altered_actions(data, episodes[:1], "swapped")


@pytest.mark.parametrize("config", [RESIDUAL, FLOW], ids=["residual", "flow"])
def test_what_is_imagined_of_an_episode_does_not_depend_on_longer_ones(config, data, monkeypatch):
    # What another size of a batch rounds otherwise is not meant.
    monkeypatch.setattr("simtoreal.world_models.clips.choose_precision", lambda precision, device: "fp32")
    torch.manual_seed(0)
    model = WorldModel(config, data.embodiment, fit_world_statistics(data)).eval()
    for parameter in model.dynamics.parameters():
        if parameter.ndim > 1:
            # Before training the last layers are zero, and nothing that an action does is seen.
            torch.nn.init.normal_(parameter, std=0.05)
    imagined = data.ends - data.starts - 1
    order = np.argsort(imagined, kind="stable")
    # Its last chunk is not whole, and the one of the longest episode at the same time is.
    short = next(one for one in order if imagined[one] % config.dynamics.chunk)
    alone = imagine_clips(model, data, np.array([short]))
    beside = imagine_clips(model, data, np.array([short, order[-1]]))
    mine = slice(0, beside.ends[0])
    assert np.abs(alone.images.astype(int) - beside.images[mine]).max() <= 1
    np.testing.assert_allclose(alone.proprio, beside.proprio[mine], atol=1e-3)
    np.testing.assert_allclose(alone.success_probability, beside.success_probability[mine], atol=1e-2)


# Physics --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    """Real pick_place episodes at 64 pixels: videos, and what the simulator knows."""
    folder = tmp_path_factory.mktemp("cube") / "data"
    env = make_vector_env("pick_place", 8, image_size=64, autoreset_mode=AutoresetMode.DISABLED)
    with DatasetWriter(folder, env.embodiment, {env.task.name: env.task.to_dict()}) as writer:
        recorder = Recorder(
            memory_takes(writer), task=env.task.name, embodiment=env.embodiment, source="expert", operator="expert"
        )
        rollout(env, ScriptedExpert(env.task, env.embodiment), range(8), listeners=[recorder])
    env.close()
    data = open_video_data([folder])
    frames = np.arange(len(data))
    from simtoreal.world_models.clips import Clips

    clips = Clips(
        episodes=np.arange(len(data.ends)), images=data.images, proprio=data.proprio, actions=data.actions,
        success_probability=np.zeros(len(data)), starts=data.starts, ends=data.ends, frames=frames,
    )  # fmt: skip
    positions = read_positions(data)
    evidence, notes = learn_evidence(clips, positions, data.embodiment.cameras)
    return clips, positions, evidence, notes


def violations(cube, clips=None, seen=None):
    real, positions, evidence, _ = cube
    error = np.full(len(positions.names), 0.003)
    found = find_violations(clips or real, evidence, positions.values if seen is None else seen, error)
    names = [one.name for one in evidence]
    return {rule: {name: broken[:, index] for index, name in enumerate(names)} for rule, broken in found.items()}


def test_objects_are_recognised_and_real_videos_keep_the_rules(cube):
    clips, positions, evidence, notes = cube
    assert positions.names == ("tcp", "cube", "plate")
    assert [one.name for one in evidence] == ["cube", "plate"], notes
    # The pixels are the cube's: their centre moves as it does.
    spots = evidence[0].colours[_cells(clips.images[clips.starts, 0])]
    columns = (spots * np.arange(64)).sum((1, 2)) / spots.sum((1, 2))
    assert abs(np.corrcoef(columns, positions.values[clips.starts, 1, 1])[0, 1]) > 0.95
    assert not any(broken.any() for rule in violations(cube).values() for broken in rule.values())


def _cells(images):
    from simtoreal.world_models.violations import _cells as cells

    return cells(images)


def test_a_cube_that_vanishes_is_found(cube):
    clips, _, evidence, _ = cube
    images = clips.images.copy()
    inside = slice(clips.starts[2] + 20, clips.ends[2])
    view = images[inside, 0]
    view[evidence[0].colours[_cells(view)]] = np.median(clips.images[inside, 0], axis=(0, 1, 2)).astype(np.uint8)
    images[inside, 0] = view
    found = violations(cube, dataclasses.replace(clips, images=images))
    assert found["vanishes"]["cube"].tolist() == [row == 2 for row in range(8)]
    assert not found["vanishes"]["plate"].any()
    assert not found["duplicates"]["cube"].any()


def test_a_second_cube_is_found(cube):
    clips, _, evidence, _ = cube
    images = clips.images.copy()
    inside = slice(clips.starts[5] + 10, clips.starts[5] + 30)
    view = images[inside, 0]
    spots = evidence[0].colours[_cells(view)]
    for frame, spot in zip(view, spots, strict=True):
        rows, columns = np.nonzero(spot)
        frame[(rows + 25) % 64, (columns + 20) % 64] = frame[rows, columns]
    images[inside, 0] = view
    found = violations(cube, dataclasses.replace(clips, images=images))
    assert found["duplicates"]["cube"].tolist() == [row == 5 for row in range(8)]
    assert not found["vanishes"]["cube"].any()


def test_a_plate_that_walks_is_found(cube):
    """Nothing ever touches the plate, so it must not go anywhere."""
    clips, positions, evidence, _ = cube
    images, seen = clips.images.copy(), positions.values.copy()
    plate = evidence[1]
    start, end = clips.starts[1], clips.ends[1]
    for step in range(start + 5, start + 25):
        shift = min(6, step - start - 5)
        view = images[step, 0]
        rows, columns = np.nonzero(plate.colours[_cells(view)])
        colours = view[rows, columns].copy()
        view[rows, columns] = np.median(view, axis=(0, 1))
        view[np.clip(rows + shift, 0, 63), columns] = colours
    seen[start + 5 : end, plate.column, 0] += 0.08
    far = seen.copy()
    far[start:end, 0] = (0.3, 0.5, 0.5)
    found = violations(cube, dataclasses.replace(clips, images=images), far)
    assert found["moves"]["plate"][1]
    # With the gripper beside it, it may have been pushed.
    near = seen.copy()
    near[start:end, 0] = near[start:end, plate.column]
    assert not violations(cube, dataclasses.replace(clips, images=images), near)["moves"]["plate"][1]


# Statistics -----------------------------------------------------------------------------------------------------


def test_validity_of_hand_made_outcomes():
    real = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]], bool)
    same = policy_validity(real, real)
    assert same["pearson_r"] == pytest.approx(1.0)
    assert same["mean_bias"] == same["mmrv"] == 0.0
    assert same["agreement"] == 1.0
    upside_down = policy_validity(real, ~real)
    assert upside_down["pearson_r"] == pytest.approx(-1.0)
    # Every policy is misranked with the one that is furthest from it, or with its only neighbour: .5, .25, .5.
    assert upside_down["mmrv"] == pytest.approx(1.25 / 3)
    assert mean_maximum_rank_violation(np.array([0.2, 0.8]), np.array([0.3, 0.31])) == 0.0
    assert policy_validity(real[:2], real[:2])["pearson_r"] is None
    with pytest.raises(ConfigError, match="do not fit"):
        policy_validity(real, real[:2])


def test_a_model_that_is_kind_to_policies_or_knows_no_better_one_is_warned_of():
    real, hits = np.arange(40) < np.array([[4], [20], [28]]), np.ones((3, 40), bool)

    def warnings_for(imagined: np.ndarray) -> list[str]:
        rows = [
            {"simulation": {"success_rate": float(one.mean())}, "imagined": {"success_rate": float(other.mean())}}
            for one, other in zip(real, imagined, strict=True)
        ]
        return policy_warnings({**policy_validity(real, imagined), "rows": rows})

    blind, kind = warnings_for(hits)
    assert blind.startswith("all 3 policies succeed in 100 % of the imagined episodes, and in 10 to 70 %")
    assert kind.startswith("policies succeed 57 points more often in the model")
    assert warnings_for(real) == []
    assert len(warnings_for(~hits)) == 1, "too strict a model is not exploited"


def test_intervals_are_over_episodes():
    rng = np.random.default_rng(0)
    actual = rng.normal(size=(300, 2))
    episode = np.repeat(np.arange(30), 10)
    good = explained_variance(actual + 0.1 * rng.normal(size=actual.shape), actual, episode)
    assert good[0]["r2"] == pytest.approx(0.99, abs=0.01)
    assert good[0]["interval"][0] < good[0]["r2"] < good[0]["interval"][1]
    flat = explained_variance(actual, np.ones_like(actual), episode)
    assert flat[0]["r2"] is None
    assert explained_variance(np.tile(actual.mean(0), (300, 1)), actual, episode)[0]["r2"] == pytest.approx(0, abs=1e-9)
    narrow = mean_with_interval(np.arange(100.0))
    assert narrow["mean"] == 49.5
    assert narrow["interval"][0] < 49.5 < narrow["interval"][1]
    curve = curve_with_interval(np.array([[1.0, 2.0], [3.0, np.nan]]))
    assert curve["mean"] == [2.0, 2.0]
    assert curve["n"] == [2, 1]


def test_a_single_episode_has_no_interval():
    single = mean_with_interval(np.array([0.3, np.nan]))
    assert single == {"mean": 0.3, "interval": None, "n": 1}
    assert number(single) == "0.3"
    assert mean_with_interval(np.array([0.3, 0.5]))["interval"] is not None
    curve = curve_with_interval(np.array([[1.0, 2.0], [3.0, np.nan]]))
    assert None not in (curve["low"][0], curve["high"][0])
    assert (curve["low"][1], curve["high"][1]) == (None, None)
    actual = np.random.default_rng(0).normal(size=(10, 1))
    [score] = explained_variance(actual + 0.1, actual, np.zeros(10))
    assert score["r2"] > 0.9
    assert (score["interval"], score["n"]) == (None, 1)
    assert describe({**score, "r2": 0.934}) == "R2 0.93 (1 episode)"
    several = {"r2": 0.934, "interval": [0.9, 0.95], "n": 40}
    assert describe(several) == "R2 0.93 (95 % interval 0.90 to 0.95, 40 episodes)"
    once = policy_validity(np.array([[True], [False]]), np.array([[True], [True]]))
    assert (once["mean_bias"], once["mean_bias_interval"]) == (0.5, None)
    change = judge_change({"training_reward": np.array([0.1])}, {"training_reward": np.array([0.9])})
    assert change["measures"]["training_reward"]["verdict"] == "not distinguishable"


# The whole command ----------------------------------------------------------------------------------------------


def tiny_policy(folder: Path, output: Path, seed: int) -> Path:
    config = BCConfig(vision=VisionConfig(widths=(8, 8), keypoints=4, features=8), hidden=16)
    schedule = TrainerConfig(steps=3, batch_size=4, warmup_steps=1, seed=seed, precision="fp32")
    return train(config, schedule, open_training_data(folder, config, mask="all"), output, device="cpu").run


def test_the_command_writes_results_page_and_videos(folder, run, tmp_path, capsys):
    policies = [tiny_policy(folder, tmp_path / f"policy{seed}", seed) for seed in range(3)]
    arguments = [
        "world-model", "evaluate", "--model", str(run), "--data", str(folder), "--output", str(tmp_path / "out"),
        "--judge-steps", "2", "--conditions", "3", "--videos", "2", "--device", "cpu",
        "--policies", *map(str, policies),
    ]  # fmt: skip
    command_line(arguments)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["episodes"]["judged"] == 3
    for measured in ("psnr_db", "psnr_reconstructed_db", "psnr_at_rest_db"):
        assert len(results[measured]["curve"]["mean"]) == results["episodes"]["longest"]
    assert results["policies"]["n"] == 3
    assert len(results["policies"]["rows"]) == 3
    assert {"real", "imagined", "swapped"} <= set(results["actions"])
    page = (tmp_path / "out" / "evaluate.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2
    assert "Does it judge policies" in page
    assert {"psnr.png", "policies.png", "position_tcp.png"} <= {p.name for p in (tmp_path / "out/plots").iterdir()}
    frames = read_video(tmp_path / "out" / results["videos"][0]["file"])
    assert frames.shape[2] > frames.shape[1] * 0.8
    # What was trained is not trained again, what was run is not run again.
    stamp = (tmp_path / "out/judge/checkpoints/last/model.safetensors").stat().st_mtime_ns
    command_line(arguments)
    assert (tmp_path / "out/judge/checkpoints/last/model.safetensors").stat().st_mtime_ns == stamp
    assert "warnings" in capsys.readouterr().out


def test_outcomes_of_a_model_that_was_replaced_are_not_taken_for_those_of_the_new_one(folder, loaded, tmp_path):
    policies = [tiny_policy(folder, tmp_path / "policy", 0)]
    model = dataclasses.replace(loaded, folder=tmp_path / "model")
    shutil.copytree(loaded.folder, model.folder)
    evaluate_policies(model, policies, tmp_path / "out", conditions=2, videos=0, device="cpu")
    weights = model.folder / "model.safetensors"
    tensors = load_tensors(weights)
    tensors["classifier.threshold"] += 0.1
    save_file(tensors, weights)
    with pytest.raises(EvaluationError, match="world_model_checkpoint"):
        evaluate_policies(model, policies, tmp_path / "out", conditions=2, videos=0, device="cpu")


def test_policies_are_compared_in_the_simulation_that_is_named(folder, loaded, tmp_path):
    policies = [tiny_policy(folder, tmp_path / "policy", 0)]
    kept = {}
    for randomization in ("none", "hard"):
        output = tmp_path / randomization
        found = evaluate_policies(
            loaded, policies, output, randomization=randomization, conditions=2, videos=0, device="cpu"
        )
        assert found["randomization"] == randomization
        kept[randomization] = [json.loads(path.read_text()) for path in sorted(output.glob("*/*/results.json"))]
    assert [one["randomization"] for one in kept["hard"]] == ["hard"] * 2
    with pytest.raises(EvaluationError, match="randomization"):
        evaluate_policies(loaded, policies, tmp_path / "hard", conditions=2, videos=0, device="cpu")


def test_play_shows_columns(folder, run, tmp_path):
    path = tmp_path / "play.mp4"
    command_line(
        ["world-model", "play", "--model", str(run), "--data", str(folder), "--output", str(path), "--episodes", "2",
         "--alter", "still", "swapped", "--device", "cpu"]
    )  # fmt: skip
    frames = read_video(path)
    # Four columns of 160 pixels and two rows.
    assert frames.shape[2] > 4 * 160
    assert frames.shape[1] > 2 * 160
    assert len(frames) > 2 * (10 + 10)
    with pytest.raises(ConfigError, match=r"\.mp4"):
        command_line(
            ["world-model", "play", "--model", str(run), "--data", str(folder), "--output", str(tmp_path / "play")]
        )


def test_what_does_not_fit_is_refused(folder, run, loaded, data, tmp_path):
    other = tmp_path / "high"
    env = make_vector_env("reach", 2, embodiment=panda_embodiment(16, render_profile="high"), observe="image")
    with DatasetWriter(other, env.embodiment, {env.task.name: env.task.to_dict()}) as writer:
        recorder = Recorder(
            memory_takes(writer), task="reach", embodiment=env.embodiment, source="expert", operator="expert"
        )
        rollout(env, ScriptedExpert(env.task, env.embodiment), range(2), listeners=[recorder])
    env.close()
    with pytest.raises(EmbodimentMismatchError, match="render_profile"):
        evaluate_world_model(run, [other], tmp_path / "out", device="cpu")
    policy = tiny_policy(other, tmp_path / "policy", 0)
    with pytest.raises(EmbodimentMismatchError, match="render_profile"):
        evaluate_policies(loaded, [policy], tmp_path / "policies", conditions=2, device="cpu")
    learned = int(np.array(data.seeds)[~data.held_out][0])
    with pytest.raises(ConfigError, match=r"1 of the 1 initial conditions .* that the world model .* learned from"):
        evaluate_policies(loaded, [policy], tmp_path / "policies", conditions=1, first_seed=learned, device="cpu")
    state = DiffusionConfig(
        image_keys=(), state_keys=("proprio", "object_state"), unet_widths=(16,), condition_width=32, noise_samples=1
    )  # fmt: skip
    schedule = TrainerConfig(steps=1, batch_size=4, warmup_steps=1, precision="fp32")
    blind = train(state, schedule, open_training_data(folder, state, mask="all"), tmp_path / "state", device="cpu").run
    with pytest.raises(ConfigError, match="reads object_state, and a world model imagines front_image"):
        evaluate_policies(loaded, [blind], tmp_path / "policies", conditions=1, device="cpu")
    # What was found about another model is not overwritten.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(json.dumps({"kind": KIND, "model": str(tmp_path / "earlier")}))
    with pytest.raises(ConfigError, match=r"holds the evaluation of .*earlier; choose another --output"):
        evaluate_world_model(run, [folder], tmp_path / "out", device="cpu")
    few = dataclasses.replace(
        data, starts=data.starts[:5], ends=data.ends[:5], names=data.names[:5], seeds=data.seeds[:5]
    )
    with pytest.raises(DatasetError, match="0 of 5 episodes were not learned from"):
        choose_episodes(loaded, few, 10)


def fresh_to(loaded, data) -> np.ndarray:
    return unseen(loaded.training["data"], data.names, data.seeds)


def test_only_what_the_model_did_not_learn_from_is_judged(folder, loaded, data, tmp_path):
    assert np.array_equal(fresh_to(loaded, data), data.held_out)
    fresh = open_video_data([make_world_data(tmp_path / "fresh", episodes=8, seed=1000)])
    assert fresh_to(loaded, fresh).all()
    judged, learned = choose_episodes(loaded, fresh, 32)
    assert len(judged) == 4
    assert not learned[judged].any()
    # The same initial conditions in another folder are the same episodes.
    copy = open_video_data([make_world_data(tmp_path / "copy", episodes=8)])
    kept = {seed for seed, out in zip(data.seeds, data.held_out, strict=True) if out}
    assert fresh_to(loaded, copy).tolist() == [seed in kept for seed in copy.seeds]
    assert not fresh_to(loaded, copy).all()


def test_without_simulator_truth_objects_are_skipped_with_a_note(folder, loaded, tmp_path):
    source = Dataset.open(folder)
    with DatasetWriter(tmp_path / "real", source.embodiment, source.tasks) as writer:
        for episode in source.episodes[:8]:
            arrays = source.read(episode)
            del arrays["obs/object_state"]
            writer.add(arrays, episode)
    data = open_video_data([tmp_path / "real"])
    positions = read_positions(data)
    assert positions.names == ("tcp",)
    assert "object_state" in positions.notes[0]
    learned = ~data.held_out
    probe = train_probe(data, positions, learned, tmp_path / "probe", steps=3, device="cpu")
    judges = Judges(
        positions=positions, probe=probe, actions=train_judge(data, learned, tmp_path / "judge", steps=3, device="cpu")
    )
    real = real_clips(loaded.model, data, np.flatnonzero(data.held_out))
    assert decode_positions(probe, real).shape == (len(real.frames), 1, 3)
    found = judge_videos(loaded, data, judges, learned, real, real)
    assert found["violations"] is None
    assert list(found["positions"]) == ["tcp"]
    found = {
        "model": "m", "data": ["d"], "provenance": {}, "videos": [], **found,
    }  # fmt: skip
    assert "Limits" in write_page(found, tmp_path / "page").read_text()
